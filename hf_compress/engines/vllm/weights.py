"""Weights of a checkpoint as matrices, while they are read: what vLLM, which splits and fuses them, needs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_compress.engines.vllm.structure import Structure
from hf_compress.errors import PlanError
from hf_compress.modules.compact import CompactLinear
from hf_compress.rewrite.record import rebuild_structure

logger = logging.getLogger(__name__)


def written_out(
    weights: Iterable[tuple[str, Tensor]], structure: Structure, config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name, with matrices in the place of packed and sparse weights, and without seals.

    Args:
        weights: as they are stored.
        config: of the model, without the record.
        dtype: that vLLM computes in.

    Raises:
        PlanError: the record does not fit the model, or tensors of a packed weight are missing.
    """
    waiting = stored_maps(structure, config) if structure.stored else {}
    if waiting:
        logger.warning("%d packed or sparse linear maps are computed with as dense matrices", len(waiting))
    sealed = tuple(f"{seal.module}." for seal in structure.seals)
    for name, tensor in weights:
        path, _, part = name.rpartition(".")
        if path in waiting and part in waiting[path].parts:
            stored = waiting[path]
            if stored.take(part, tensor):
                yield f"{path}.weight", waiting.pop(path).matrix(dtype)
        elif not name.startswith(sealed):
            yield name, tensor
        elif path.endswith(".inner"):  # the other has no entries
            yield f"{path.removesuffix('.inner')}.{part}", tensor
    if waiting:
        path, stored = next(iter(waiting.items()))
        raise PlanError(f"the files do not have {path}.{min(stored.parts)}, which config.json asks for")


class StoredMap:
    """A linear map whose tensors come one by one.

    Args:
        compact: it, on the meta device.
        transposed: whether the model's class has its matrix the other way round.

    Attributes:
        parts: names of the tensors that have not come.
    """

    def __init__(self, compact: CompactLinear, transposed: bool) -> None:
        self._compact, self._transposed = compact, transposed
        self.parts = {name for name in compact.state_dict() if name != "bias"}

    def take(self, part: str, tensor: Tensor) -> bool:
        """Put a tensor in its place; whether it was the last.

        Raises:
            PlanError: it has another shape than the record says.
        """
        there = self._compact.state_dict()[part]
        if there.shape != tensor.shape:
            raise PlanError(f"{part} of a stored linear map is {tuple(tensor.shape)}; expected {tuple(there.shape)}")
        parameter = isinstance(getattr(self._compact, part), nn.Parameter)
        setattr(self._compact, part, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)
        self.parts.remove(part)
        return not self.parts

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What it computes with, as the model's class has it."""
        with torch.no_grad():
            dense = self._compact.dense(dtype)
        return dense.T.contiguous() if self._transposed else dense


def stored_maps(structure: Structure, config: PreTrainedConfig) -> dict[str, StoredMap]:
    """The linear maps that are stored in another form, by the paths that they have in the checkpoint."""
    kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if kind is None:
        raise PlanError(f"config.json: architectures is {config.architectures}, no class of Transformers")
    plain = copy.deepcopy(config)
    plain._attn_implementation = "eager"  # vLLM's own is not needed, and not known everywhere
    with torch.device("meta"):
        model = kind._from_config(plain, dtype=config.dtype)
    rebuild_structure(model, structure.edits)
    transposed = {path for path, module in model.named_modules() if isinstance(module, Conv1D)}
    rebuild_structure(model, structure.stored)
    compact = {path: module for path, module in model.named_modules() if isinstance(module, CompactLinear)}
    return {path: StoredMap(module, path in transposed) for path, module in compact.items()}
