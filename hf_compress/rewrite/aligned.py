"""Running a model whose weights lie in mapped files just as if they lay in memory, one module's weights at a time.

A weight in a mapped file begins at an offset that is seldom a multiple of 64 bytes, and a few kernels round differently
there. That is no difference between two models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_compress.anatomy.offloaded import align_hooks
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.capture import hooked
from hf_compress.numerics.aside import in_own_pages

_ALIGNMENT = 64  # bytes; of PyTorch's own memory


@contextmanager
def aligned(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Have every module compute with aligned copies of its own parameters, made when it runs and let go afterwards.

    What is aligned already is not copied. A module that reads another's parameters finds them as they were.

    Args:
        device: where the copies go; where the parameters are when None.
    """
    with Undo() as undo, hooked(_copying(model, device)):
        for module in model.modules():
            for hook in align_hooks(module):
                if hook.weights_map is not None:
                    undo.set(hook, "weights_map", _Aligned(hook.weights_map))
        yield


def _copying(model: nn.Module, device: torch.device | None) -> Iterator[RemovableHandle]:
    """Hooks that put copies in the place of the parameters that need it, and take them out again."""
    own: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def lend(module: nn.Module, args: object) -> None:
        if module not in own:  # else it calls itself
            own[module] = dict(_strays(module, device))
            module._parameters |= {name: _copy(parameter, device) for name, parameter in own[module].items()}

    def take_back(module: nn.Module, args: object, output: object) -> None:
        module._parameters |= own.pop(module, {})

    for module in model.modules():
        if any(True for _ in _strays(module, device)):
            yield module.register_forward_pre_hook(lend)
            yield module.register_forward_hook(take_back, always_call=True)


def _strays(module: nn.Module, device: torch.device | None) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters that have to be copied to be aligned on a device; what is offloaded is not here."""
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.is_meta:
            continue
        if parameter.data_ptr() % _ALIGNMENT or device not in (None, parameter.device):
            yield name, parameter


def _copy(parameter: nn.Parameter, device: torch.device | None) -> nn.Parameter:
    to_cpu = (device or parameter.device).type == "cpu"
    tensor = in_own_pages(parameter.detach().cpu()) if to_cpu else parameter.detach().to(device, copy=True)
    return nn.Parameter(tensor, requires_grad=False)


class _Aligned(Mapping[str, Tensor]):
    """The tensors of another mapping, copied where they are not aligned."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return in_own_pages(tensor) if tensor.data_ptr() % _ALIGNMENT else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
