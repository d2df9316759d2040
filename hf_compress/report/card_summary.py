"""The first lines of a model card: what the model is made of, its size, its quality, how it loads, and its licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.evaluation.perplexity import Perplexity
from hf_compress.evaluation.scores import TaskScore
from hf_compress.evaluation.size import parameter_count, stored_bytes
from hf_compress.plan.tables import measured
from hf_compress.report.card_facts import Facts
from hf_compress.report.card_history import methods
from hf_compress.report.card_scores import UNCOMPRESSED, is_evaluated
from hf_compress.report.edits import decisions
from hf_compress.report.markdown import escape, human_bytes
from hf_compress.report.report import CompressionReport

INSTALL = "pip install hf-compress"
_MOST = 6  # decisions that are told; the section on changes has all


def summary(facts: Facts) -> str:
    """The section that a card begins with."""
    plugin = f"needs `import hf_compress` (`{INSTALL}`)."
    lines = (
        _line("Made of", _made_of(facts)),
        _line("Size", _size(facts)),
        quality_line(facts.result, facts.controls),
        _line("Loading", plugin if facts.needs_plugin else "plain checkpoint: stock Transformers loads it."),
        _line("License", _license(facts)),
        _line("Language", _language(facts)),
    )
    return "\n\n".join((f"# {escape(facts.name)}", _what_it_is(facts), "\n".join(lines)))


def quality_line(result: EvaluationResult | None, controls: Mapping[str, EvaluationResult]) -> str:
    """The line that says how good the model is, which new scores replace."""
    return _line("Quality", _quality(result, controls))


def _line(name: str, text: str) -> str:
    return f"- **{name}:** {text}"


def _what_it_is(facts: Facts) -> str:
    base = _base(facts)
    if facts.report is None:
        origin = f" It was loaded from {base}." if base else ""
        return f"A {type(facts.model).__name__}, saved with hf_compress. No compression report came with it.{origin}"
    smaller = facts.report.after.bytes < facts.report.before.bytes
    done = "made smaller" if smaller else "changed"  # bottlenecks are parameters more
    return f"{base or 'A model of unknown origin'}, {done} by {methods(facts.report)} with hf_compress."


def _base(facts: Facts) -> str:
    """The base model, with a link to it, or else to what it was made from itself."""
    name, links = escape(facts.base_name), [_link(model) for model in facts.base_models]
    if links and facts.base_models == [facts.base_name]:
        return links[0]
    return f"{name} (made from {', '.join(links)})" if links else name


def _link(model: str) -> str:
    return f"[{escape(model)}](https://huggingface.co/{model})"


def _made_of(facts: Facts) -> str:
    kind = f"a {escape(type(facts.model).__name__)}"
    if facts.report is None:
        return f"{kind}; what was changed is not known."
    blocks = [_blocks(stack, before, facts.report) for stack, before in facts.report.before.blocks.items()]
    told = list(_told(facts.report))
    more = [f"and {len(told) - _MOST:,} changes more"] if len(told) > _MOST else []
    return ". ".join([", ".join([kind, *blocks]), *map(escape, told[:_MOST]), *more]) + "."


def _blocks(stack: str, before: int, report: CompressionReport) -> str:
    after = report.after.blocks.get(stack, 0)
    place = f" in {escape(stack)}" if len(report.before.blocks) > 1 else ""
    return f"{after} blocks{place}" + (f" of the original's {before}" if after != before else "")


def _told(report: CompressionReport) -> Iterator[str]:
    """What was decided; of several stages, each by its method."""
    for stage in report.stages:
        for line in decisions(stage.edits):
            yield f"{stage.method}: {line}" if len(report.stages) > 1 else line


def _size(facts: Facts) -> str:
    count, size = parameter_count(facts.model), stored_bytes(facts.model)
    if facts.report is None:
        return f"{human_bytes(size)} stored; {count:,} parameters."
    before = facts.report.before
    stored = _beside(size, before.bytes, f"the original's {human_bytes(before.bytes)}", "less")
    parameters = _beside(count, before.parameters, f"its {before.parameters:,}", "fewer")
    return f"{human_bytes(size)} stored, {stored}; {count:,} parameters, {parameters}."


def _beside(now: int, then: int, original: str, less: str) -> str:
    if now == then or not then:
        return "the same as the original"
    return f"{abs(100 * (now / then - 1)):.1f}% {less if now < then else 'more'} than {original}"


def _quality(result: EvaluationResult | None, controls: Mapping[str, EvaluationResult]) -> str:
    """How good the model is, beside the uncompressed one where that was measured on the same documents."""
    if result is None or not is_evaluated(result):
        return "not measured."
    dense = controls.get(UNCOMPRESSED)
    told = [_perplexity(result.perplexity, dense.perplexity if dense else None)] if result.perplexity else []
    scores = {(score.task, score.metric): score for score in (dense.all_scores if dense else ())}
    told += [_score(score, scores.get((score.task, score.metric))) for score in result.all_scores]
    return "; ".join(told[:_MOST]) + "."


def _perplexity(ours: Perplexity, dense: Perplexity | None) -> str:
    same = dense is not None and (dense.tokens, dense.documents) == (ours.tokens, ours.documents)
    beside = f" (uncompressed: {measured(dense.value, dense.value_standard_error)})" if dense and same else ""
    return f"perplexity {measured(ours.value, ours.value_standard_error)}{beside}"


def _score(ours: TaskScore, dense: TaskScore | None) -> str:
    same = dense is not None and dense.documents == ours.documents
    beside = f" (uncompressed: {measured(dense.value, dense.standard_error)})" if dense and same else ""
    return f"{escape(f'{ours.task} {ours.metric}')} {measured(ours.value, ours.standard_error)}{beside}"


def _license(facts: Facts) -> str:
    if facts.license is None:
        return "not known here; the base model's own holds."
    if not facts.is_bases_license:
        return f"{escape(facts.license)}."
    text = escape(facts.base.license_name or facts.license)
    link = facts.base.license_link
    return f"[{text}]({link}), as the base model's card says." if link else f"{text}, as the base model's card says."


def _language(facts: Facts) -> str:
    return f"{escape(', '.join(facts.language))}." if facts.language else "not known here."
