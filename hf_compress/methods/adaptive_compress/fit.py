"""Fitting bottlenecks to a model that stays as it is: all of them at once, on what passes over the data show of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import StopForward, check_stream, forward, inference, stream_tokens, watch_blocks
from hf_compress.calibration.data import Batch, Calibration, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import here, sharing
from hf_compress.calibration.progress import bar
from hf_compress.checks import check
from hf_compress.errors import CalibrationError
from hf_compress.methods.adaptive_compress.adaptive import Adaptive, Paper
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.kept_rows import KeptRows
from hf_compress.methods.adaptive_compress.learner import Learner, StreamMoments
from hf_compress.methods.adaptive_compress.learner_run import LearnerRun
from hf_compress.methods.adaptive_compress.peers import BatchTopK, Linear, Principal, TopK
from hf_compress.methods.adaptive_compress.progress import Progress
from hf_compress.numerics.defaults import torch_defaults
from hf_compress.rewrite.bottlenecks import Bottlenecks, FittedBottleneck

logger = logging.getLogger(__name__)

LEARNERS: dict[str, type[Learner]] = {
    "default": Adaptive,
    "paper": Paper,
    "pca": Principal,
    "linear": Linear,
    "topk": TopK,
    "batchtopk": BatchTopK,
}
Learn = Callable[[int, Tensor], None]  # takes a layer and its tokens (tokens, hidden)
_FRACTIONS = (0.25, 0.5, 0.75)
START_TOKENS = 200  # a feature, for means and principal directions


@overload
def fit(
    model: PreTrainedModel,
    config: AdaptiveCompressConfig,
    calibration: Any,
    tokenizer: Processor | None = ...,
    options: DataOptions | None = ...,
    *,
    checkpoint: str | Path | None = ...,
    save_every: int = ...,
) -> Bottlenecks: ...
@overload
def fit(
    model: PreTrainedModel,
    config: Sequence[AdaptiveCompressConfig],
    calibration: Any,
    tokenizer: Processor | None = ...,
    options: DataOptions | None = ...,
    *,
    checkpoint: str | Path | None = ...,
    save_every: int = ...,
) -> list[Bottlenecks]: ...
@torch_defaults()
def fit(
    model: PreTrainedModel,
    config: AdaptiveCompressConfig | Sequence[AdaptiveCompressConfig],
    calibration: Any,
    tokenizer: Processor | None = None,
    options: DataOptions | None = None,
    *,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
) -> Bottlenecks | list[Bottlenecks]:
    """Train bottlenecks on the residual stream of a model, which is left as it was.

    In one forward pass a batch, which ends after the last block that is looked at, all bottlenecks behind all blocks
    learn: also those of several configs, which costs a pass of the model but once. In several processes (torchrun)
    each takes its part of the batches, and all come to the same bottlenecks.

    Args:
        model: any whose blocks can be found, in any dtype; bottlenecks are float32.
        config: settings, or several.
        calibration, tokenizer, options: what to train on, as for `compress`.
        checkpoint: a folder to write the state to every `save_every` batches. Where it holds one of the same settings
            and data, training goes on from there.

    Returns:
        The bottlenecks; a list of them for a list of configs.

    Raises:
        ValueError, TypeError: layers that there are not, too little data for the schedule, a checkpoint of another run.
        CalibrationError: activations that are not finite.
    """
    check("save_every", save_every, int, "[1, inf)")
    several = isinstance(config, Sequence)
    configs: list[Any] = list(config) if isinstance(config, Sequence) else [config]
    data = prepare(calibration, model, tokenizer, options)
    found = fit_all(model, configs, data, checkpoint, save_every)
    return found if several else found[0]


@sharing()
def fit_all(
    model: PreTrainedModel,
    configs: Sequence[AdaptiveCompressConfig],
    data: Calibration,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
) -> list[Bottlenecks]:
    """`fit` on data that is prepared."""
    stack = _common_stack(model, configs)
    places = [layers_of(config, stack) for config in configs]
    numbers = _own_share(data)
    for config in configs:
        check_schedule(config, data, len(numbers))
    with inference(model):
        kept = KeptRows()
        moments = stream_moments(model, stack, sorted({i for layers in places for i in layers}), data, configs[0], kept)
        runs = [
            {
                layer: LearnerRun(LEARNERS[config.variant](config, moments[layer], config.seed + layer))
                for layer in layers
            }
            for config, layers in zip(configs, places, strict=True)
        ]
        progress = Progress(checkpoint, runs, configs, model, data, save_every)
        _train(model, stack, runs, configs, {number: data.batches[number] for number in numbers}, kept, progress)
    results = []
    for config, mine in zip(configs, runs, strict=True):
        found = {layer: _fitted(layer, run) for layer, run in mine.items()}
        results.append(Bottlenecks(stack.path, found, config.to_dict(), data.tokens * config.epochs))
    return results


def _train(
    model: PreTrainedModel,
    stack: Stack,
    runs: list[dict[int, LearnerRun]],
    configs: Sequence[AdaptiveCompressConfig],
    batches: Mapping[int, Batch],
    kept: KeptRows,
    progress: Progress,
) -> None:
    """Go through the batches as often as each config asks for; a bottleneck that is done, or has stopped, sits out.

    Args:
        batches: of this process, by their numbers among all.
        kept: tokens of some of them, so that the model need not run.
    """
    numbers = list(batches)
    wanted = sorted({layer for mine in runs for layer, run in mine.items() if run.learner.trains})
    rounds = max(config.epochs for config in configs)
    for done in bar(range(progress.done, rounds * len(batches)), "fitting"):
        epoch, place = divmod(done, len(batches))
        active = [
            (config, mine)
            for config, mine in zip(configs, runs, strict=True)
            if epoch < config.epochs and any(run.goes_on for run in mine.values())
        ]
        if not active or not wanted:
            break

        def learn(layer: int, rows: Tensor, active: Any = active, epoch: int = epoch, place: int = place) -> None:
            for config, mine in active:
                if layer in mine:
                    step = (epoch * len(batches) + place) * config.updates
                    mine[layer].learn(rows, step, len(batches) * config.epochs * config.updates)

        number = numbers[place]
        if kept.has(number, wanted):
            for layer in wanted:
                learn(layer, kept.of(number, layer))
        else:
            watch_rows(model, stack, wanted, batches[number], configs[0].outliers, learn)
        progress.batch_done(done + 1)


def watch_rows(
    model: PreTrainedModel,
    stack: Stack,
    layers: Sequence[int],
    batch: Batch,
    outliers: float,
    learn: Learn,
    keep: Learn | None = None,
) -> None:
    """A forward pass as far as the last of the layers; `learn(layer, rows)` gets the real tokens of each, in float32.

    Tokens of many times the median norm, on which attention rests, would outweigh all others: they are left out.

    Args:
        keep: what takes the tokens as well, in the model's dtype.
    """

    def watch(index: int, before: Tensor, after: Tensor) -> None:
        if index not in layers:
            return
        check_stream(stack, index, before, after)
        rows = ordinary(after[stream_tokens(stack, batch, after)].float(), outliers)
        if keep is not None:
            keep(index, rows.to(after.dtype))
        learn(index, rows)
        if index == layers[-1]:
            raise StopForward

    with watch_blocks(stack, watch):
        forward(model, batch)


def ordinary(rows: Tensor, outliers: float) -> Tensor:
    """Rows (tokens, hidden) of at most `outliers` times their median norm."""
    norms = rows.norm(dim=1)
    return rows[norms <= outliers * norms.median()] if len(rows) else rows


def stream_moments(
    model: PreTrainedModel,
    stack: Stack,
    layers: Sequence[int],
    data: Calibration,
    config: AdaptiveCompressConfig,
    kept: KeptRows | None = None,
) -> dict[int, StreamMoments]:
    """Of each layer, from as many batches, spread over the data, as principal directions need.

    Args:
        kept: where to put the tokens as well.
    """
    moments: dict[int, StreamMoments] = {}
    missing = list(layers)

    def learn(layer: int, rows: Tensor) -> None:
        if layer not in moments:
            moments[layer] = StreamMoments(rows.shape[1], rows.device)
        own = moments[layer]
        own.update(rows)
        if own.raw.count >= START_TOKENS * rows.shape[1]:
            missing.remove(layer)

    for number in _spread_order(len(data)):
        if not missing:
            break
        keep = None if kept is None else partial(kept.put, number)
        watch_rows(model, stack, tuple(missing), data.batches[number], config.outliers, learn, keep)
    for layer, own in moments.items():
        tokens, hidden = int(own.raw.count), own.raw.inputs
        if tokens < hidden:
            raise CalibrationError(
                f"{tokens} tokens behind block {layer} are too few to tell {hidden} features apart: pass at least "
                f"{hidden}, better {START_TOKENS * hidden}"
            )
    return moments


def _spread_order(count: int) -> list[int]:
    """0 to count - 1 in such an order that any beginning of it is spread over the whole."""
    stride = next(s for s in range(max(1, int(count * 0.618)), count + 1) if math.gcd(s, count) == 1 or count == 1)
    return [number * stride % count for number in range(count)]


def layers_of(config: AdaptiveCompressConfig, stack: Stack) -> list[int]:
    """The blocks that a config names, in rising order; ValueError where there are no such."""
    if config.layers is not None:
        if missing := [layer for layer in config.layers if layer >= len(stack)]:
            raise ValueError(f"layers names block {missing[0]}; {stack.path} has the blocks 0 to {len(stack) - 1}")
        return sorted(config.layers)
    found = [max(0, math.ceil(share * len(stack) - 1e-9) - 1) for share in config.fractions or _FRACTIONS]
    if config.fractions is not None and len(set(found)) < len(found):
        raise ValueError(
            f"fractions {list(config.fractions)} name a block twice: of {len(stack)} blocks they are {found}; say "
            "layers= instead"
        )
    return sorted(set(found))


def check_schedule(config: AdaptiveCompressConfig, data: Calibration, batches: int) -> None:
    """Raise unless the data lasts to the end of the retention schedule."""
    if config.variant not in ("default", "paper"):
        return
    each = batches * config.updates  # steps an epoch
    if _lasts(config, each * config.epochs):
        return
    needed = next(steps for steps in count(1) if _lasts(config, steps))
    warmup, decay = config.phases(needed)
    largest = max(int(batch.real.sum()) if batch.real is not None else 0 for batch in data)
    tokens = math.ceil(needed / config.updates / config.epochs) * here()[1] * largest
    raise CalibrationError(
        f"{warmup} steps of warm-up and {decay} of decay need about {tokens:,} tokens; {data.tokens:,} make "
        f"{each * config.epochs} steps: pass more data, go through it epochs={math.ceil(needed / each)} times, or "
        "shorten the schedule"
    )


def _lasts(config: AdaptiveCompressConfig, steps: int) -> bool:
    return sum(config.phases(steps)) <= steps


def _common_stack(model: PreTrainedModel, configs: Sequence[AdaptiveCompressConfig]) -> Stack:
    from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig

    if not configs or not all(isinstance(config, AdaptiveCompressConfig) for config in configs):
        raise TypeError(f"config must be an AdaptiveCompressConfig, or a list of them; got {configs!r}"[:200])
    if len({(config.stack, config.outliers) for config in configs}) > 1:
        raise ValueError("configs that are fitted together must have the same stack= and outliers=")
    return Anatomy(model).stack(configs[0].stack)


def _own_share(data: Calibration) -> list[int]:
    """The numbers of this process's batches; in every process as many, or they would wait for each other."""
    rank, world = here()
    share = len(data) // world
    if not share:
        raise CalibrationError(f"{len(data)} batches are too few for {world} processes: pass more data, or less each")
    return list(range(rank, share * world, world))


def _fitted(layer: int, run: LearnerRun) -> FittedBottleneck:
    if run.stopped:
        logger.warning("the bottleneck behind block %d %s", layer, run.stopped)
    module, kept = run.finished()
    return FittedBottleneck(module, run.learner.importance, kept, run.curve, run.stopped)
