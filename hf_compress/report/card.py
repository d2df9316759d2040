"""The model card: what is known of a compressed model, what was measured of it, and plainly what was not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.evaluation.size import parameter_count
from hf_compress.report.card_history import changes, making, methods, sizes, training
from hf_compress.report.card_scores import eval_results, evaluation, is_evaluated
from hf_compress.report.history import history_of
from hf_compress.report.markdown import (
    escape,
    fence,
    last_part,
    one_line,
    public,
    sentence,
    several,
)
from hf_compress.report.report import CompressionReport
from hf_compress.rewrite.record import recorded

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_IN_HUB_CACHE = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)[/\\]snapshots", re.ASCII)

# What the limitations say of the evaluation.
EVALUATED = "Beyond the table above, nothing was evaluated: not safety, bias, other languages, other text, or speed."
NOT_EVALUATED = "Nothing was evaluated: not quality, safety, bias, languages, or speed."

_SOMEWHERE = "path/to/"  # stands for the folders above a model's own, which a card does not tell
_REPLACE = "# Replace the path by that of the folder that holds this card."

# The Auto class that loads a model, its table in Transformers, and the Hub's task where the class leaves no doubt.
# In this order: a class that takes images and text stands in the table of language models, too.
_AUTO_CLASSES = (
    ("ImageTextToText", "IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("SpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("CTC", "CTC", "automatic-speech-recognition"),
    ("CausalLM", "CAUSAL_LM", "text-generation"),
    ("Seq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", None),
    ("MaskedLM", "MASKED_LM", "fill-mask"),
    ("SequenceClassification", "SEQUENCE_CLASSIFICATION", "text-classification"),
    ("TokenClassification", "TOKEN_CLASSIFICATION", "token-classification"),
    ("QuestionAnswering", "QUESTION_ANSWERING", "question-answering"),
    ("ImageClassification", "IMAGE_CLASSIFICATION", "image-classification"),
    ("ObjectDetection", "OBJECT_DETECTION", "object-detection"),
    ("DepthEstimation", "DEPTH_ESTIMATION", "depth-estimation"),
    ("AudioClassification", "AUDIO_CLASSIFICATION", "audio-classification"),
)


@dataclass(frozen=True)
class CardDetails:
    """What only the user knows. Every field may be left out; the card then says so, or says nothing.

    Attributes:
        name: the model's name; made of the base model's and the method's when not given.
        repo_id: where it will be on the Hub ("org/name"); the example loads it from there, and otherwise from a folder
            of the model's name at a place to be filled in.
        base_model: the base model's id on the Hub, where the model was loaded from a folder.
        license: the licence's id on the Hub, such as "apache-2.0".
        language: language codes.
        datasets: of calibration and training: ids on the Hub, or names.
        calibration: what the calibration data is.
        evaluation: what the texts of the perplexity are.
        training: what was trained after compression.
        limitations: to be added to those that hold for every compressed model.
        tokenizer: whether a tokenizer lies beside the model.
        portable: whether the model was saved with `portable=True`.
    """

    name: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | Sequence[str] = ()
    datasets: str | Sequence[str] = ()
    calibration: str | None = None
    evaluation: str | None = None
    training: str | None = None
    limitations: str | Sequence[str] = ()
    tokenizer: bool = True
    portable: bool = False

    def __post_init__(self) -> None:
        for field in ("repo_id", "base_model"):
            value = getattr(self, field)
            if value is not None and not _HUB_ID.fullmatch(value):
                raise ValueError(f"{field} is {value!r}; expected an id on the Hub, such as 'org/name', or None")


@dataclass(frozen=True)
class _Facts:
    """All that the card is made of."""

    model: PreTrainedModel
    report: CompressionReport | None
    result: EvaluationResult | None
    controls: Mapping[str, EvaluationResult]
    command: str | None
    details: CardDetails

    @property
    def origin(self) -> str:
        """Where the base model came from: a Hub id, a path, or nothing."""
        return self.report.base_model if self.report else str(self.model.name_or_path or "")

    @property
    def base_id(self) -> str | None:
        """The base model's id on the Hub."""
        return self.details.base_model or _hub_id(self.origin)

    @property
    def base_name(self) -> str:
        """What the base model is called: never the folders that it was loaded from."""
        return one_line(self.base_id or last_part(self.origin))

    @property
    def name(self) -> str:
        """What the model is called."""
        given = one_line(public(self.details.name or "")) or (self.details.repo_id or "").partition("/")[2]
        base = last_part(self.base_name) or type(self.model).__name__
        return given or (f"{base}-{one_line('-'.join(self.report.methods))}" if self.report else base)

    @property
    def needs_plugin(self) -> bool:
        """Whether it loads only after `import hf_compress`."""
        return bool(recorded(self.model.config))


def model_card(
    model: PreTrainedModel,
    *,
    result: EvaluationResult | None = None,
    controls: Mapping[str, EvaluationResult] | None = None,
    command: str | None = None,
    details: CardDetails | None = None,
) -> ModelCard:
    """The card of a compressed model, from its history and what was measured; nothing is measured here.

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
    facts = _Facts(model, report, result, controls or {}, command, details or CardDetails())
    sections = (
        _head(facts),
        _loading(facts),
        changes(report) if report else "",
        sizes(model, report),
        evaluation(result, facts.controls, facts.details.evaluation),
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


def for_the_hub(card: ModelCard, name: str, repo_id: str) -> ModelCard:
    """A card that `save` made for a folder called `name`, with an example that loads the model from the Hub."""
    here, there = (f".from_pretrained({_quoted(place)})" for place in (f"{_SOMEWHERE}{name}", repo_id))
    return ModelCard(str(card).replace(f"{_REPLACE}\n", "").replace(here, there))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(facts: _Facts) -> ModelCardData:
    details, report = facts.details, facts.report
    task = _auto_class(facts.model)[1]
    scores = eval_results(facts.result, task or "text-generation", details.evaluation)
    # Of the Hub's relations (adapter, finetune, merge of several models, quantized), one alone can fit.
    edits = [edit for stage in report.stages for edit in stage.edits] if report else []
    packed = any(edit.get("edit") == "PackLinear" or edit.get("planes") for edit in edits)
    return ModelCardData(
        base_model=facts.base_id,
        base_model_relation="quantized" if facts.base_id and packed else None,
        datasets=[found for name in several(details.datasets) if (found := _hub_id(name))] or None,
        eval_results=scores or None,
        language=several(details.language) or None,
        library_name="transformers",
        license=one_line(details.license or "") or None,
        model_name=facts.name if scores else None,
        pipeline_tag=task,
        tags=["hf-compress", *several(report.methods if report else ())],
    )


def _auto_class(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """The Auto class that loads the model as the class it is, and the Hub's task; None where there is no such."""
    kind, name = model.config.model_type, type(model).__name__
    for head, listed, task in _AUTO_CLASSES:
        if name in _names(getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES").get(kind)):
            return f"AutoModelFor{head}", task
    return ("AutoModel" if name in _names(modeling_auto.MODEL_MAPPING_NAMES.get(kind)) else None), None


def _names(entry: str | Sequence[str] | None) -> Sequence[str]:
    return [entry] if isinstance(entry, str) else entry or []


def _hub_id(name: str) -> str | None:
    """The Hub id that a name is, or that a folder of the Hub's cache belongs to; None for any other folder."""
    if cached := _IN_HUB_CACHE.search(name):
        return "/".join(filter(None, cached.groups()))
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


# --- sections ---------------------------------------------------------------------------------------------------------


def _head(facts: _Facts) -> str:
    base = escape(facts.base_name)
    base = f"[{base}](https://huggingface.co/{facts.base_id})" if facts.base_id else base
    if facts.report is None:
        origin = f" It was loaded from {base}." if base else ""
        text = f"A {type(facts.model).__name__}, saved with hf_compress. No compression report came with it.{origin}"
    else:
        smaller = facts.report.after.bytes < facts.report.before.bytes
        done = "made smaller" if smaller else "changed"  # bottlenecks are parameters more
        text = f"{base or 'A model of unknown origin'}, {done} by {methods(facts.report)} with hf_compress."
    return f"# {escape(facts.name)}\n\n{text}"


def _loading(facts: _Facts) -> str:
    cls = type(facts.model).__name__
    auto = _auto_class(facts.model)[0] or cls
    place = _quoted(facts.details.repo_id or f"{_SOMEWHERE}{facts.name}")
    tokenizer = ["AutoTokenizer"] if facts.details.tokenizer and facts.model.main_input_name == "input_ids" else []
    lines = ["import hf_compress  # teaches Transformers the model's structure"] if facts.needs_plugin else []
    if hasattr(transformers, auto):
        lines += [f"from transformers import {', '.join([auto, *tokenizer])}"]
    else:
        lines += [f"# {cls} is no part of Transformers: import it from where it is defined."]
        lines += ["from transformers import AutoTokenizer"] if tokenizer else []
    lines += ["", *([] if facts.details.repo_id else [_REPLACE])]
    lines += [f"model = {auto}.from_pretrained({place})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place})"] if tokenizer else []
    text = "It is a plain checkpoint: stock Transformers loads it, without hf_compress."
    if facts.needs_plugin:
        text = (
            "The plugin hf_compress must be installed, and imported first, for the model's structure is one that its "
            "class in Transformers does not have. Without the plugin, stock Transformers stops with a size-mismatch "
            "error."
        )
        if facts.details.portable:
            text += " In place of the import, `trust_remote_code=True` will do, where hf_compress is installed."
    return "\n\n".join(("## How to load it", text, fence("\n".join(lines), "python")))


def _making(facts: _Facts) -> str:
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


def _limits(facts: _Facts) -> str:
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
