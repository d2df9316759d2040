"""What LRP has to do."""

from __future__ import annotations

from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.work import BACKWARD, Share, Work, gram, inverse, linear_sizes, share_of_tokens, solve
from hf_compress.methods.lrp.config import BITS, STRUCTURED, LRPConfig
from hf_compress.methods.lrp.error_costs import WEIGHED
from hf_compress.methods.lrp.scores import part_of_tokens

_PER_SAMPLE = 2  # passes that the sizes of relevance take besides: a product a sample for every weight
_ITERATIONS = 9  # of conjugate gradients, for pruned weights; most of them at twice the speed
_ROUND = 10  # multiplications' worth of time that trying one number of bits on a weight takes


def work_of(config: LRPConfig, context: CalibrationContext) -> Work:
    """Scores, bits, and streams past every block with sums and solutions for each linear map."""
    stack = context.stack(config.stack)
    data, sizes = share_of_tokens(context, config.tokens), linear_sizes(stack)
    work = Work()
    if config.prunes or config.split is not None:
        relevant = config.score_name in ("relevance", "signed")
        kept = data.of_all if relevant else 0.0
        work += Work(_scoring(config, data), sweeps=2 if relevant else 1, streams=kept)
    if config.split is not None:
        return work + Work(sweeps=1)
    if config.quantizes:
        work += _bits(config, context, sizes)
    if config.solves or config.quantizes:
        work += Work(2 * data.of_all, _solving(config, data, sizes), sweeps=1)
    return work


def _scoring(config: LRPConfig, data: Share) -> float:
    """Passes that the scores take."""
    if config.score_name not in ("relevance", "signed"):
        return data.of_all if config.score_name == "wanda" else 0.0
    return data.of_all * (1 + BACKWARD + (0 if config.granularity in STRUCTURED else _PER_SAMPLE))


def _relevance_for_bits(config: LRPConfig, data: Share) -> float:
    """Passes that slopes take, where they are not known from the scores."""
    known = config.prunes and config.score_name == "relevance"
    return 0.0 if known else data.of_all * (1 + BACKWARD + _PER_SAMPLE)


def _bits(config: LRPConfig, context: CalibrationContext, sizes: list[tuple[int, int]]) -> Work:
    data = share_of_tokens(context, config.tokens)
    part = share_of_tokens(context, part_of_tokens(context, config.tokens, WEIGHED))
    tried = sum(inputs * outputs for inputs, outputs in sizes) * len(BITS) * _ROUND
    if config.allocation == "relevance":
        return Work(_relevance_for_bits(config, data), tried, sweeps=2, streams=data.of_all)
    if config.allocation != "fisher":
        return Work(0.0, tried, sweeps=2)
    weighed = sum(gram(inputs, part.tokens) + inverse(inputs) for inputs in _read(sizes))
    return Work(part.of_all * (2 + BACKWARD), tried + weighed, sweeps=2, streams=part.of_all)


def _solving(config: LRPConfig, data: Share, sizes: list[tuple[int, int]]) -> float:
    sums = sum(gram(inputs, data.tokens) for inputs in _read(sizes))
    if config.quantizes and not config.prunes:
        return sums + sum(inverse(inputs) for inputs in _read(sizes)) + sum(solve(*size) / 2 for size in sizes)
    return sums + _ITERATIONS * sum(solve(*size) for size in sizes)


def _read(sizes: list[tuple[int, int]]) -> list[int]:
    """The widths of what is read, once for neighbouring maps of one width: they read the same, mostly."""
    widths = [inputs for inputs, _ in sizes]
    return [width for number, width in enumerate(widths) if number == 0 or widths[number - 1] != width]
