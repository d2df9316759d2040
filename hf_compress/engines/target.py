"""What an engine needs of a model, and what it refuses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_compress.calibration.media import Processor
from hf_compress.engines.agreement import Speaker
from hf_compress.errors import UnsupportedModelError
from hf_compress.evaluation.loading import Dtype
from hf_compress.plan.edits import ModuleEdit
from hf_compress.rewrite.record import recorded


class Target(ABC):
    """A form that another program than Transformers runs models from.

    Attributes:
        name: on the command line.
        engine: what runs it, for messages.
        packages: what has to be installed, as modules and by their names on PyPI.
        options: what may be asked of it.
        dtype: in which the model is loaded for it.
        writes_out: whether packed and sparse weights are written out as matrices for it.
    """

    name: ClassVar[str]
    engine: ClassVar[str]
    packages: ClassVar[dict[str, str]]
    options: ClassVar[tuple[str, ...]] = ()
    dtype: ClassVar[Dtype] = "auto"
    writes_out: ClassVar[bool] = True

    def check_installed(self) -> None:
        """Raise ImportError where a package is missing, by name."""
        if missing := [name for module, name in self.packages.items() if find_spec(module) is None]:
            raise ImportError(
                f"{self.name} needs {', '.join(missing)}: pip install {' '.join(missing)}, "
                "or pip install 'hf-compress[engines]' for all engines"
            )

    @abstractmethod
    def tolerance(self, model: PreTrainedModel) -> float:
        """Nats by which its log-probabilities may differ from those of Transformers in float32."""

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError where the form cannot say what the model is.

        Args:
            model: whose packed and sparse weights have been written out.
        """

    @abstractmethod
    def write(
        self, model: PreTrainedModel, processor: Processor | None, folder: Path, prompts: Sequence[Sequence[int]]
    ) -> None:
        """Write the form of a model into a folder that is there.

        Args:
            prompts: token ids that the model can go on with, for who has to run it.
        """

    def check_written(self, speaker: Any, processor: Any) -> None:  # noqa: B027 (few forms have any)
        """Raise ParityError where what came beside the model, such as its tokenizer, is not what it was."""

    @abstractmethod
    def speaker(self, folder: Path, model: PreTrainedModel) -> AbstractContextManager[Speaker]:
        """The engine with what was written of `model`."""


def check_plain(model: PreTrainedModel, engine: str) -> None:
    """Raise where the config alone does not say what a model is."""
    if left := recorded(model.config):
        raise UnsupportedModelError(
            f"{engine} builds {type(model).__name__} from its config, which cannot say: {_told(left)}. Compress with "
            "plain=True (ILLC), or with a method that leaves a plain checkpoint (MKA, DropBlocks)"
        )


def _told(edits: Sequence[ModuleEdit]) -> str:
    first = edits[0]
    more = f", and {len(edits) - 1} more" if len(edits) > 1 else ""
    return f"{first.paths[-1]}: {first.describe()}{more}"
