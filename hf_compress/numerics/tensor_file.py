"""Tensors and facts about them in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write tensors, and facts as JSON, to a file of this name in a folder that there is.

    It is on the disk, not only on its way there, before it has its name. What fails leaves nothing behind.

    Raises:
        OSError: there is no room, or it cannot be written for another reason.
    """
    partial = path.with_suffix(".partial")
    own = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    try:
        save_file(own, partial, metadata={"hf_compress": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # which does not say that it is one of these
            raise OSError(str(error)) from error
        raise


def read_tensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The facts and the tensors that `write_tensors` wrote; no facts ({}) of a file that others did."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("hf_compress", "{}"))
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those copied that overlap with one before them in memory: safetensors refuses such."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end and tensor.numel():
            tensors[name] = tensor.clone()
        end = max(end, start + tensor.nbytes)
    return tensors
