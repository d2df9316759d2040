"""What `from_pretrained` makes of a folder, with its weights mapped from the files, to hold a model against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.anatomy.offloaded import stored
from hf_compress.errors import ParityError, one_line
from hf_compress.rewrite.aligned import aligned
from hf_compress.rewrite.probe import Outputs, Probe, dense_room, outputs_on, quiet
from hf_compress.storage.weights import tensors_in

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes; compared several times as fast as single ones


@contextmanager
def written(model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """What was written of `model` as Transformers loads it, on the CPU, its weights mapped from files instead of read.

    What the files have in another form, as experts one by one, is first put into files as it is used, beside `folder`.

    Raises:
        ParityError: it does not load.
    """
    with TemporaryDirectory(dir=folder.parent) as converted:
        try:
            loaded = _mapped(model, folder, converted)
        except Exception as error:
            raise ParityError(f"the saved model does not load: {one_line(error)}") from error
        yield loaded.train(model.training)


def _mapped(model: PreTrainedModel, folder: Path, converted: str) -> PreTrainedModel:
    if model.state_dict().keys() >= tensors_in(folder).keys():
        return load(model, folder)
    try:
        loaded = load(model, folder, device_map={"": "disk"}, offload_folder=converted)
        offloaded = {name: p for name, p in loaded.named_parameters() if p.is_meta}
        there = {
            parameter: nn.Parameter(stored(loaded, name).to(parameter.dtype), requires_grad=parameter.requires_grad)
            for name, parameter in offloaded.items()
        }
    except Exception:  # not every model lets itself be put on a disk
        return load(model, folder)
    remove_hook_from_submodules(loaded)
    for module in loaded.modules():
        module._parameters |= {name: there.get(p, p) for name, p in module._parameters.items() if p is not None}
    return loaded


def load(model: PreTrainedModel, folder: Path, **placed: Any) -> PreTrainedModel:
    """`from_pretrained` of a folder by the class and in the dtype of `model`."""
    with quiet():
        return type(model).from_pretrained(folder, dtype=model.dtype, **placed)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, wherever they are, have the same shape, dtype and bits, those of zeros and NaN included."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    kind = _BITS.get(first.element_size(), torch.uint8)
    ours, theirs = (tensor.detach().contiguous().reshape(-1).view(kind) for tensor in (first, second))
    return torch.equal(ours, theirs.to(ours.device))


def outputs_of(loaded: PreTrainedModel, model: PreTrainedModel, probe: Probe) -> Outputs:
    """What a model of `written` gives where `model` computes: each module's weights are there while it runs, no longer.

    Unpacked ones are kept where there is room for them beside `model`.
    """
    device = computing_device(model)
    if device.type != "cpu":
        for module in loaded.modules():
            module._buffers |= {name: b.to(device) for name, b in module._buffers.items() if b is not None}
        add_hook_to_module(loaded, AlignDevicesHook(device))
    with aligned(loaded, device):
        return outputs_on(loaded, probe, dense_room(model))
