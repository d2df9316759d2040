"""What tensors and JSON values are known by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b, sha256
from typing import Any

import torch
from torch import Tensor

_PIECE = 2**24  # bytes that are copied at a time


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the shapes, dtypes and bits of tensors, wherever they are, in their order."""
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().contiguous().flatten()
        if values.numel():
            for piece in values.view(torch.uint8).split(_PIECE):
                found.update(piece.cpu().numpy().data)
    return found.hexdigest()


def digest(values: Any) -> str:
    """A hash of JSON values, whatever the order of the keys of mappings."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
