"""Perplexity of a causal language model on texts: token-weighted, in strided windows, with a standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.calibration.capture import inference
from hf_compress.calibration.padding import pad_id
from hf_compress.calibration.progress import meter
from hf_compress.calibration.reading import read_texts
from hf_compress.calibration.vocabulary import position_limit
from hf_compress.checks import check
from hf_compress.evaluation.kinds import check_predicts_text

LONGEST = 2048  # tokens: the context that perplexities are usually compared at


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, how sure it is, and what it was measured on.

    Attributes:
        value: exp(`loss`).
        loss: Mean negative log-likelihood over all scored tokens, in nats per token.
        loss_standard_error: Standard error of `loss`, in nats. Tokens of one document are not independent, so whole
            documents are the sampling unit (one-stage cluster sample, ratio estimator): with s_d and n_d the summed
            loss and the number of scored tokens of document d, and r_d = s_d - loss * n_d, the variance is
            D / (D - 1) * sum(r_d^2) / N^2. A single document is clustered by its windows instead, which is too
            optimistic where neighbouring windows resemble each other; a single window leaves NaN (not known).
        tokens: Number of scored tokens.
        documents: Number of texts with at least one scored token.
        clustered_by: What the standard error took as independent: "documents" or "windows".
        by_document: Summed loss and number of scored tokens of each document, in the order of the texts.
        tokens_sha256: Of the ids of the scored tokens, which tell another tokenizer; empty where not known.
    """

    value: float
    loss: float
    loss_standard_error: float
    tokens: int
    documents: int
    clustered_by: str
    by_document: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    tokens_sha256: str = field(default="", repr=False)

    @property
    def value_standard_error(self) -> float:
        """Standard error of `value` by the delta method: `value` * `loss_standard_error`."""
        return self.value * self.loss_standard_error

    def loss_difference(self, other: Perplexity) -> tuple[float, float]:
        """By how much this loss is above another model's on the same texts, and the standard error of that.

        Documents differ more than models do, so the error of the difference, document by document, is far below those
        of the two losses. In nats per token.

        Raises:
            ValueError: the two were not measured on the same tokens.
        """
        counts = [count for _, count in self.by_document]
        digests = {self.tokens_sha256, other.tokens_sha256} - {""}
        if len(digests) > 1 or counts != [count for _, count in other.by_document]:
            raise ValueError("the two perplexities are of different texts or tokens, and cannot be compared in pairs")
        gaps = [mine - theirs for (mine, _), (theirs, _) in zip(self.by_document, other.by_document, strict=True)]
        return _ratio(list(zip(gaps, counts, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the documents."""
        content = {name: value for name, value in vars(self).items() if name not in ("by_document", "tokens_sha256")}
        return content | {"value_standard_error": self.value_standard_error}

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.value_standard_error:.2f}"


@dataclass(frozen=True)
class Window:
    """A stretch of one document that goes through the model at once.

    Attributes:
        document: Which text it is of.
        inputs: Token ids fed to the model.
        targets: For each input the id that follows it, or -100 where that is not to be scored here.
    """

    document: int
    inputs: list[int]
    targets: list[int]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Measure how well the model predicts the texts, each text being a document of its own.

    Every token of a text is scored exactly once, but for special tokens (BOS, EOS, padding and the like; they still
    serve as context) and for the first token of a text to which the tokenizer adds no BOS, which nothing predicts.
    The model's device and dtype are used; the loss is taken in float32 and summed in float64.

    Args:
        model: A causal language model; left in the mode (training or evaluation) that it came in.
        tokenizer: Its tokenizer, used with the special tokens that it adds of itself.
        texts: The documents: a list, or another iterable or a table as for `compress`; of what has no length the first
            4,096 are read. Texts without anything to score (empty ones, say) are left out and not counted.
        max_length: Tokens in a window. Default: as many as the model has positions for, at most 2048.
        stride: New tokens scored in each window; `max_length - stride` tokens before them are context only.
            Default: `max_length`, the cheapest; smaller strides give lower perplexities. Compare only equal ones.
        batch_size: Windows that go through the model at once. It does not change the result beyond rounding.

    Raises:
        TypeError: no tokenizer; `texts` is a single string, or holds something else than strings.
        UnsupportedModelError: a model that does not predict the next token from those before it.
        ValueError: nothing to score, a length that does not fit, a model that is not a causal language model, or a
            loss that is not finite.
    """
    for name, given in {"max_length": max_length, "stride": stride, "batch_size": batch_size}.items():
        check(name, given, int | None, "[1, inf)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; expected the model's own: AutoTokenizer loads it")
    check_predicts_text(model, "perplexity")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; perplexity needs a causal language model.")
    max_length, stride = _lengths(model, tokenizer, max_length, stride)
    unscored = _unscored(tokenizer)
    windows = [
        window
        for document, ids in enumerate(_tokenize(tokenizer, texts))
        for window in _windows(document, ids, max_length, stride, unscored)
    ]
    if not windows:
        raise ValueError(
            "The texts hold no token to score; expected at least one text of two tokens or more: check the file or "
            "column that they come from."
        )
    digest = _digest(windows)
    # The longest first: little padding in a batch, and a batch too large for memory fails at once.
    windows.sort(key=lambda window: len(window.inputs), reverse=True)
    pad = pad_id(model.config, tokenizer)
    sums: list[float] = []
    with inference(model), meter(len(windows), "perplexity", "window") as shown:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            sums += _window_losses(model, batch, pad)
            shown.update(len(batch))
    return replace(_summarise(windows, sums), tokens_sha256=digest)


def _lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None, stride: int | None
) -> tuple[int, int]:
    """`max_length` and `stride` with their defaults, checked against the model and each other."""
    # A tokenizer that does not know its model's length says some huge number.
    limits = (position_limit(model.config), tokenizer.model_max_length)
    positions = min((limit for limit in limits if limit is not None and limit < 10**9), default=None)
    if max_length is None:
        max_length = min(positions or LONGEST, LONGEST)
    elif positions is not None and max_length > positions:
        raise ValueError(
            f"max_length is {max_length}, but the model or its tokenizer takes at most {positions} tokens: use that "
            "or fewer."
        )
    stride = max_length if stride is None else stride
    if stride > max_length:
        raise ValueError(
            f"stride is {stride}, but must not exceed max_length ({max_length}), or tokens between windows would "
            "never be scored: use a stride of at most max_length."
        )
    return max_length, stride


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each text, special tokens that the tokenizer adds included."""
    for text in read_texts(texts):
        # verbose=False: documents longer than the model's positions are expected here and are cut into windows.
        yield tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]


def _unscored(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens, but for the unknown token, which stands for text, unless it is one of the others."""
    structural = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {id for id in structural if id is not None}


def _windows(document: int, ids: list[int], max_length: int, stride: int, unscored: set[int]) -> Iterator[Window]:
    """Cut a document into windows such that each of its tokens but the first is a target in exactly one of them.

    The first window scores up to `max_length` targets, each later one up to `stride` new ones, at its end.
    """
    done = 1  # tokens before this one are scored; the first has nothing before it that could predict it
    while done < len(ids):
        end = min(len(ids), done + (max_length if done == 1 else stride))
        begin = max(0, end - 1 - max_length)
        targets = [
            ids[at] if at >= done and ids[at] not in unscored else -100  # -100: ignored by cross_entropy
            for at in range(begin + 1, end)
        ]
        if any(target != -100 for target in targets):
            yield Window(document, ids[begin : end - 1], targets)
        done = end


def _digest(windows: list[Window]) -> str:
    """SHA-256 of the scored tokens of each document, however they are cut into windows."""
    scored = sha256()
    document = -1
    for window in windows:
        if window.document != document:
            document = window.document
            scored.update(b"\n%d" % document)
        scored.update(b"".join(b" %d" % target for target in window.targets if target != -100))
    return scored.hexdigest()


def _window_losses(model: PreTrainedModel, batch: list[Window], pad: int) -> list[float]:
    """Summed loss in nats of each window, all of them in one padded forward pass.

    Padding stands at the right, where a causal model's real tokens cannot see it.
    """
    longest = max(len(window.inputs) for window in batch)
    ids = torch.tensor([window.inputs + [pad] * (longest - len(window.inputs)) for window in batch])
    mask = torch.tensor([[1] * len(window.inputs) + [0] * (longest - len(window.inputs)) for window in batch])
    device = computing_device(model)
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return [_sum_loss(row, window) for row, window in zip(logits, batch, strict=True)]


def _sum_loss(logits: Tensor, window: Window) -> float:
    """Summed loss of one window from its logits (positions × vocabulary; those at padding are left out).

    Window by window, so that the float32 copy is of one window's logits and not of a whole batch's.
    """
    targets = torch.tensor(window.targets, device=logits.device)
    losses = F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none", ignore_index=-100)
    total = losses.double().sum().item()
    if not math.isfinite(total):
        raise ValueError(
            f"The loss on text {window.document} is {total}, not a finite number: the model gives NaN or infinite "
            "logits. Load it in float32 or bfloat16, or check what was done to its weights."
        )
    return total


def _summarise(windows: list[Window], sums: list[float]) -> Perplexity:
    """The ratio estimate and its standard error from the summed loss of each window."""
    counts = [sum(target != -100 for target in window.targets) for window in windows]
    documents = {window.document for window in windows}
    clustered_by = "documents" if len(documents) > 1 else "windows"
    clusters: dict[int, tuple[float, int]] = {}
    for number, (window, total, count) in enumerate(zip(windows, sums, counts, strict=True)):
        key = window.document if clustered_by == "documents" else number
        before = clusters.get(key, (0.0, 0))
        clusters[key] = (before[0] + total, before[1] + count)
    ordered = tuple(clusters[key] for key in sorted(clusters))
    loss, error = _ratio(ordered)
    value = math.exp(loss) if loss < 700 else math.inf  # exp overflows a float beyond that
    return Perplexity(value, loss, error, sum(counts), len(documents), clustered_by, ordered)


def _ratio(clusters: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Sum over count of all clusters, and its standard error as a ratio estimate; NaN for a single cluster."""
    tokens = sum(count for _, count in clusters)
    ratio = math.fsum(total for total, _ in clusters) / tokens
    size = len(clusters)
    squares = math.fsum((total - ratio * count) ** 2 for total, count in clusters)
    return ratio, math.sqrt(size / (size - 1) * squares) / tokens if size > 1 else math.nan
