"""Which logits a feature moves, by the direct path from the last block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.parts import is_linear, is_norm, linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import (
    StopForward,
    forward,
    hooked,
    inference,
    stream_of_output,
)
from hf_compress.calibration.data import Batch

_VOCABULARY = 16384  # words whose logits are made at once


@dataclass
class DirectPath:
    """From a stack's last block to the logits: U (vocabulary, hidden), None where there is no such path; the final
    norm's gain (hidden), None where there is none or it is left out; and what to say of it."""

    remark: str
    unembedding: Tensor | None = None
    gain: Tensor | None = None

    def effects(self, rows: Tensor, words: int) -> Tensor:
        """By how much the logits of the first `words` words change for each unit of a code: (features, words)."""
        assert self.unembedding is not None
        rows = rows if self.gain is None else rows * self.gain
        parts = self.unembedding[:words].split(_VOCABULARY)
        return torch.cat([(rows.to(part.device) @ part.float().T).cpu() for part in parts], dim=1)


@torch.no_grad()
def direct_path(model: PreTrainedModel, stack: Stack, batch: Batch) -> DirectPath:
    """Found by what happens in a pass, not by names: the norm that reads what the last block wrote."""
    head = model.get_output_embeddings()
    if head is None:
        return DirectPath(
            "The model has no output embeddings, so there are no logits of words that features could move."
        )
    if not is_linear(head) or (stack.side == "encoder" and model.config.is_encoder_decoder):
        return DirectPath("No linear path leads from this stream to the logits, so effects on them are not shown.")
    seen = _after(model, stack, head, batch)
    if seen is None or seen.wrote.shape[-1] != seen.read.shape[-1]:
        return DirectPath("The output embeddings do not read this stream, so effects on logits are not shown.")
    told = "Effects on logits are those of the direct path, for each unit of the code: the decoder’s row"
    rest = "times the output embeddings. What later blocks make of it is not in them"
    unembedding = linear_map(head).T.detach()
    if seen.norm is not None:
        remark = f"{told}, times the gain of the final norm ({seen.path}), {rest}, nor the norm’s division."
        return DirectPath(remark, unembedding, _gain(seen.norm, seen.wrote.shape[-1]).to(model.device))
    if seen.wrote.shape == seen.read.shape and torch.equal(seen.wrote, seen.read):
        return DirectPath(f"{told} {rest}. The model has no final norm.", unembedding)
    between = "What stands between the last block and the output embeddings is no single norm, and is left out."
    return DirectPath(f"{told} {rest}. {between}", unembedding)


@dataclass
class _Seen:
    """What the last block wrote and the head read, and the norm that reads what the last block wrote."""

    wrote: Tensor
    read: Tensor
    norm: nn.Module | None
    path: str


def _after(model: PreTrainedModel, stack: Stack, head: nn.Module, batch: Batch) -> _Seen | None:
    """What happens after a stack; None where the head is not reached."""
    wrote: list[Tensor] = []
    read: list[Tensor] = []
    found: list[tuple[nn.Module, str]] = []

    def normed(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
        given = [*args, *kwargs.values()]
        if wrote and len(given) == 1 and given[0].shape == wrote[-1].shape and torch.equal(given[0], wrote[-1]):
            found.append((norm, path))

    def headed(head: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(args[0])
        raise StopForward  # the logits of a whole batch may be large, and are not wanted

    def hooks() -> Iterator[RemovableHandle]:
        yield stack.blocks[-1].register_forward_hook(lambda _, args, output: wrote.append(stream_of_output(output)))
        for path, module in model.named_modules():
            if is_norm(module) and not path.startswith(f"{stack.path}."):
                yield module.register_forward_pre_hook(partial(normed, path=path), with_kwargs=True)
        yield head.register_forward_pre_hook(headed)

    with inference(model), hooked(hooks()):
        forward(model, batch)
    norm, path = found[-1] if found else (None, "")
    return _Seen(wrote[-1], read[-1], norm, path) if wrote and read else None


def _gain(norm: nn.Module, hidden: int) -> Tensor:
    """The factors of a norm, (hidden): measured, since some families store them less 1.

    For x without a mean, norm(x) = g ⊙ x / rms(x) + b, of both kinds of norm; x is large against their ε.
    """
    x = torch.ones(hidden)
    x[1::2] = -1
    if hidden % 2:
        x[1] = -2  # so that the mean is 0
    measured = copy.deepcopy(norm).cpu().float()
    up, down = (measured(1000 * sign * x[None, None])[0, 0] for sign in (1, -1))
    return (up - down).float() / 2 * x.square().mean().sqrt() / x
