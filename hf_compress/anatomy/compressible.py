"""Which models can be changed: plain ones of Transformers, whose weights can be had."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.adapters import check_no_adapters
from hf_compress.anatomy.dispatch import check_readable, is_dispatched, retie
from hf_compress.anatomy.residency import check_finite
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.kernels import check_no_kernels
from hf_compress.numerics.defaults import check_not_inference


def check_model(model: Any) -> None:
    """Raise unless `model` is a plain Transformers model, in one place or dispatched, whose weights can be had.

    Offloaded weights are looked at when they are read.
    """
    if isinstance(model, nn.Module):
        check_no_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError("the model is quantized: compress it first, quantize it afterwards")
    check_no_kernels(model)
    check_not_inference(model)
    check_readable(model)
    retie(model)
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1 and not is_dispatched(model):
        raise UnsupportedModelError(f"the model is spread over {sorted(devices)}: put it on one device with model.to()")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(name, parameter)
