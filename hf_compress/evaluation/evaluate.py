"""Everything that is measured of a model, in one call."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.evaluation.harness import Paths, model_name, run_tasks
from hf_compress.evaluation.kinds import check_predicts_text, reads_tokens_alone
from hf_compress.evaluation.loading import load_saved
from hf_compress.evaluation.perplexity import Perplexity, perplexity
from hf_compress.evaluation.size import Throughput, parameter_count, stored_bytes, tokens_per_second
from hf_compress.plan.notebook import html_table


@dataclass(frozen=True)
class TaskScore:
    """One metric of one lm-eval task.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric, with lm-eval's filter after a comma where there is one.
        value: The metric, in its own unit (accuracies between 0 and 1).
        standard_error: As lm-eval gives it, taking documents as independent; NaN where it gives none.
        higher_is_better: None where the task does not say.
        documents: Number of documents scored; None for a group.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    higher_is_better: bool | None
    documents: int | None


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        name: The model's name.
        parameters: Number of parameters, tied ones counted once.
        stored_bytes: Bytes of its safetensors files, or of what would stand in them for a live model.
        throughput: Prefill speed; to be compared within one run only. None for a model that reads something else than
            tokens, or more.
        perplexity: On `texts`; None without them.
        scores: Every metric of every task.
        harness: What lm-eval returned, for all else that it knows; not part of the JSON.
    """

    name: str
    parameters: int
    stored_bytes: int
    throughput: Throughput | None
    perplexity: Perplexity | None = None
    scores: tuple[TaskScore, ...] = ()
    harness: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; numbers that are not known (NaN) become None."""
        content = {name: value for name, value in vars(self).items() if name != "harness"}
        for name in ("throughput", "perplexity"):
            content[name] = None if content[name] is None else asdict(content[name])
        if self.perplexity is not None:
            del content["perplexity"]["by_document"]
            content["perplexity"]["value_standard_error"] = self.perplexity.value_standard_error
        content["scores"] = [asdict(score) for score in self.scores]
        return _without_nan(content)

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
        for score in self.scores:
            rows.append((f"{score.task} {score.metric}", *_rounded(score.value, score.standard_error, 4)))
        return rows

    def table(self) -> str:
        """A plain-text table of all that was measured."""
        rows = [(self.name, "value", "std. error"), *self.rows()]
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{what:<{wide[0]}}  {value:>{wide[1]}}  {error:>{wide[2]}}".rstrip() for what, value, error in rows]
        lines.insert(1, "-" * (sum(wide) + 4))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(self.name, ("", "value", "std. error"), self.rows())


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tasks: str | Sequence[str] = (),
    texts: Iterable[str] | None = None,
    include_path: Paths | None = None,
    batch_size: int = 8,
    limit: int | float | None = None,
    output_dir: str | Path | None = None,
) -> EvaluationResult:
    """Measure size, speed, perplexity and task scores of a language model; of any other model, size and speed.

    `perplexity`, `run_tasks`, `tokens_per_second` and `speed_ratio` measure one of these, with more to set.

    Args:
        model: A live model, left as it is; or a directory (or a name on the Hub), loaded in the dtype it is stored in
            and with the head that it was saved with.
        tokenizer: The model's; needed with a live model for `tasks` and `texts`. Default: the directory's.
        tasks: Names of lm-eval tasks; "manuals_cloze" ships with this package.
        texts: Documents for perplexity, which must not have been calibrated on.
        include_path: Folder or folders with further lm-eval task files.
        batch_size: Sequences that go through the model at once.
        limit: Documents of each task, or a fraction of them below 1.
        output_dir: Where to write lm-eval's own files (for tasks) and `evaluation.json`.

    Raises:
        ImportError: `tasks` are given and lm-eval is not installed.
        TypeError: `model` or `texts` is not of a kind named above.
        ValueError: an argument out of range, an unknown task, or a missing tokenizer.
        UnsupportedModelError: `tasks` or `texts` for a model that does not predict the next token; weights are missing.
        FileNotFoundError: the directory holds no safetensors.
    """
    metric = "perplexity" if texts is not None else "scoring on lm-eval tasks" if tasks else None
    live, tokenizer, stored = _resolve(model, tokenizer, metric)
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
    result = EvaluationResult(
        name=model_name(live),
        parameters=parameter_count(live),
        stored_bytes=stored,
        throughput=tokens_per_second(live) if reads_tokens_alone(live) else None,
        perplexity=None if texts is None else perplexity(live, _given(tokenizer), texts, batch_size=batch_size),
        scores=() if harness is None else task_scores(harness),
        harness=harness,
    )
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(result.to_json() + "\n", encoding="utf-8")
    return result


def _resolve(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None, metric: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, int]:
    """The live model, its tokenizer and its stored bytes; `metric` is what needs a tokenizer, in words, if anything."""
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a PreTrainedModel or a directory (merge a PEFT adapter "
            "first: model.merge_and_unload())."
        )
    if isinstance(model, Path) and not model.is_dir():
        raise ValueError(f"model {str(model)!r} is not a directory; expected one that save_pretrained has written.")
    live = model if isinstance(model, PreTrainedModel) else load_saved(str(model), dtype="auto")
    if metric is not None:
        check_predicts_text(live, metric)  # before a tokenizer is missed, which other models need not have
    if isinstance(model, PreTrainedModel):
        return live, tokenizer, stored_bytes(live)
    if tokenizer is None and metric is not None:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    return live, tokenizer, stored_bytes(model if Path(model).is_dir() else live)


def _given(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError("tokenizer is None, but tasks and texts need one: pass the model's tokenizer.")
    return tokenizer


def task_scores(harness: dict[str, Any]) -> tuple[TaskScore, ...]:
    """Every metric and its standard error in what lm-eval returned."""
    scores = []
    for task, metrics in harness["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue  # the task's name and the like
            error = metrics.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, (int, float)) else math.nan,
                    higher_is_better=harness["higher_is_better"].get(task, {}).get(metric),
                    documents=harness["n-samples"].get(task, {}).get("effective"),
                )
            )
    return tuple(scores)


def _without_nan(value: Any) -> Any:
    """The same data with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(value: float, error: float, decimals: int) -> tuple[str, str]:
    return f"{value:,.{decimals}f}", "" if math.isnan(error) else f"{error:,.{decimals}f}"
