"""What was measured of a model, for its card: the section with its table, and the Hub's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.evaluation.scores import TaskScore
from hf_compress.plan.tables import measured
from hf_compress.report.markdown import escape, one_line, public, table

UNCOMPRESSED = "uncompressed"  # the base model's name among the controls


def is_evaluated(result: EvaluationResult | None) -> bool:
    """Whether there is more than sizes and speed."""
    return result is not None and (result.perplexity is not None or bool(result.all_scores))


def eval_results(result: EvaluationResult | None, task: str, texts: str | None) -> list[EvalResult]:
    """The model's own figures for the metadata; one that is not finite is none."""
    if result is None:
        return []
    found = []
    if (ours := result.perplexity) is not None:
        name = one_line(texts or "") or "unnamed texts"
        found.append(EvalResult(task, "text", name, "perplexity", ours.value, metric_name="perplexity"))
    for score in result.scores:
        name, metric = one_line(score.task), one_line(score.metric)
        found.append(EvalResult(task, name, name, metric.partition(",")[0], score.value, metric_name=metric))
    for score, kind in zip(result.labelled.scores() if result.labelled else (), ("accuracy", "f1"), strict=False):
        name = one_line(public(score.task))
        found.append(EvalResult(task, name, name, kind, score.value, metric_name=one_line(score.metric)))
    return [entry for entry in found if math.isfinite(entry.metric_value)]


def evaluation(result: EvaluationResult | None, controls: Mapping[str, EvaluationResult], texts: str | None) -> str:
    """The section: this model beside its controls, or that there is nothing to show."""
    if result is None or not is_evaluated(result):
        return "## Evaluation\n\nThis model was **not evaluated**: how well it does its work is not known."
    results = [result, *controls.values()]
    gaps = _gap_row(result.perplexity, [control.perplexity for control in controls.values()])
    scores = _score_rows(results)
    rows = [
        ["parameters", *(f"{each.parameters:,}" for each in results)],
        ["stored bytes", *(f"{each.stored_bytes:,}" for each in results)],
        *_perplexity_row(result.perplexity, [each.perplexity for each in results]),
        *gaps,
        *scores,
    ]
    header = ["", "**this model**", *(escape(public(name)) for name in controls)]
    notes = ["± are standard errors; ↓ lower is better, ↑ higher is better; an empty cell was not measured."]
    if result.perplexity is not None:
        notes.append(f"Perplexity: on {escape(texts or '') or 'texts that are not named here'}.")
    if gaps:
        notes.append("Differences of the loss are in nats per token.")
    if gaps or any(" above this model's" in row[0] for row in scores):
        notes.append("Differences are taken document by document, in pairs, and so are their errors.")
    return f"## Evaluation\n\n{table(header, rows)}\n\n{' '.join([*notes, *_missing(controls)])}"


def _missing(controls: Mapping[str, EvaluationResult]) -> list[str]:
    """What ought to stand beside the figures and does not."""
    notes = []
    if UNCOMPRESSED not in controls:
        notes.append("**The uncompressed model was not measured.**")
    if not set(controls) - {UNCOMPRESSED}:
        notes.append("**No control was measured**: whether a simpler way to this size does as well is not known.")
    return notes


def _perplexity_row(ours: Perplexity | None, all_of_them: Sequence[Perplexity | None]) -> list[list[str]]:
    if ours is None:
        return []
    cells = [f"perplexity ↓ ({ours.documents:,} documents, {ours.tokens:,} tokens)"]
    for each in all_of_them:
        cells.append("" if each is None else measured(each.value, each.value_standard_error))
        if each is not None and (each.tokens, each.documents) != (ours.tokens, ours.documents):
            cells[-1] += f" (other texts: {each.documents:,} documents, {each.tokens:,} tokens)"
    return [cells]


def _gap_row(ours: Perplexity | None, others: Sequence[Perplexity | None]) -> list[list[str]]:
    gaps = [_gap(ours, other) if ours and other else "" for other in others]
    return [["loss above this model's", "(reference)", *gaps]] if any(gaps) else []


def _gap(ours: Perplexity, other: Perplexity) -> str:
    """By how much the other's loss is above ours; nothing where that was not kept, or for other texts."""
    if not ours.by_document:
        return ""
    try:
        return measured(*other.loss_difference(ours), sign="+")
    except ValueError:
        return ""


def _score_rows(results: Sequence[EvaluationResult]) -> list[list[str]]:
    """A row for every metric of the first result, and one for the differences from it."""
    found = [{(score.task, score.metric): score for score in result.all_scores} for result in results]
    rows = []
    for key, ours in found[0].items():
        arrow = {True: " ↑", False: " ↓", None: ""}[ours.higher_is_better]
        count = f" ({ours.documents:,} documents)" if ours.documents is not None else ""
        cells = [f"{escape(public(ours.task))} {escape(ours.metric)}{arrow}{count}"]
        for scores in found:
            score = scores.get(key)
            cells.append("" if score is None else measured(score.value, score.standard_error))
            if score is not None and score.documents not in (None, ours.documents):
                cells[-1] += f" ({score.documents:,} documents)"
        rows += [cells, *_score_gaps(ours, [scores.get(key) for scores in found[1:]])]
    return rows


def _score_gaps(ours: TaskScore, others: Sequence[TaskScore | None]) -> list[list[str]]:
    """By how much the others' scores are above ours, document by document; nothing where that is not known."""
    cells = []
    for other in others:
        try:
            cells.append(measured(*other.difference(ours), sign="+") if other is not None else "")
        except ValueError:
            cells.append("")
    title = f"{escape(public(ours.task))} {escape(ours.metric)} above this model's"
    return [[title, "(reference)", *cells]] if any(cells) else []
