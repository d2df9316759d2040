"""sweep(): many ways to make a model smaller, each measured against the model as it is, and what beats what."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from hf_compress.anatomy.compressible import check_model
from hf_compress.anatomy.dispatch import is_dispatched
from hf_compress.api.arguments import prepared
from hf_compress.api.identity import identity_of
from hf_compress.api.stages import StageSettings, check_stages, compress_in_stages, is_several, stages_of
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.data import Calibration, DataOptions
from hf_compress.calibration.files import load_texts
from hf_compress.calibration.media import Processor
from hf_compress.calibration.progress import bar
from hf_compress.calibration.reading import read_texts
from hf_compress.calibration.workdir import worked_in
from hf_compress.errors import MemoryBudgetError, OffloadError, UnsupportedModelError, WorkdirError
from hf_compress.evaluation.compare import check_metrics
from hf_compress.evaluation.comparison import ComparedMetric, Comparison, file_name
from hf_compress.evaluation.evaluate import EvaluationResult, evaluate
from hf_compress.evaluation.harness import check_tasks
from hf_compress.evaluation.kinds import reads_tokens_alone
from hf_compress.evaluation.labelled import Examples, read_labelled
from hf_compress.evaluation.speed import Speed, speeds_in_turn
from hf_compress.methods.base.journal import Journal
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.numerics.fingerprint import digest
from hf_compress.report.measured import Measured
from hf_compress.report.sweep_result import SweepResult
from hf_compress.storage.save import save

logger = logging.getLogger(__name__)

ORIGINAL = "original"
_TASK_FILES = (".yaml", ".yml", ".jsonl", ".json", ".py")
WORK, MEASURED, COMMON, RUNS, BEST = "work", "measured", "common", "runs", "models"  # folders of a sweep


@dataclass(frozen=True)
class _Entry:
    """A way to make the model smaller, by its name in the table."""

    name: str
    stages: tuple[StageSettings, ...]
    control: bool = False

    @property
    def digest(self) -> str:
        """What tells its settings from those of all others."""
        return digest([stage.to_dict() for stage in self.stages])[:16]


@torch_defaults()
def sweep(  # noqa: PLR0913 (what is compressed, by what, and what is measured)
    model: PreTrainedModel,
    configs: Mapping[str, Any] | Iterable[Any],
    calibration: Any = None,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
    compute: Compute | None = None,
    *,
    texts: str | Path | Iterable[str] | None = None,
    tasks: str | Sequence[str] = (),
    labelled: Any = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
    speed: bool = True,
    controls: bool = True,
    folder: str | Path | None = None,
    best: int = 0,
) -> SweepResult:
    """Compress copies of `model` in many ways, and measure each against the model as it is. `model` stays so.

    Calibration data is prepared once, and the model as it is measured once. What a method works out that is the same
    however much it takes out, such as the first merges, gradients, or Fisher information, is worked out once, too.

    Args:
        model: in memory, on one device; a copy is beside it.
        configs: settings as for `compress`, each of one method or of several stages; by names, or named after
            themselves.
        calibration, tokenizer, options, compute: as for `compress`; `compute` without a workdir.
        texts, tasks, labelled, include_path, batch_size, limit: what is measured, as for `evaluate`.
        speed: whether to time each model, in turn with the original.
        controls: whether to measure beside them, for every ratio, the model without its last blocks.
        folder: for what is measured, as sweep.csv, sweep.json and sweep.png; a sweep that was killed goes on from
            there, and one with further settings takes over what is there.
        best: so many models are made again and saved in `folder`, those that are not beaten (see
            `SweepResult.front`), from the best on.

    Returns:
        What was measured of each. Settings that the model or their method refuses are in it, with the reason.

    Raises:
        ValueError, TypeError: bad arguments; no settings, or two alike.
        WorkdirError: the folder is of a sweep over another model, other data, or other texts.
    """
    entries = _entries(configs, controls)
    _check(model, compute, folder, best)
    for entry in entries:
        check_stages(model, entry.stages, calibration, {})
    if texts is not None:
        texts = load_texts(texts, limit=None) if isinstance(texts, str | Path) else read_texts(texts)
    labelled = None if labelled is None else read_labelled(labelled, limit)
    check_metrics(model, texts is not None, bool(tasks), labelled is not None)
    if tasks:
        check_tasks(tasks, include_path)
    data = prepared(calibration, model, tokenizer, options)
    asked = {"tasks": tasks, "labelled": labelled, "include_path": include_path}
    asked |= {"texts": texts, "batch_size": batch_size, "limit": limit}
    with ExitStack() as held:
        place = Path(folder) / WORK if folder else Path(held.enter_context(TemporaryDirectory(prefix="hf_compress-")))
        held.enter_context(worked_in(place / MEASURED))
        journal = Journal(place / MEASURED, _identity(model, data, tokenizer, {**asked, "speed": speed}))
        shutil.rmtree(place / RUNS, ignore_errors=True)  # of a sweep that was killed, for the folder is one's
        runs = _Runs(model, data, tokenizer, compute or Compute(), place, asked, speed)
        found = []
        for entry in bar(entries, "sweeping"):
            facts = journal.facts(f"measured {entry.digest}", partial(runs.facts, entry))
            found.append(replace(Measured.from_dict(facts), name=entry.name, control=entry.control))
        result = SweepResult(runs.original_metrics(journal), found)
        if folder is not None:
            result.write(Path(folder))
            for one in result.front()[:best]:
                stages = next(entry.stages for entry in entries if entry.name == one.name)
                save(runs.made(stages), Path(folder) / BEST / file_name(one.name), tokenizer, overwrite=True)
    return result


@dataclass
class _Runs:
    """Compresses copies of a model, and measures them."""

    model: PreTrainedModel
    data: Calibration | None
    tokenizer: Processor | None
    compute: Compute
    place: Path
    asked: dict[str, Any]
    speed: bool

    @cached_property
    def original(self) -> EvaluationResult:
        """What was measured of the model as it is, once."""
        return self._evaluated(self.model)

    def original_metrics(self, journal: Journal) -> list[ComparedMetric]:
        """The same, as it is kept for another run."""
        found = journal.facts("original", lambda: [vars(row) for row in Comparison({ORIGINAL: self.original}).rows()])
        return [ComparedMetric(**values) for values in found]

    def facts(self, entry: _Entry) -> dict[str, Any]:
        """What a way comes to, as JSON values."""
        return self._measured(entry).to_dict()

    def _measured(self, entry: _Entry) -> Measured:
        """What a way comes to; why, where it is refused."""
        settings, start = [stage.to_dict() for stage in entry.stages], perf_counter()
        try:
            small = self.made(entry.stages)
        except (WorkdirError, MemoryBudgetError, OffloadError):  # which says nothing of the settings
            raise
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            logger.warning("%s is refused: %s", entry.name, reason)
            return Measured(entry.name, settings, error=reason)
        seconds = perf_counter() - start
        results = {ORIGINAL: self.original, entry.name: self._evaluated(small)}
        comparison = Comparison(results, {entry.name: self._speeds(small)} if self._timed(small) else {})
        del small
        gc.collect()
        rows = [row for row in comparison.rows() if row.model == entry.name]
        return Measured(entry.name, settings, rows, seconds)

    def made(self, stages: tuple[StageSettings, ...]) -> PreTrainedModel:
        """The model that stages make."""
        (self.place / RUNS).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.place / RUNS) as folder:
            small = copy.deepcopy(self.model)
            compute, common = replace(self.compute, workdir=folder), self.place / COMMON
            compress_in_stages(small, stages, self.data, compute, self.model, common=common)
            return small

    def _evaluated(self, model: PreTrainedModel) -> EvaluationResult:
        return evaluate(model, self.tokenizer, speed=False, **self.asked)

    def _timed(self, small: PreTrainedModel) -> bool:
        return self.speed and reads_tokens_alone(small)

    def _speeds(self, small: PreTrainedModel) -> tuple[Speed, Speed]:
        first, own = speeds_in_turn([self.model, small])
        return first, own


def _entries(configs: Mapping[str, Any] | Iterable[Any], controls: bool) -> list[_Entry]:
    """All that is to be compared, the controls last."""
    named = configs.items() if isinstance(configs, Mapping) else ((None, config) for config in configs)
    entries = []
    for name, config in named:
        stages = stages_of(config if is_several(config) else [config])
        entries.append(_Entry(name or ", ".join(map(told, stages)), stages))
    if not entries:
        raise ValueError("there is nothing to sweep over: give settings, such as [MKAConfig(ratio=0.25)]")
    if controls:
        last = [(ratio, DropBlocksConfig(ratio=ratio, criterion="last")) for ratio in sorted(_ratios(entries))]
        made = [_Entry(f"last blocks left out, ratio={ratio}", (config,), True) for ratio, config in last]
        entries += [control for control in made if control.digest not in {entry.digest for entry in entries}]
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.digest in seen:
            raise ValueError(f"{entry.name!r} and {seen[entry.digest]!r} have the same settings: leave one of them out")
        if file_name(entry.name) in map(file_name, seen.values()):
            raise ValueError(f"two settings are called {entry.name!r}: give names, as in {{'mine': MKAConfig(…)}}")
        seen[entry.digest] = entry.name
    return entries


def _ratios(entries: list[_Entry]) -> set[float]:
    """The shares that methods take out, where they say so."""
    stages = [stage for entry in entries for stage in entry.stages if isinstance(stage, CompressionConfig)]
    return {amount.value for stage in stages if (amount := stage.amount) is not None and amount.word == "ratio"}


def told(stage: StageSettings) -> str:
    """What a stage is called: its method, and the settings that are not the default."""
    default = {field.name: field.default for field in fields(stage)}
    own = [f"{name}={value}" for name, value in stage.to_dict().items() if name != "method" and value != default[name]]
    return " ".join([stage.method, *own])


def _check(model: Any, compute: Compute | None, folder: Any, best: int) -> None:
    check_model(model)
    if is_dispatched(model):
        raise UnsupportedModelError("a sweep copies the model in memory, and this one is dispatched: load it whole")
    if compute is not None and compute.workdir is not None:
        raise ValueError("a sweep keeps its work in folder=: leave out workdir=")
    if best and folder is None:
        raise ValueError(f"best={best} models are to be saved, but not where: give folder=")


def _identity(
    model: PreTrainedModel, data: Calibration | None, tokenizer: Any, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What a sweep is known by: the model, its data, what is measured, and on what."""
    labelled: Examples | None = asked["labelled"]
    known = {name: asked[name] for name in ("tasks", "include_path", "batch_size", "limit", "speed")}
    hashed = {
        "texts": asked["texts"],
        "labelled": labelled and [labelled.labels, [*map(_plain, labelled.inputs)]],
        "task files": [file.read_text(encoding="utf-8") for file in _files(asked["include_path"])],
        "tokenizer": getattr(tokenizer, "get_vocab", dict)(),
    }
    told = {**known, **{name: digest(value) for name, value in hashed.items()}}
    return identity_of(model, None, data) | {"measured": json.loads(json.dumps(told, default=str))}


def _plain(value: Any) -> Any:
    """An input as what can be hashed: texts as they are, images by their pixels."""
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else value


def _files(folder: str | Path | None) -> list[Path]:
    return [] if folder is None else sorted(path for path in Path(folder).rglob("*") if path.suffix in _TASK_FILES)
