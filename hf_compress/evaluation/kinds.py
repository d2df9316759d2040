"""Which models a metric fits: text is scored by models that predict its next token from those before it, no others."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import inference
from hf_compress.errors import UnsupportedModelError

_PROBE = 8  # tokens
_LEAK = 0.02  # of what a token changes at its own place: above what rounding in bfloat16 does where experts change


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
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{metric} needs a model that predicts the next token, which {name} does not: leave it out, measure what "
            "this model was trained for, or load one with a language model's head"
        )
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{metric} needs a model that reads text; {name} reads {model.main_input_name}")
    if not model.config.is_encoder_decoder and _reads_ahead(model):
        raise UnsupportedModelError(
            f"{metric} needs a model that sees only the tokens before the one to predict; {name} reads those after it, "
            "too (a masked language model, perhaps, or a decoder without is_decoder=True): leave it out"
        )


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
