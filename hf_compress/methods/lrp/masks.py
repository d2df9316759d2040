"""Which weights stay, by their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial

import torch
from torch import Tensor, nn

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.processes import from_one
from hf_compress.methods.base.amounts import share_of
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.modules.sparse import pack_mask, unpack_mask
from hf_compress.numerics.aside import Aside
from hf_compress.numerics.selection import best, best_of_all


class Masks(Mapping[str, Tensor]):
    """Masks by the path of their linear map, bool (outputs, inputs); put aside, in a bit a weight, until asked for."""

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self._packed: dict[str, tuple[Tensor, torch.Size, torch.device]] = {}

    def add(self, path: str, mask: Tensor) -> None:
        """Put a mask aside."""
        self._packed[path] = self._aside.put(pack_mask(mask)), mask.shape, mask.device

    def state(self) -> dict[str, Tensor]:
        """The packed masks, by their shapes and paths."""
        return {f"{'x'.join(map(str, shape))}/{path}": packed for path, (packed, shape, _) in self._packed.items()}

    @staticmethod
    def of(state: Mapping[str, Tensor], linears: Mapping[str, nn.Module], aside: Aside) -> Masks:
        """The inverse of `state`; masks come where the linear maps are."""
        found = Masks(aside)
        for name, packed in state.items():
            sizes, path = name.split("/", 1)
            found._packed[path] = packed, torch.Size(map(int, sizes.split("x"))), computing_device(linears[path])
        return found

    def __getitem__(self, path: str) -> Tensor:
        packed, shape, device = self._packed[path]
        return unpack_mask(packed.to(device), shape)

    def __contains__(self, path: object) -> bool:
        return path in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def kept_weights(
    config: LRPConfig, linears: Mapping[str, nn.Module], scores: Iterable[MutableMapping[str, Tensor]], aside: Aside
) -> Masks:
    """Masks of the weights that stay, by the path of the linear map.

    Args:
        linears: all that there are scores of.
        scores: of some of them at a time, which are taken out as the masks are made.
        aside: where masks go, and scores too, as long as those of other maps are needed as well.

    Raises:
        ValueError: nothing of a linear map would be left, or its inputs do not come in groups of m.
    """
    share = 1 - config.removed
    make = _maker(config, share)
    found = ((path, part.pop(path)) for part in scores for path in list(part))
    if make is None:
        masks = _across(config, linears, found, share)
    else:
        masks = ((path, from_one(partial(make, path, values))) for path, values in found)
    kept = Masks(aside)
    for path, mask in masks:
        if not bool(mask.any()):
            raise ValueError(
                f"no weight of {path} would be left: lower sparsity, or compare within layers (scope=); the paper's "
                "variant takes another target= or other data"
            )
        kept.add(path, mask)
    return kept


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


def _across(
    config: LRPConfig, linears: Mapping[str, nn.Module], scores: Iterable[tuple[str, Tensor]], share: float
) -> Iterator[tuple[str, Tensor]]:
    """The best share of all weights together; or of all outputs, by the sums of their scores."""
    rows, aside = config.granularity == "row", working_memory().aside()
    compared, shapes, devices = {}, {}, {}
    for path, values in scores:
        shapes[path], devices[path] = values.shape, values.device
        compared[path] = aside.put(values.sum(dim=1, keepdim=True) if rows else values)
    parts = [compared.pop(path) for path in linears]
    total = sum(part.numel() for part in parts)
    masks = best_of_all(parts, share_of(total, share))
    for path in linears:
        mask = from_one(partial(next, masks))
        yield path, mask.expand(shapes[path]).to(devices[path])


def _n_of_m(path: str, values: Tensor, n: int, m: int) -> Tensor:
    if values.shape[1] % m:
        raise ValueError(f"{path} reads {values.shape[1]} inputs, which do not come in groups of {m}: change pattern=")
    return best(values.reshape(-1, m), n).view_as(values)
