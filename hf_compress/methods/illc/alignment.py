"""Widths that kernels like: they compute with tiles, and a width that ends within one costs as much as the next."""

from __future__ import annotations

import math

from hf_compress.anatomy.parts import FFN
from hf_compress.methods.illc.config import ILLCConfig

_TILE = 64  # units; no kernel of today gains by more
_SHARE = 64  # a tile is at most one part in so many of an FFN, so that rounding to it takes no one's share away
_NARROW = 1024  # units; of narrower FFNs no kernel takes long, and shares are kept to the unit
_EXPERTS = 8  # units: what grouped kernels want of experts, in half precision


def tile_of(config: ILLCConfig, ffn: FFN) -> int:
    """What the widths of an FFN are multiples of.

    Raises:
        ValueError: `align` is more than its width.
    """
    if config.align is not None:
        if config.align > ffn.width:
            raise ValueError(f"align={config.align} is more than the {ffn.width} hidden units that there are")
        return config.align
    tile = 1 if ffn.width < _NARROW else 2 ** int(math.log2(ffn.width / _SHARE))
    if ffn.kind == "experts" and ffn.width % _EXPERTS == 0:
        tile = max(_EXPERTS, tile)
    return min(_TILE, tile)


def aligned(share: float, tile: int, width: int) -> int:
    """The multiple of a tile that is nearest to a share of a width: at least one, and not more than there is."""
    return min(width, tile * max(1, math.floor(share / tile + 0.5)))
