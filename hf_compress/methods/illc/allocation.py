"""A width for each FFN of its own, from its measured error curve, within one budget of parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hf_compress.anatomy.anatomy import Block
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.processes import total
from hf_compress.calibration.sweep import StreamPair, turns
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.units import HiddenUnits, Run, observe
from hf_compress.methods.illc.alignment import aligned, tile_of
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.reductions import REDUCTIONS

STEPS = 16  # widths that an error curve is measured at: multiples of a sixteenth


def adaptive_widths(
    config: ILLCConfig, context: CalibrationContext, stack: Stack, pairs: list[StreamPair], uniform: dict[int, int]
) -> dict[int, int]:
    """Widths of about as many hidden units in all as the uniform ones, for the least error.

    The curves are those of single FFNs narrowed in the original model. Starting from full width, a sixteenth of a width
    goes where it costs least, again and again, until the budget is met; the last step is cut to fit it, in whole tiles.
    """
    curves = _error_curves(config, context, stack, pairs, uniform)
    tiles = {index: _tile(config, Block(context.model, stack, index)) for index in curves}
    widths = {index: max(curve) for index, curve in curves.items()}
    budget = sum(uniform.values())
    while (excess := sum(widths.values()) - budget) > 0:
        steps = {index: _step(curve, widths[index]) for index, curve in curves.items() if widths[index] > min(curve)}
        cheapest = min(steps, key=lambda index: steps[index][1])
        tile = tiles[cheapest]
        widths[cheapest] = max(steps[cheapest][0], widths[cheapest] - tile * -(-excess // tile))
    return widths


def _tile(config: ILLCConfig, block: Block) -> int:
    ffn = block.parts.ffn
    assert ffn is not None
    return tile_of(config, ffn)


def _step(curve: dict[int, float], width: int) -> tuple[int, float]:
    """The next narrower width on a curve, and what it costs for each unit that goes."""
    narrower = max(w for w in curve if w < width)
    return narrower, (curve[narrower] - curve[min(w for w in curve if w >= width)]) / (width - narrower)


def _error_curves(
    config: ILLCConfig, context: CalibrationContext, stack: Stack, pairs: list[StreamPair], uniform: dict[int, int]
) -> dict[int, dict[int, float]]:
    """Per block, width -> what the compensated FFN leaves unexplained, as a share of the stream that it is added to."""
    streams = [pair.original for pair in pairs]
    curves: dict[int, dict[int, float]] = {}
    for index in turns(stack, range(max(uniform) + 1), "measuring error curves"):
        if index in uniform:
            curves[index], streams = _curve(config, HiddenUnits(Block(context.model, stack, index)), pairs, streams)
        else:
            streams = [pair.runner.run(index, stream) for pair, stream in zip(pairs, streams, strict=True)]
    return curves


def _curve(
    config: ILLCConfig, units: HiddenUnits, pairs: list[StreamPair], streams: list[Tensor]
) -> tuple[dict[int, float], list[Tensor]]:
    """The error curve of one block, and the streams after it."""
    after: list[Tensor] = []
    lengths: list[float] = []  # of the stream: the median of each batch, squared

    def runs() -> Iterator[Run]:
        for pair, stream in zip(pairs, streams, strict=True):
            run = units.run(pair.number, pair.runner, stream)
            after.append(run.after)
            if run.real.any():
                lengths.append(float(run.after[run.real].float().square().sum(-1).median()))
            yield run

    affine = units.biased or config.bias
    row_tokens = config.rows_of_a_batch(round(total(len(pairs))[0])) if config.clusters else 1
    statistics = observe(runs(), lambda place, run: run.written, None, row_tokens, affine)
    length, count = total(sum(lengths), len(lengths))
    energy = statistics.energy / (length / count)
    wide, tile = len(units.writes), _tile(config, units.block)
    widths = sorted({aligned(wide * step / STEPS, tile, wide) for step in range(STEPS)} | {wide})

    curve = {}
    for width in widths:
        reduction = REDUCTIONS.resolve(config.reduction_name)(config, units, statistics, width)
        fit = statistics.take(reduction.inputs()).fit(reduction.columns(units.writes), affine)
        curve[width] = fit.error * energy
    return curve, after
