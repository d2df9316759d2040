"""Which weights stay, by their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.modules.sparse import pack_mask, unpack_mask
from hf_compress.numerics.selection import best, best_of_all


class Masks(Mapping[str, Tensor]):
    """Masks by the path of their linear map, bool (outputs, inputs), in a bit a weight until they are asked for."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, torch.Size]] = {}

    def add(self, masks: MutableMapping[str, Tensor]) -> None:
        """Pack masks, which are taken out."""
        for path in list(masks):
            mask = masks.pop(path)
            self._packed[path] = pack_mask(mask), mask.shape

    def __getitem__(self, path: str) -> Tensor:
        return unpack_mask(*self._packed[path])

    def __contains__(self, path: object) -> bool:
        return path in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def kept_weights(config: LRPConfig, scores: MutableMapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that stay, bool (outputs, inputs), by the path of the linear map.

    Args:
        scores: taken out as the masks are made, so that there is never all of both in memory.

    Raises:
        ValueError: nothing of a linear map would be left, or its inputs do not come in groups of m.
    """
    share = 1 - config.removed
    make = _maker(config, share)
    if make is None:
        masks = _rows_across(scores, share) if config.granularity == "row" else _across(scores, share)
        scores.clear()
    else:
        masks = {path: make(path, scores.pop(path)) for path in list(scores)}
    for path, mask in masks.items():
        if not bool(mask.any()):
            raise ValueError(
                f"no weight of {path} would be left: lower sparsity, or compare within layers (scope=); the paper's "
                "variant takes another target= or other data"
            )
    return masks


def compares_maps(config: LRPConfig) -> bool:
    """Whether weights are compared across linear maps, so that no mask is made before all scores are there."""
    return _maker(config, 1.0) is None


def _maker(config: LRPConfig, share: float) -> Callable[[str, Tensor], Tensor] | None:
    """What makes a mask of a linear map's path and scores; None where all maps are compared."""
    if config.variant == "paper":
        return lambda path, values: values > 0
    if config.granularity == "n:m":
        return lambda path, values: _n_of_m(path, values, *config.pattern)
    if config.scope == "model":
        return None
    if config.granularity == "row":
        return lambda path, values: _whole(best(values.sum(dim=1)[None], share_of(len(values), share))[0], values)
    if config.scope == "row":
        return lambda path, values: best(values, share_of(values.shape[1], share))
    return lambda path, values: best(values.flatten()[None], share_of(values.numel(), share)).view_as(values)


def _whole(rows: Tensor, values: Tensor) -> Tensor:
    return rows[:, None].expand_as(values)


def _rows_across(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Whole outputs by the sums of their scores, across the model."""
    kept = _across({path: values.sum(dim=1)[None] for path, values in scores.items()}, share)
    return {path: _whole(kept[path][0], values) for path, values in scores.items()}


def _across(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The best share of all scores together."""
    total = sum(values.numel() for values in scores.values())
    return dict(zip(scores, best_of_all(list(scores.values()), share_of(total, share)), strict=True))


def _n_of_m(path: str, values: Tensor, n: int, m: int) -> Tensor:
    if values.shape[1] % m:
        raise ValueError(f"{path} reads {values.shape[1]} inputs, which do not come in groups of {m}: change pattern=")
    return best(values.reshape(-1, m), n).view_as(values)
