"""What features do on texts: running sums, and the tokens where they are largest, in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import (
    StopForward,
    check_stream,
    forward,
    hooked,
    inference,
    stream_of_output,
    stream_tokens,
)
from hf_compress.calibration.data import Batch, Calibration
from hf_compress.calibration.progress import bar
from hf_compress.features.reconstruction import ReconstructionSums
from hf_compress.features.subjects import Subject

_PER_TEXT = 2  # examples of a feature and a sign, so that one text does not fill a card
DEAD = 1e-6  # of the mean feature's energy


class Largest:
    """The largest values of each feature so far, with the text and the position of each: (features, count) each."""

    def __init__(self, features: int, count: int, device: torch.device) -> None:
        self.values = torch.full((features, count), -torch.inf, device=device)
        self.places = torch.zeros(features, count, 2, dtype=torch.long, device=device)

    def update(self, values: Tensor, first: int) -> None:
        """Of values (texts, positions, features), -inf where they do not count; `first` is the number of the first."""
        found, positions = values.topk(min(_PER_TEXT, values.shape[1]), dim=1)
        texts = torch.arange(first, first + len(values), device=values.device)[:, None, None].expand_as(positions)
        places = torch.stack([texts, positions], dim=-1).flatten(0, 1).transpose(0, 1)
        all_values = torch.cat([self.values, found.flatten(0, 1).T], dim=1)
        order = all_values.argsort(dim=1, descending=True, stable=True)[:, : self.values.shape[1]]
        self.values = all_values.gather(1, order)
        self.places = torch.cat([self.places, places], dim=1).gather(1, order[..., None].expand(-1, -1, 2))


class Tally:
    """Running sums of one bottleneck, and the largest codes of each sign that its codes can have."""

    def __init__(self, subject: Subject, examples: int) -> None:
        self.subject, self.sums = subject, ReconstructionSums()
        device, width = subject.module.encoder.device, len(subject.columns)
        self.active, self.size, self.energy = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        self.peak = torch.zeros(width)
        signs = (1, -1) if subject.module.form.select == "all" else (1,)
        self.largest = {sign: Largest(width, examples, device) for sign in signs}
        rows = subject.module.decoder[subject.columns]
        self.weight = rows.square().sum(1).double().cpu()

    def update(self, stream: Tensor, real: Tensor, first: int) -> None:
        """Add a batch: stream (texts, positions, hidden), the mask of its real tokens, and its first text's number."""
        if not real.any():
            return
        module = self.subject.module
        code, context = module.encode(stream)
        self.sums.update(stream[real], module.decode(code, context)[real], code[real])
        code = code[..., self.subject.columns]
        sizes = code[real].abs()
        self.active += (sizes > 0).sum(0).cpu()
        self.size += sizes.sum(0).double().cpu()
        self.energy += sizes.square().sum(0).double().cpu() * self.weight
        self.peak = torch.maximum(self.peak, sizes.amax(0).cpu())
        for sign, largest in self.largest.items():
            largest.update((sign * code).masked_fill(~real[..., None], -torch.inf), first)

    def dead(self) -> Tensor:
        """Which features are never active, (features) bool."""
        never = self.active == 0
        if self.subject.module.form.select != "all":
            return never
        return never | (self.energy < DEAD * self.energy.mean())


def tallied(model: PreTrainedModel, subjects: list[Subject], data: Calibration, examples: int) -> list[Tally]:
    """One pass over the data; of each batch it ends when all bottlenecks have been seen."""
    tallies = [Tally(subject, examples) for subject in subjects]
    first = 0
    for batch in bar(data.batches, "reading features"):
        missing = set(range(len(subjects)))
        with inference(model), hooked(_reading(subjects, batch, first, tallies, missing)):
            forward(model, batch)
        first += batch.samples
    return tallies


def _reading(
    subjects: list[Subject], batch: Batch, first: int, tallies: list[Tally], missing: set[int]
) -> Iterator[RemovableHandle]:
    """Hooks that hand each tally the stream that its bottleneck reads, and end the pass when none is missing."""

    def take(number: int, stream: Tensor) -> None:
        subject = subjects[number]
        _check(subject, batch, stream)
        tallies[number].update(stream.float(), stream_tokens(subject.stack, batch, stream), first)
        missing.discard(number)
        if not missing:
            raise StopForward

    for number, subject in enumerate(subjects):
        if subject.source is None:
            block = subject.stack.blocks[subject.layer]
            yield block.register_forward_hook(lambda _, args, output, n=number: take(n, stream_of_output(output)))
        else:
            yield subject.source.register_forward_pre_hook(lambda _, args, n=number: take(n, args[0]))


def _check(subject: Subject, batch: Batch, stream: Tensor) -> None:
    width, path = subject.module.encoder.shape[0], subject.stack.path
    if stream.shape[-1] != width:
        raise ValueError(
            f"the bottleneck behind block {subject.layer} is for a stream {width} wide; that of {path} is "
            f"{stream.shape[-1]}: give those that were fitted to this model"
        )
    check_stream(subject.stack, subject.layer, stream, stream)
    ids = tokens_at(subject.stack, batch)[0]
    if ids is None or ids.shape != stream.shape[:2]:
        told = "no token ids" if ids is None else f"token ids of shape {tuple(ids.shape)}"
        raise ValueError(
            f"the stream of {path} has the shape {tuple(stream.shape)}, the data {told}: features are shown on text; "
            "pass texts with one token a position"
        )


def tokens_at(stack: Stack, batch: Batch) -> tuple[Tensor | None, Tensor]:
    """What stands at each position of a stack's stream, (texts, positions), and whether that is no padding."""
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    decodes = stack.side == "decoder" and any(config.is_encoder_decoder for config, _ in stack.configs)
    if decodes and "decoder_input_ids" in batch.inputs:
        ids, mask, decodes = batch.inputs["decoder_input_ids"], batch.inputs.get("decoder_attention_mask"), False
    if ids is None:
        return None, torch.zeros(0)
    there = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    if decodes:  # `forward` hands it the text one place to the right
        return ids.roll(1, 1), torch.cat([torch.zeros_like(there[:, :1]), there[:, :-1]], dim=1)
    return ids, there
