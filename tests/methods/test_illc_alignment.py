"""Widths of FFNs in multiples that kernels like."""

import pytest

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.parts import FFN
from hf_compress.methods.illc.alignment import aligned, tile_of


@pytest.mark.parametrize(
    ("width", "kind", "asked", "tile"),
    [
        (704, "gated", None, 1),
        (1024, "plain", None, 16),
        (4864, "gated", None, 64),
        (14_336, "gated", None, 64),
        (64, "experts", None, 8),
        (60, "experts", None, 1),
        (704, "gated", 32, 32),
    ],
)
def test_widths_are_multiples_of_what_kernels_like(width, kind, asked, tile):
    config = hfc.ILLCConfig(ratio=0.3, align=asked)
    assert tile_of(config, FFN(kind, (), None, width)) == tile
    for share in (0.01, 0.3, 0.5, 0.999):
        kept = aligned(share * width, tile, width)
        assert kept % tile == 0
        assert 1 <= kept <= width
        assert abs(kept - share * width) <= tile / 2 or kept == tile


def widths_of(model):
    """Hidden units of each block's FFN."""
    anatomy = Anatomy(model)
    return [anatomy.parts(anatomy.stack(), index).ffn.width for index in range(len(anatomy.stack()))]


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_alignment_of_a_model(model, calibration, allocation):
    whole = widths_of(model)
    hfc.compress(model, hfc.ILLCConfig(ratio=0.4, align=6, allocation=allocation), calibration)
    widths = widths_of(model)
    assert all(width % 6 == 0 or width == full for width, full in zip(widths, whole, strict=True))
    assert sum(widths) <= 0.6 * sum(whole)


def test_alignment_that_cannot_be(model, calibration):
    with pytest.raises(ValueError, match="width=10 is no multiple of align=4"):
        hfc.ILLCConfig(width=10, align=4)
    with pytest.raises(ValueError, match=r"align=64 is more than the \d+ hidden units"):
        hfc.compress(model, hfc.ILLCConfig(ratio=0.5, align=64), calibration)
