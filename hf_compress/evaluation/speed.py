"""How fast a model is: tokens per second, and what a user waits for; several models in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import inference
from hf_compress.calibration.vocabulary import position_limit
from hf_compress.checks import check
from hf_compress.evaluation.kinds import reads_tokens_alone
from hf_compress.evaluation.running_memory import peak_growth
from hf_compress.evaluation.size import stored_bytes

MEDIAN_ERROR = math.sqrt(math.pi / 2)  # standard error of a median over that of a mean, for normal samples
_SPECIAL = ("_token_id", "_token_index")  # config fields: some stand for pictures, which are not there


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


@dataclass(frozen=True)
class Speed:
    """What a model does with a prompt of random tokens, one sequence at a time, in each of several rounds.

    It depends on the machine and on what else runs on it; only models of one call of `speeds_in_turn` can be compared.

    Attributes:
        prompt: Tokens of the prompt.
        new_tokens: Tokens generated after it, greedily, with the cache; 0 for models that do not generate.
        first_token: Seconds from the prompt to the first new token, of each round; without new tokens, to the output.
        per_second: New tokens per second after the first, of each round; none without new tokens.
        memory: Bytes of the weights and of the most that one run needs beside them: on a CPU the growth of the
            process's anonymous memory (Linux; sampled, so that short peaks may be missed), on CUDA what PyTorch's
            allocator counts. None elsewhere.
    """

    prompt: int
    new_tokens: int
    first_token: tuple[float, ...]
    per_second: tuple[float, ...]
    memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with medians and their standard errors beside the rounds."""
        content = asdict(self)
        for name in ("first_token", "per_second"):
            samples = getattr(self, name)
            content[f"{name}_median"], content[f"{name}_standard_error"] = median(samples) if samples else (None, None)
        return content


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


def speeds_in_turn(
    models: Sequence[PreTrainedModel], *, prompt: int = 256, new_tokens: int = 32, rounds: int = 5, seed: int = 0
) -> list[Speed]:
    """Have models read the same prompt and go on with it, in turn, A B A B …, so that a busy machine slows all alike.

    Each runs twice before: to warm up, and for the memory, which is not watched while time is taken. Where one of the
    models does not generate, all only read.

    Args:
        models: Models that run on token ids alone, on their devices and in their dtypes.
        prompt: Tokens of the prompt; with the new ones as many as all models have positions, where those are fewer.
        new_tokens: Tokens to generate.
        rounds: Timed runs of each.
        seed: Of the prompt.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in {"new_tokens": new_tokens, "rounds": rounds}.items():
        check(name, value, int, "[1, inf)")
    positions = min(position_limit(model.config) or prompt + new_tokens for model in models)
    new_tokens = min(new_tokens, max(1, positions // 2)) if all(map(generates, models)) else 0
    ids = _random_tokens(models, min(prompt, max(1, positions - new_tokens)), 1, rounds, seed)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(inference(model))
        runs = [_generation(model, ids, new_tokens) if new_tokens else _reading(model, ids) for model in models]
        for run in runs:
            run()
        memory = [_memory(model, run) for model, run in zip(models, runs, strict=True)]
        timed: list[list[list[float]]] = [[] for _ in models]
        for _ in range(rounds):
            for samples, run in zip(timed, runs, strict=True):
                samples.append(run())
    return [
        Speed(
            prompt=ids.shape[1],
            new_tokens=new_tokens,
            first_token=tuple(times[0] for times in samples),
            per_second=tuple((len(times) - 1) / (times[-1] - times[0]) for times in samples if len(times) > 1),
            memory=taken,
        )
        for samples, taken in zip(timed, memory, strict=True)
    ]


def generates(model: PreTrainedModel) -> bool:
    """Whether a model goes on with token ids."""
    return reads_tokens_alone(model) and model.can_generate()


def median(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error as for normally distributed samples; NaN for a single one."""
    return statistics.median(samples), _median_error(samples)


def median_ratio(samples: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The median over the rounds of one model's sample over the other's, and its standard error."""
    return median([mine / theirs for mine, theirs in zip(samples, others, strict=True)])


class _Clock(BaseStreamer):
    """Notes when each new token comes, as one sees who reads along."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter() - self.start)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def _generation(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Callable[[], list[float]]:
    """A function that generates, and gives the seconds until each new token."""
    ids = ids.to(computing_device(model))
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # whatever the model would say, no early end
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
    )

    def run() -> list[float]:
        _wait(ids.device)
        clock = _Clock()
        generate: Any = model.generate
        generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
        return clock.times

    return run


def _reading(model: PreTrainedModel, ids: Tensor) -> Callable[[], list[float]]:
    """A function that passes the prompt through the model, and gives the seconds that it took, as the only entry."""
    run = _runner(model, ids)
    return lambda: [run()]


def _memory(model: PreTrainedModel, run: Callable[[], object]) -> int | None:
    """Bytes of the weights and of what a run needs beside them; None where it cannot be seen."""
    with peak_growth(computing_device(model)) as growth:
        run()
    return None if growth.bytes is None else stored_bytes(model) + growth.bytes


def _random_tokens(models: Sequence[PreTrainedModel], length: int, batch_size: int, repeats: int, seed: int) -> Tensor:
    """Token ids (batch_size × length, cut to the positions that every model has) from what is in every vocabulary."""
    for name, value in {"length": length, "batch_size": batch_size, "repeats": repeats}.items():
        check(name, value, int, "[1, inf)")
    length = min(length, *(position_limit(model.config) or length for model in models))
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    named = [value for model in models for name, value in vars(model.config).items() if name.endswith(_SPECIAL)]
    special = {token for value in named for token in (value if isinstance(value, list | tuple) else [value])}
    plain = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
    picked = torch.randint(len(plain), (batch_size, length), generator=torch.Generator().manual_seed(seed))
    return plain[picked]


def _runner(model: PreTrainedModel, ids: Tensor) -> Callable[[], float]:
    """A function that passes the ids through the model once and returns the seconds that it took."""
    ids = ids.to(computing_device(model))
    mask = torch.ones_like(ids)

    def run() -> float:
        _wait(ids.device)
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        _wait(ids.device)
        return time.perf_counter() - start

    return run


def _wait(device: torch.device) -> None:
    if device.type != "cpu":  # accelerators work on while Python runs ahead
        torch.accelerator.synchronize(device)


def _median_error(samples: Sequence[float]) -> float:
    """Standard error of the samples' median, taking them as normally distributed; NaN for a single one."""
    if len(samples) < 2:
        return math.nan
    return MEDIAN_ERROR * statistics.stdev(samples) / math.sqrt(len(samples))
