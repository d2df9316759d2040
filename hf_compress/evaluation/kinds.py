"""Which models a metric fits: text is scored by models that predict its next token, labels are by classifiers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import inference
from hf_compress.errors import UnsupportedModelError

_PROBE = 8  # tokens
_CLASSIFIERS: dict[Literal["texts", "images"], str] = {
    "texts": "ForSequenceClassification",
    "images": "ForImageClassification",
}
_LEAK = 0.02  # of what a token changes at its own place: above what rounding in bfloat16 does where experts change


def metric_of_text(texts: bool, tasks: bool) -> str | None:
    """What is to be measured of a language model, in words; None where nothing is."""
    return "perplexity" if texts else "scoring on lm-eval tasks" if tasks else None


def check_predicts_text(model: PreTrainedModel, metric: str) -> None:
    """Raise unless `model` gives, at every position of a text, logits for the token that comes next.

    Encoder-decoders that generate do, on the decoder's side. Of others it is tried out whether a token changes the
    logits before it: a masked language model reads what it is to predict, also behind a causal model's name
    (BertLMHeadModel without `is_decoder`), and gives figures that mean nothing.

    Args:
        model: any model in memory.
        metric: what is to be measured, in words; for the message.

    Raises:
        UnsupportedModelError: it does not, so that the metric does not fit.
    """
    name = type(model).__name__
    check_generates(type(model), metric)
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{metric} needs a model that reads text; {name} reads {model.main_input_name}")
    if not model.config.is_encoder_decoder and _reads_ahead(model):
        raise UnsupportedModelError(
            f"{metric} needs a model that sees only the tokens before the one to predict; {name} reads those after it, "
            "too (a masked language model, perhaps, or a decoder without is_decoder=True): leave it out"
        )


def check_generates(kind: Any, metric: str) -> None:
    """Raise UnsupportedModelError where the models of a class have no language model's head; `metric` as above."""
    if not kind.can_generate():
        raise UnsupportedModelError(
            f"{metric} needs a model that predicts the next token, which {kind.__name__} does not: leave it out, "
            "measure what this model was trained for, or load one with a language model's head"
        )


def check_classifies(kind: Any, config: PreTrainedConfig) -> Literal["texts", "images"]:
    """What classifiers of a class and a config read; raise for models that are none.

    Raises:
        UnsupportedModelError: it has no head of a classifier of texts or images, or one that gives several labels at
            once, or a number.
    """
    name = kind.__name__
    heads = " ".join(base.__name__ for base in kind.__mro__)
    reads = [what for what, head in _CLASSIFIERS.items() if head in heads]
    if not reads:
        raise UnsupportedModelError(
            f"labelled data needs a classifier of texts or images (…ForSequenceClassification, "
            f"…ForImageClassification), which {name} is not: leave it out, or load the model with its classifier's head"
        )
    problem = getattr(config, "problem_type", None)
    if (config.num_labels or 0) < 2 or problem in ("regression", "multi_label_classification"):
        told = problem or f"num_labels={config.num_labels}"
        raise UnsupportedModelError(
            f"accuracy and F1 need a model that gives each document one of several classes; {name} does not ({told})"
        )
    return reads[0]


def reads_tokens_alone(model: PreTrainedModel) -> bool:
    """Whether a model runs on token ids and nothing else."""
    return model.main_input_name == "input_ids" and not model.config.is_encoder_decoder


@torch.no_grad()
def _reads_ahead(model: PreTrainedModel) -> bool:
    """Whether the last token changes the logits before it."""
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[0, -1] = (first[0, -1] + 1 + vocabulary // 2) % vocabulary
    with inference(model):
        change = (_logits(model, first) - _logits(model, second)).abs().mean(-1)[0]
    return bool(change[:-1].max() > _LEAK * change[-1])


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    ids = ids.to(computing_device(model))
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits
    return logits.float()
