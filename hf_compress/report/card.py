"""The model card: what is known of a compressed model, what was measured of it, and plainly what was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.evaluation.size import parameter_count
from hf_compress.report.card_facts import CardDetails, Facts
from hf_compress.report.card_history import changes, making, sizes, training
from hf_compress.report.card_loading import loading
from hf_compress.report.card_scores import eval_results, evaluation, is_evaluated
from hf_compress.report.card_summary import summary
from hf_compress.report.history import history_of
from hf_compress.report.markdown import escape, fence, public, sentence, several

# What the limitations say of the evaluation.
EVALUATED = "Beyond the table above, nothing was evaluated: not safety, bias, other languages, other text, or speed."
NOT_EVALUATED = "Nothing was evaluated: not quality, safety, bias, languages, or speed."


def model_card(
    model: PreTrainedModel,
    *,
    result: EvaluationResult | None = None,
    controls: Mapping[str, EvaluationResult] | None = None,
    command: str | None = None,
    details: CardDetails | None = None,
) -> ModelCard:
    """The card of a compressed model, from its history and what was measured; nothing is measured here.

    License, languages and datasets are taken over from the base model's own card, where it lies beside the files that
    the base was loaded from, unless `details` say otherwise.

    Args:
        model: as `compress` or `from_pretrained` gave it; one without a history gets a card that says what is known.
        result: what `evaluate` measured of this very model. Without it, the card says that it was not evaluated.
        controls: what `evaluate` measured in the same way of others, by name: the base model under "uncompressed", and
            the simplest things of the same size, such as "last blocks left out".
        command: what reproduces model and figures; several lines if need be. It goes into the card as it is.
        details: what the library cannot know, such as the licence.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: controls without a result, or a result of another model.
    """
    _check(model, result, controls or {})
    report = history_of(model)
    facts = Facts(model, report, result, controls or {}, command, details or CardDetails())
    sections = (
        summary(facts),
        loading(facts),
        sizes(model, report),
        evaluation(result, facts.controls, facts.details.evaluation),
        changes(report) if report else "",
        _making(facts),
        _limits(facts),
    )
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _check(model: Any, result: Any, controls: Mapping[str, Any]) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a PreTrainedModel: load it first")
    for name, given in {"result": result, **{f"controls[{key!r}]": value for key, value in controls.items()}}.items():
        if not isinstance(given, EvaluationResult) and not (name == "result" and given is None):
            raise TypeError(f"{name} is a {type(given).__name__}; expected what hf_compress.evaluate() returns")
    if controls and result is None:
        raise ValueError("controls stand beside a result, but result is None: pass result=evaluate(model, ...)")
    if result is not None and result.parameters != parameter_count(model):
        raise ValueError(
            f"result is of a model with {result.parameters:,} parameters, but this one has {parameter_count(model):,}: "
            "pass what evaluate() measured of this very model"
        )


def _metadata(facts: Facts) -> ModelCardData:
    report, bases = facts.report, facts.base_models
    scores = eval_results(facts.result, facts.task or "text-generation", facts.details.evaluation)
    # Of the Hub's relations (adapter, finetune, merge of several models, quantized), one alone can fit.
    edits = [edit for stage in report.stages for edit in stage.edits] if report else []
    packed = any(edit.get("edit") == "PackLinear" or edit.get("planes") for edit in edits)
    return ModelCardData(
        base_model=(bases[0] if len(bases) == 1 else bases) if bases else None,
        base_model_relation="quantized" if len(bases) == 1 and packed else None,
        datasets=facts.datasets or None,
        eval_results=scores or None,
        language=facts.language or None,
        library_name="transformers",
        license=facts.license,
        license_name=facts.base.license_name if facts.is_bases_license else None,
        license_link=facts.base.license_link if facts.is_bases_license else None,
        model_name=facts.name if scores else None,
        pipeline_tag=facts.task,
        tags=["hf-compress", *several(report.methods if report else ())],
    )


def _making(facts: Facts) -> str:
    details = facts.details
    parts = []
    if facts.command and facts.command.strip():
        parts.append(f"This reproduces it:\n\n{fence(facts.command, 'bash')}")
    named = sentence(details.calibration or "")
    if facts.report is not None:
        parts.append(making(facts.report, named))
    elif named:
        parts.append(f"Calibration data: {named}")
    if names := several(details.datasets):
        parts.append(f"Datasets: {escape(', '.join(map(public, names)))}.")
    return "\n\n".join(("## How it was made", *parts)) if parts else ""


def _limits(facts: Facts) -> str:
    details = facts.details
    trained = sentence(details.training or "")
    recorded_training = facts.report is not None and any(map(training, facts.report.stages))
    untrained = [] if recorded_training else ["No training after compression is recorded."]
    lines = [
        *([f"Trained after compression: {trained}"] if trained else untrained),
        EVALUATED if is_evaluated(facts.result) else NOT_EVALUATED,
        "The base model's intended uses and limitations apply here, too; what compression did to them was not tested.",
        *map(sentence, several(details.limitations)),
    ]
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)
