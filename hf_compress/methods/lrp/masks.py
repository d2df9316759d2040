"""Which weights stay, by their scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.lrp.config import LRPConfig


def kept_weights(config: LRPConfig, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that stay, bool (outputs, inputs), by the path of the linear map.

    Raises:
        ValueError: nothing of a linear map would be left, or its inputs do not come in groups of m.
    """
    if config.variant == "paper":
        masks = {path: values > 0 for path, values in scores.items()}
    elif config.granularity == "n:m":
        masks = {path: _n_of_m(path, values, *config.pattern) for path, values in scores.items()}
    elif config.granularity == "row":
        masks = _rows(config, scores)
    else:
        masks = _single(config, scores)
    for path, mask in masks.items():
        if not bool(mask.any()):
            raise ValueError(
                f"no weight of {path} would be left: lower sparsity, or compare within layers (scope=); the paper's "
                "variant takes another target= or other data"
            )
    return masks


def _single(config: LRPConfig, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    share = 1 - config.removed
    if config.scope == "row":
        return {path: _best(values, share_of(values.shape[1], share)) for path, values in scores.items()}
    if config.scope == "layer":
        return {
            path: _best(values.flatten()[None], share_of(values.numel(), share)).view_as(values)
            for path, values in scores.items()
        }
    return _across(scores, share)


def _rows(config: LRPConfig, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole outputs by the sums of their scores; within a layer, or across the model by the means of layers."""
    sums = {path: values.sum(dim=1)[None] for path, values in scores.items()}
    share = 1 - config.removed
    if config.scope == "model":
        kept = _across(sums, share)
    else:
        kept = {path: _best(values, share_of(values.shape[1], share)) for path, values in sums.items()}
    return {path: kept[path][0][:, None].expand_as(values) for path, values in scores.items()}


def _across(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The best share of all scores together."""
    joined = torch.cat([values.flatten() for values in scores.values()])
    kept = _best(joined[None], share_of(len(joined), share))[0]
    parts = kept.split([values.numel() for values in scores.values()])
    return {path: part.view_as(values) for (path, values), part in zip(scores.items(), parts, strict=True)}


def _n_of_m(path: str, values: Tensor, n: int, m: int) -> Tensor:
    if values.shape[1] % m:
        raise ValueError(f"{path} reads {values.shape[1]} inputs, which do not come in groups of {m}: change pattern=")
    return _best(values.reshape(-1, m), n).view_as(values)


def _best(values: Tensor, count: int) -> Tensor:
    """A mask of the `count` best of each row; of equal ones, the first."""
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(1, order, True)
