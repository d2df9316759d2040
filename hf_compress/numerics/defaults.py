"""PyTorch's settings that a caller may have changed, as they are by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_compress.errors import UnsupportedModelError

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def torch_defaults() -> Iterator[None]:
    """For a call, as a decorator, or a block: PyTorch as it is by default, whatever the caller has set.

    Gradients can be taken and inference mode is off, or what is made could never be trained; no autocast, and new
    tensors in float32, or statistics would be rounded; new tensors on the CPU, where seeded generators are.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which also turns gradients on
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        yield


def check_not_inference(model: nn.Module) -> None:
    """Raise UnsupportedModelError where parameters were made under `torch.inference_mode`: none has a gradient."""
    if name := next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None):
        raise UnsupportedModelError(
            f"the parameter {name} was made under torch.inference_mode, so no gradient goes through it: load the model "
            "outside of inference_mode, or take a copy that copy.deepcopy makes there"
        )
