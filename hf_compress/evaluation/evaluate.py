"""Everything that is measured of a model, in one call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.calibration.reading import read_texts
from hf_compress.checks import check
from hf_compress.evaluation.classification import Classification, classify
from hf_compress.evaluation.harness import Paths, model_name, run_tasks
from hf_compress.evaluation.kinds import check_classifies, check_predicts_text, metric_of_text, reads_tokens_alone
from hf_compress.evaluation.loading import load_saved
from hf_compress.evaluation.perplexity import Perplexity, perplexity
from hf_compress.evaluation.processors import load_processor
from hf_compress.evaluation.scores import TaskScore, task_scores
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.evaluation.speed import Throughput, tokens_per_second
from hf_compress.plan.tables import html_table, text_table

_COLUMNS = ("value", "std. error")


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        name: The model's name.
        parameters: Number of parameters, tied ones counted once.
        stored_bytes: Bytes of its safetensors files, or of what would stand in them for a live model.
        throughput: Prefill speed; to be compared within one run only. None for a model that reads something else than
            tokens, or more, and where `compare` has measured speed instead.
        perplexity: On `texts`; None without them.
        scores: Every metric of every task.
        labelled: On `labelled`; None without it.
        harness: What lm-eval returned, for all else that it knows; not part of the JSON.
    """

    name: str
    parameters: int
    stored_bytes: int
    throughput: Throughput | None
    perplexity: Perplexity | None = None
    scores: tuple[TaskScore, ...] = ()
    labelled: Classification | None = None
    harness: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def all_scores(self) -> tuple[TaskScore, ...]:
        """Those of the tasks, and accuracy and F1 on labelled data."""
        return (*self.scores, *(self.labelled.scores() if self.labelled is not None else ()))

    def to_dict(self) -> dict[str, Any]:
        """As plain data; numbers that are not known (NaN) become None."""
        content = {name: value for name, value in vars(self).items() if name != "harness"}
        content["throughput"] = None if self.throughput is None else asdict(self.throughput)
        if self.perplexity is not None:
            content["perplexity"] = self.perplexity.to_dict()
        content["scores"] = [score.to_dict() for score in self.scores]
        content["labelled"] = None if self.labelled is None else self.labelled.to_dict()
        return without_nan(content)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, standard error) as text, for tables; the error is empty where there is none."""
        rows = [
            ("parameters", f"{self.parameters:,}", ""),
            ("stored bytes", f"{self.stored_bytes:,}", ""),
        ]
        if (speed := self.throughput) is not None:
            rows.append(("tokens/s", *_rounded(speed.tokens_per_second, speed.standard_error, 0)))
        if self.perplexity is not None:
            rows.append(("perplexity", *_rounded(self.perplexity.value, self.perplexity.value_standard_error, 2)))
        for score in self.all_scores:
            rows.append((f"{score.task} {score.metric}", *_rounded(score.value, score.standard_error, 4)))
        return rows

    def table(self) -> str:
        """A plain-text table of all that was measured."""
        return text_table((self.name, *_COLUMNS), self.rows(), right={1, 2})

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(self.name, ("", *_COLUMNS), self.rows())


def evaluate(  # noqa: PLR0913 (each of them is something else to measure, or how)
    model: PreTrainedModel | str | Path,
    tokenizer: Any = None,
    *,
    tasks: str | Sequence[str] = (),
    texts: Iterable[str] | None = None,
    labelled: Any = None,
    include_path: Paths | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
    speed: bool = True,
    device: str | None = None,
    output_dir: str | Path | None = None,
) -> EvaluationResult:
    """Measure size, speed, and how good a model is: language models on texts and tasks, classifiers on labelled data.

    `perplexity`, `run_tasks`, `classify`, `tokens_per_second` and `speed_ratio` measure one of these, with more to set;
    `compare` measures several models.

    Args:
        model: A live model, left as it is; or a directory (or a name on the Hub), loaded in the dtype it is stored in
            and with the head that it was saved with.
        tokenizer: The model's (of a classifier of images, its image processor); needed with a live model for `tasks`,
            `texts` and `labelled`. Default: the directory's.
        tasks: Names of lm-eval tasks; "manuals_cloze" ships with this package.
        texts: Documents for perplexity, which must not have been calibrated on.
        labelled: Documents with labels, for the accuracy of classifiers: what `classify` takes as data.
        include_path: Folder or folders with further lm-eval task files.
        batch_size: Sequences that go through the model at once.
        limit: Documents of each task, of the texts and of the labelled data, or a fraction of them below 1.
        speed: Whether to time the model.
        device: Where a directory's model is loaded to; the CPU when None.
        output_dir: Where to write lm-eval's own files (for tasks) and `evaluation.json`.

    Raises:
        ImportError: `tasks` are given and lm-eval is not installed.
        TypeError: `model` or `texts` is not of a kind named above.
        ValueError: an argument out of range, an unknown task, or a missing tokenizer.
        UnsupportedModelError: `tasks` or `texts` for a model that does not predict the next token, `labelled` for one
            that is no classifier; weights are missing.
        FileNotFoundError: the directory holds no safetensors.
    """
    check("limit", limit, float | None, "(0, inf)")
    metric = metric_of_text(texts is not None, bool(tasks))
    live, tokenizer, stored = _resolve(model, tokenizer, metric, labelled is not None, device)
    harness = None
    # Tasks before texts: a name that is not known is found at once, and not after minutes of perplexity.
    if tasks:
        harness = run_tasks(
            live,
            _given(tokenizer),
            tasks,
            include_path=include_path,
            batch_size=batch_size,
            limit=limit,
            output_dir=output_dir,
        )
    measured = None
    if texts is not None:
        measured = perplexity(live, _given(tokenizer), first_texts(texts, limit), batch_size=batch_size)
    result = EvaluationResult(
        name=model_name(live),
        parameters=parameter_count(live),
        stored_bytes=stored,
        throughput=tokens_per_second(live) if speed and reads_tokens_alone(live) else None,
        perplexity=measured,
        scores=() if harness is None else task_scores(harness),
        labelled=None if labelled is None else classify(live, labelled, tokenizer, batch_size=batch_size, limit=limit),
        harness=harness,
    )
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(result.to_json() + "\n", encoding="utf-8")
    return result


def _resolve(
    model: PreTrainedModel | str | Path, tokenizer: Any, metric: str | None, labelled: bool, device: str | None
) -> tuple[PreTrainedModel, Any, int]:
    """The live model, its tokenizer and its stored bytes; `metric` is what needs it to predict text, if anything."""
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a PreTrainedModel or a directory (merge a PEFT adapter "
            "first: model.merge_and_unload())."
        )
    if isinstance(model, Path) and not model.is_dir():
        raise ValueError(f"model {str(model)!r} is not a directory; expected one that save_pretrained has written.")
    live = model if isinstance(model, PreTrainedModel) else load_on(str(model), device)
    # What does not fit is told before a tokenizer is missed, which other models need not have.
    if metric is not None:
        check_predicts_text(live, metric)
    if labelled:
        check_classifies(type(live), live.config)
    if isinstance(model, PreTrainedModel):
        return live, tokenizer, stored_bytes(live)
    if tokenizer is None and (metric is not None or labelled):
        tokenizer = load_processor(str(model), needed=True)
    return live, tokenizer, stored_bytes(model if Path(model).is_dir() else live)


def load_on(name: str, device: str | None = None) -> PreTrainedModel:
    """A saved model in the dtype that it is stored in, on a device; on the CPU when None."""
    return load_saved(name, dtype="auto", **({} if device is None else {"device_map": {"": device}}))


def _given(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("tokenizer is None, but tasks and texts need one: pass the model's tokenizer.")
    return tokenizer


def first_texts(texts: Iterable[str], limit: int | float | None) -> list[str]:
    """The first so many texts, or a share of them below 1; all when None."""
    read = read_texts(texts)
    return read if limit is None else read[: int(limit) if limit >= 1 else math.ceil(limit * len(read))]


def without_nan(value: Any) -> Any:
    """The same data with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: float, error: float, decimals: int) -> tuple[str, str]:
    return f"{value:,.{decimals}f}", "" if math.isnan(error) else f"{error:,.{decimals}f}"
