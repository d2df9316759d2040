"""How large a live model is."""

from __future__ import annotations

from torch import Tensor, nn


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes that the model's saved tensors take, without the files' headers; tied tensors count once."""
    seen: dict[tuple[int, int], Tensor] = {}
    for tensor in model.state_dict().values():
        seen[(tensor.data_ptr() if tensor.device.type != "meta" else id(tensor), tensor.numel())] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
