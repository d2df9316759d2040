"""lm-eval (EleutherAI's language model evaluation harness) on a model in memory.

lm-eval is an optional dependency, imported when first used: `pip install hf-compress[evaluation]`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import io
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration.capture import inference
from hf_compress.calibration.padding import pad_id
from hf_compress.checks import check
from hf_compress.evaluation.kinds import check_predicts_text

TASK_PACK = Path(__file__).parent / "tasks"  # the tasks that ship with this package: always found, by their names

Paths = str | Path | Sequence[str | Path]

# What lm-eval warns of whenever it is used as it is here; none of it concerns the user.
_EXPECTED_WARNINGS = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
    "Custom kwargs can be passed to `--metadata`",
)


def run_tasks(  # noqa: PLR0913 (each of them is an argument of lm-eval's own)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    include_path: Paths | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Score the model on lm-eval tasks.

    The model's modes, the tokenizer and the global random states are left as they were.

    Args:
        model: A model in memory, scored on its device and in its dtype.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval tasks, groups or tags. Where all of them are tasks in `TASK_PACK` or `include_path`,
            lm-eval's own some ten thousand are not even looked at, which saves ten seconds.
        include_path: Folder or folders of task files (YAML), beside `TASK_PACK`.
        batch_size: Sequences that go through the model at once.
        limit: Documents of each task (an integer), or a fraction of them (below 1); default all.
        num_fewshot: Solved examples before each question; default as the task says.
        seed: Of everything random.
        output_dir: Where lm-eval writes `results_*.json` and `samples_*.jsonl`, in a folder named after the model.

    Returns:
        What `lm_eval.simple_evaluate` returns: `["results"][task]` holds the metrics and their standard errors,
        `["samples"][task]` what came of each document.

    Raises:
        ImportError: lm-eval is not installed.
        UnsupportedModelError: a model that does not predict the next token.
        ValueError: an unknown task, a folder that is not there, or a number out of its range.
        OSError: lm-eval could not write its files.
    """
    check_predicts_text(model, "scoring on lm-eval tasks")
    _require_lm_eval()
    names = _listed(tasks)
    _check(names, batch_size, limit)
    manager = _task_manager(names, _folders(include_path))
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    tracker = EvaluationTracker(output_path=str(output_dir)) if output_dir is not None else None
    with inference(model), _random_states(), _without_expected_warnings(), _no_bars_off_terminal():
        wrapped = HFLM(pretrained=model, tokenizer=_padding(tokenizer, model), batch_size=batch_size)
        results = simple_evaluate(
            wrapped,
            model_args={"pretrained": model_name(model)},
            tasks=names,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            evaluation_tracker=tracker,
            task_manager=manager,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if tracker is not None:
        _write(tracker, results, Path(str(output_dir)))
    return results


def check_tasks(tasks: str | Sequence[str], include_path: Paths | None = None) -> None:
    """Raise where tasks could not be scored, before any model is there: ImportError, ValueError; see `run_tasks`."""
    _require_lm_eval()
    _task_manager(_listed(tasks), _folders(include_path))


def _listed(tasks: str | Sequence[str]) -> list[str]:
    return [tasks] if isinstance(tasks, str) else list(tasks)


def model_name(model: PreTrainedModel) -> str:
    """Name to report the model by: the last part of where it was loaded from, or else its class."""
    return Path(model.config.name_or_path or "").name or type(model).__name__


def read_task_file(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The `test` split of a task in `TASK_PACK`, which its YAML file names as `custom_dataset: !function …`.

    So the data are found wherever the package is installed and from whatever folder lm-eval is run, without network
    or cache.

    Args:
        file: JSON lines, relative to `TASK_PACK`; from the YAML file's `dataset_kwargs`.
        _: What lm-eval adds of the task's metadata.
    """
    lines = (TASK_PACK / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def task_names(*folders: Path) -> list[str]:
    """Names of the tasks, groups and tags that the folders hold."""
    _require_lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders]).all_tasks


def _padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """A copy, to which HFLM may give a padding token; one that the model has no embedding for is taken off."""
    own = copy.deepcopy(tokenizer)
    if own.pad_token_id != pad_id(model.config, own):
        own.pad_token = None
    return own


def _require_lm_eval() -> None:
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ImportError(
            "Scoring on tasks needs lm-eval, which is not installed: pip install hf-compress[evaluation]"
        ) from error


def _check(names: list[str], batch_size: int, limit: int | float | None) -> None:
    if not names:
        raise ValueError(f"tasks is empty; expected names of lm-eval tasks, for instance {task_names(TASK_PACK)}.")
    check("batch_size", batch_size, int, "[1, inf)")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(f"limit is {limit}; expected a number of documents, or a fraction of them below 1.")


def _folders(include_path: Paths | None) -> list[Path]:
    """`TASK_PACK` and the user's folders, whose tasks win where names are equal."""
    given = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or [])
    folders = [Path(folder) for folder in given]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"include_path {str(folder)!r} is not a folder; expected one with lm-eval task files.")
    return [TASK_PACK, *folders]


def _task_manager(names: list[str], folders: list[Path]) -> Any:
    """lm-eval's task manager, without its own tasks where they are not needed.

    A group or tag may have members among lm-eval's own tasks, so only plain tasks are known to need nothing else.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders]
    local = TaskManager(include_defaults=False, include_path=paths)
    if set(names) <= set(local.all_subtasks):
        return local
    manager = TaskManager(include_path=paths)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        close = sorted({match for name in unknown for match in difflib.get_close_matches(name, manager.all_tasks)})
        raise ValueError(
            f"Unknown tasks {unknown}. In {paths} there are {local.all_tasks}; of lm-eval's own, "
            f"{close or 'none'} have similar names (`lm-eval ls tasks` lists them all). Correct the name, or give the "
            "folder of its YAML file as include_path."
        )
    return manager


def _write(tracker: Any, results: dict[str, Any], folder: Path) -> None:
    """Have lm-eval write its files, and make sure that it did: it only logs its failures."""
    samples = results["samples"]
    results = {name: value for name, value in results.items() if name != "samples"}
    before = set(folder.glob("**/*.json*"))
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    new = set(folder.glob("**/*.json*")) - before
    if len(new) != 1 + len(samples):
        raise OSError(
            f"lm-eval wrote {len(new)} of {1 + len(samples)} result files to {folder}: check that it is a folder that "
            "can be written to and that the disk is not full."
        )


@contextmanager
def _random_states() -> Iterator[None]:
    """Puts back the global random states, which lm-eval seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _NoBars(io.TextIOBase):
    """Passes on what is written, but for progress bars, which begin with a carriage return, and the line end of one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.after_bar = False

    def write(self, text: str) -> int:
        is_bar = text.startswith("\r") or (self.after_bar and text == "\n")
        self.after_bar = text.startswith("\r")
        if not is_bar:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def _no_bars_off_terminal() -> Iterator[None]:
    """lm-eval shows its bars always; this shows them on a terminal only, and everything else on stderr as it is."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(_NoBars(sys.stderr)):
        yield


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Drops the warnings that every use of lm-eval from here gives; all others are shown."""

    def unexpected(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in _EXPECTED_WARNINGS)

    loggers = [logging.getLogger(name) for name in ("lm_eval.models.huggingface", "lm_eval.api.task")]
    for logger in loggers:
        logger.addFilter(unexpected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unexpected)
