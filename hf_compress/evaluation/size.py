"""How large and how fast a model is: stored bytes, parameters, tokens per second."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import inference
from hf_compress.calibration.vocabulary import position_limit
from hf_compress.checks import check
from hf_compress.modules.compact import CompactLinear

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MEDIAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean, for normal samples


@dataclass(frozen=True)
class Throughput:
    """Prefill speed: tokens per second through one forward pass without a cache.

    It depends on the machine and on what else runs on it. Compare it only within one run, or use `speed_ratio`.

    Attributes:
        tokens_per_second: Median over `repeats` timed passes.
        standard_error: Of that median, as for normally distributed times (1.25 * s / sqrt(repeats)); NaN for one pass.
        batch_size: Sequences in a pass.
        length: Tokens in a sequence.
        repeats: Timed passes.
    """

    tokens_per_second: float
    standard_error: float
    batch_size: int
    length: int
    repeats: int


@dataclass(frozen=True)
class SpeedRatio:
    """How many times as fast model A is as model B, timed in turn: A B A B ….

    Attributes:
        value: Median over the pairs of (time of B / time of A); above 1 where A is the faster.
        standard_error: Of that median, as for normally distributed ratios; NaN for one pair.
        pairs: Number of pairs.
    """

    value: float
    standard_error: float
    pairs: int


def stored_bytes(model: PreTrainedModel | str | Path) -> int:
    """Bytes that a model's weights take.

    Of a directory: the sizes of the safetensors files that `from_pretrained` reads there (`model.safetensors`, or else
    the shards that its index names), file headers included. Of a live model: the bytes of the tensors in its state
    dict, tied ones counted once; saved, it takes some hundred bytes a tensor more, for the header.

    Raises:
        FileNotFoundError: the directory or one of its shards is not there, or it holds no safetensors.
    """
    if isinstance(model, PreTrainedModel):
        tensors = {_identity(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return sum(file.stat().st_size for file in _weight_files(Path(model)))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two entries of a state dict that are one tensor, tied as one Parameter or by sharing its memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)  # no memory to compare
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in the directory."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; expected one that save_pretrained has written.")
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}: save the model there with save_pretrained."
        )
    names = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in names if not (directory / name).exists())
    if missing:
        raise FileNotFoundError(f"{directory / INDEX} names {missing}, not found there: copy or save the model again.")
    return [directory / name for name in sorted(names)]


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones counted once, and of packed weights, which are none but stand for some."""
    packed = sum(module.packed_weights for module in model.modules() if isinstance(module, CompactLinear))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def tokens_per_second(
    model: PreTrainedModel, *, length: int = 256, batch_size: int = 1, repeats: int = 5, seed: int = 0
) -> Throughput:
    """Time forward passes over random tokens, after one pass to warm up.

    Args:
        model: A causal language model, timed on its device and in its dtype.
        length: Tokens in a sequence; as many as the model has positions, where those are fewer.
        batch_size: Sequences in a pass.
        repeats: Timed passes.
        seed: Of the random tokens.

    Raises:
        ValueError: a number below 1.
    """
    ids = _random_tokens([model], length, batch_size, repeats, seed)
    with inference(model):
        run = _runner(model, ids)
        run()
        speeds = [ids.numel() / run() for _ in range(repeats)]
    return Throughput(statistics.median(speeds), _median_error(speeds), batch_size, ids.shape[1], repeats)


def speed_ratio(
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    *,
    length: int = 256,
    batch_size: int = 1,
    repeats: int = 9,
    seed: int = 0,
) -> SpeedRatio:
    """How many times as fast A is as B on the same tokens, in turn, so that a busy machine slows both alike.

    Arguments and errors are those of `tokens_per_second`; `length` is cut to the positions that both models have, and
    the tokens are from the smaller of their vocabularies.
    """
    ids = _random_tokens([model_a, model_b], length, batch_size, repeats, seed)
    with inference(model_a), inference(model_b):
        run_a, run_b = _runner(model_a, ids), _runner(model_b, ids)
        run_a(), run_b()
        ratios = []
        for _ in range(repeats):
            seconds = run_a()
            ratios.append(run_b() / seconds)
    return SpeedRatio(statistics.median(ratios), _median_error(ratios), repeats)


def _random_tokens(models: Sequence[PreTrainedModel], length: int, batch_size: int, repeats: int, seed: int) -> Tensor:
    """Token ids (batch_size × length, cut to the positions that every model has) from what is in every vocabulary."""
    for name, value in {"length": length, "batch_size": batch_size, "repeats": repeats}.items():
        check(name, value, int, "[1, inf)")
    length = min(length, *(position_limit(model.config) or length for model in models))
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def _runner(model: PreTrainedModel, ids: Tensor) -> Callable[[], float]:
    """A function that passes the ids through the model once and returns the seconds that it took."""
    ids = ids.to(computing_device(model))
    mask = torch.ones_like(ids)

    def wait() -> None:
        if ids.device.type != "cpu":  # accelerators work on while Python runs ahead
            torch.accelerator.synchronize(ids.device)

    def run() -> float:
        wait()
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        wait()
        return time.perf_counter() - start

    return run


def _median_error(samples: list[float]) -> float:
    """Standard error of the samples' median, taking them as normally distributed; NaN for a single one."""
    if len(samples) < 2:
        return math.nan
    return MEDIAN_ERROR * statistics.stdev(samples) / math.sqrt(len(samples))
