"""How far fitting has come, in a file from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from hf_compress.anatomy.offloaded import values_of
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import here
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from hf_compress.numerics.fingerprint import fingerprint
from hf_compress.numerics.tensor_file import read_tensors, write_tensors

_FILE = "fitting.safetensors"
_LOOKED_AT = 1000  # values of each parameter


class Progress:
    """Reads the state of an earlier run, where there is one, and writes this one's.

    Attributes:
        done: batches that are done.

    Raises:
        ValueError: the folder holds the state of a run with other settings, data, or number of processes.
    """

    def __init__(
        self,
        folder: str | Path | None,
        runs: list[dict[int, LearnerRun]],
        configs: Sequence[AdaptiveCompressConfig],
        model: PreTrainedModel,
        data: Calibration,
        every: int,
    ) -> None:
        self.path = None if folder is None else Path(folder) / _FILE
        self.runs = {f"{n}.{layer}": run for n, mine in enumerate(runs) for layer, run in mine.items()}
        self.every = every
        self.done = 0
        if self.path is None:
            return
        self.identity = {
            "configs": json.loads(json.dumps([config.to_dict() for config in configs])),
            "data": fingerprint(tensor for batch in data for tensor in batch.inputs.values()),
            "model": fingerprint(values.flatten()[:_LOOKED_AT] for values in values_of(model)),
            "processes": here()[1],
        }
        if self.path.is_file():
            self._read(self.path)

    def batch_done(self, done: int) -> None:
        """Note that so many batches are done; from time to time, and in one process, on disk."""
        self.done = done
        if self.path is None or done % self.every or here()[0]:
            return
        tensors = {f"{key}.{name}": tensor for key, run in self.runs.items() for name, tensor in run.state().items()}
        facts = {key: {"curve": run.curve, "stopped": run.stopped} for key, run in self.runs.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"identity": self.identity, "done": done, "runs": facts})

    def _read(self, path: Path) -> None:
        whole, tensors = read_tensors(path)
        if whole["identity"] != self.identity:
            different = [name for name, value in self.identity.items() if whole["identity"].get(name) != value]
            raise ValueError(f"{path} is of a run with other {', '.join(different)}: delete it, or give another folder")
        self.done = whole["done"]
        for key, run in self.runs.items():
            prefix = f"{key}."
            run.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
            run.curve, run.stopped = whole["runs"][key]["curve"], whole["runs"][key]["stopped"]
