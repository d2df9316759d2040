"""All that a model card is made of: the model, its history, what was measured, and what only the user knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_compress.evaluation.evaluate import EvaluationResult
from hf_compress.report.card_base import HUB_ID, BaseCard, base_card, hub_id
from hf_compress.report.markdown import last_part, one_line, public, several
from hf_compress.report.report import CompressionReport
from hf_compress.rewrite.record import recorded

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

    What is given wins over what the base model's own card says, if that lies beside the files it was loaded from.

    Attributes:
        name: the model's name; made of the base model's and the method's when not given.
        repo_id: where it will be on the Hub ("org/name"); the example loads it from there, and otherwise from a folder
            of the model's name at a place to be filled in.
        base_model: the base model's id on the Hub, where the model was loaded from a folder.
        license: the licence's id on the Hub, such as "apache-2.0"; that of the base model's card when None.
        language: language codes; those of the base model's card when empty.
        datasets: of calibration and training: ids on the Hub, or names. Those of the base model's card stand beside
            them in the metadata.
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
            if value is not None and not HUB_ID.fullmatch(value):
                raise ValueError(f"{field} is {value!r}; expected an id on the Hub, such as 'org/name', or None")


@dataclass(frozen=True)
class Facts:
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

    @cached_property
    def base(self) -> BaseCard:
        """What the base model's own card says."""
        same = self.origin == str(self.model.name_or_path or "")
        return base_card(self.origin, getattr(self.model.config, "_commit_hash", None) if same else None)

    @property
    def base_models(self) -> list[str]:
        """The base model's id on the Hub; of a folder that is not there, those that it was made from itself."""
        own = self.details.base_model or hub_id(self.origin)
        return [own] if own else list(self.base.base_models)

    @property
    def base_name(self) -> str:
        """What the base model is called: never the folders that it was loaded from."""
        return one_line(self.details.base_model or hub_id(self.origin) or last_part(self.origin))

    @property
    def license(self) -> str | None:
        """The licence's id."""
        return one_line(self.details.license or "") or self.base.license

    @property
    def is_bases_license(self) -> bool:
        """Whether the licence is taken over from the base model's card."""
        return not one_line(self.details.license or "") and self.base.license is not None

    @property
    def language(self) -> list[str]:
        """Language codes."""
        return several(self.details.language) or list(self.base.language)

    @property
    def datasets(self) -> list[str]:
        """Ids on the Hub of what the base model, and this one, was made with."""
        own = (hub_id(name) for name in several(self.details.datasets))
        return list(dict.fromkeys([*self.base.datasets, *filter(None, own)]))

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

    @property
    def auto_class(self) -> str | None:
        """The Auto class that loads the model as the class it is; None where there is no such."""
        return self._auto[0]

    @property
    def task(self) -> str | None:
        """The Hub's task of the model; None where its class leaves doubts."""
        return self._auto[1]

    @cached_property
    def _auto(self) -> tuple[str | None, str | None]:
        kind, name = self.model.config.model_type, type(self.model).__name__
        for head, listed, task in _AUTO_CLASSES:
            if name in _names(getattr(modeling_auto, f"MODEL_FOR_{listed}_MAPPING_NAMES").get(kind)):
                return f"AutoModelFor{head}", task
        return ("AutoModel" if name in _names(modeling_auto.MODEL_MAPPING_NAMES.get(kind)) else None), None


def _names(entry: str | Sequence[str] | None) -> Sequence[str]:
    return [entry] if isinstance(entry, str) else entry or []
