"""How large a model is: stored bytes and parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.modules.compact import CompactLinear

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def stored_bytes(model: PreTrainedModel | str | Path) -> int:
    """Bytes that a model's weights take.

    Of a directory: the sizes of the safetensors files that `from_pretrained` reads there (`model.safetensors`, or else
    the shards that its index names), file headers included. Of a live model: the bytes of the tensors in its state
    dict, tied ones counted once; saved, it takes some hundred bytes a tensor more, for the header.

    Raises:
        FileNotFoundError: the directory or one of its shards is not there, or it holds no safetensors.
    """
    if isinstance(model, PreTrainedModel):
        tensors = {_identity(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return sum(file.stat().st_size for file in _weight_files(Path(model)))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two entries of a state dict that are one tensor, tied as one Parameter or by sharing its memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)  # no memory to compare
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in the directory."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; expected one that save_pretrained has written.")
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}: save the model there with save_pretrained."
        )
    names = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in names if not (directory / name).exists())
    if missing:
        raise FileNotFoundError(f"{directory / INDEX} names {missing}, not found there: copy or save the model again.")
    return [directory / name for name in sorted(names)]


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones counted once, and of packed weights, which are none but stand for some."""
    packed = sum(module.packed_weights for module in model.modules() if isinstance(module, CompactLinear))
    return packed + sum(parameter.numel() for parameter in model.parameters())
