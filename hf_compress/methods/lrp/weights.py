"""Single weights of a stack left out and rounded, block by block, each on the compressed blocks' activations."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.processes import from_one, spread_prepared
from hf_compress.calibration.sweep import StreamPair, advance, start_pairs, turns
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.lrp.config import BITS, MODULE_BITS, LRPConfig
from hf_compress.methods.lrp.error_costs import error_costs
from hf_compress.methods.lrp.experts import separate_experts
from hf_compress.methods.lrp.grams import factor_if_wide, factor_of, grams_of, in_parts, sharing
from hf_compress.methods.lrp.linears import Subject, Weights, changeable_linears
from hf_compress.methods.lrp.masks import Masks, kept_weights
from hf_compress.methods.lrp.module_bits import bits_of_modules, read_together
from hf_compress.methods.lrp.precision import bits_of_groups, overhead
from hf_compress.methods.lrp.scores import scored
from hf_compress.modules.packed import filled
from hf_compress.numerics.factor import Factor
from hf_compress.numerics.masked import solve_masked
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.builders import pack_linear, sparsify_linear

_Known = Tensor | Factor | None


@dataclass
class _Decisions:
    """What becomes of each linear map, by its path: which weights stay, and how many bits the groups get."""

    kept: Mapping[str, Tensor]
    bits: dict[str, Tensor]


def plan_weights(
    config: LRPConfig, context: CalibrationContext, stack: Stack, drafts: Drafts, prunes: bool
) -> dict[str, Any]:
    """Leave weights out, round the rest, or both; notes of what was done."""
    with context.step("separate experts"):
        separate_experts(context, stack, drafts)
    subject = Subject(config, context, stack, changeable_linears(context, stack))
    if config.split is not None:
        return _split(subject, drafts)
    slopes: dict[str, Tensor] = {}
    kept: Mapping[str, Tensor] = {}
    with context.step("score weights"):
        if prunes:
            state = context.journal.tensors("masks", partial(_masks, subject, slopes))
            kept = Masks.of(state, subject.linears, subject.aside)
    with context.step("allocate bits"):
        bits: dict[str, Tensor] = {}
        if config.quantizes:
            bits = context.journal.tensors("bits", partial(_bits, subject, slopes, kept))
    slopes.clear()
    decisions = _Decisions(kept, bits)
    with context.step("solve weights"):
        solves = config.solves if prunes else config.rounding == "compensated"
        pairs = start_pairs(context.model, stack, context.calibration, config.tokens) if solves else []
        for index in turns(stack, range(len(stack)), "solving blocks", drafts.hold):
            solve = partial(_solved, subject, index, pairs, decisions)
            drafts.add(context.journal.plan(f"solve block {index}", solve))
            if index + 1 < len(stack):
                advance(pairs, index)
    return {"linears": _notes(subject.linears, decisions)}


def _solved(subject: Subject, index: int, pairs: list[StreamPair], decisions: _Decisions) -> Plan:
    """The plan for the linear maps of one block, which is in memory."""
    draft = Plan()
    for own in in_parts(subject.of_block(index)):
        grams = grams_of(subject.stack, index, own, pairs)
        together = [*sharing(grams), *([path] for path in own if path not in grams)]

        def prepared(paths: list[str], grams: dict[str, Tensor] = grams) -> tuple[list[str], _Known]:
            gram, *_ = (grams.pop(path, None) for path in paths)  # as large as nothing else here
            return paths, _known(subject.config, gram, bool(decisions.kept))

        def solved(given: tuple[list[str], _Known]) -> list[Plan]:
            paths, known = given
            del given
            if not decisions.kept and known is not None:
                known = factor_of(known)
            return [_draft(subject, path, known, decisions) for path in paths]

        for drafted in spread_prepared(together, prepared, solved):
            draft += sum(drafted, Plan())
    return draft


def _masks(subject: Subject, slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the masks of the weights that stay."""
    with closing(_scores(subject, slopes)) as scores:
        return kept_weights(subject.config, subject.linears, scores, subject.aside).state()


def _scores(subject: Subject, slopes: dict[str, Tensor]) -> Generator[dict[str, Tensor]]:
    """Scores of weights, in parts; the slopes that they are made of, where bits are given by them, are put aside."""
    aside = working_memory().aside()  # of their own: files go with the last tensor in them, and masks stay longer
    for part in scored(subject, subject.config.score_name):
        slopes |= {path: aside.put(part.slopes.pop(path)) for path in list(part.slopes)}
        yield part.weights


def _split(subject: Subject, drafts: Drafts) -> dict[str, Any]:
    """The paper's mixed precision: of each layer's weights the half above the median in more bits, one by one."""
    config, stack = subject.config, subject.stack
    assert config.split is not None
    halves = Masks(subject.aside)
    scores = scored(subject, config.score_name)
    with subject.context.step("score weights"), closing(scores):
        for part in scores:
            for path in list(part.weights):
                values = part.weights.pop(path)
                halves.add(path, from_one(partial(_upper_half, values)))
    even = config.is_symmetric(config.split[0]) or config.split[0] > 8  # zeros are stored in a byte
    for index in turns(stack, range(len(stack)), "splitting", drafts.hold):
        draft = Plan()
        for path in subject.of_block(index):
            upper = halves[path]
            count = int(upper.sum())
            if not 0 < count < upper.numel():
                raise ValueError(f"the scores of {path} have no median to split them by: too few of them differ")
            groups = [filled(part, config.group_size) // config.group_size for part in (count, upper.numel() - count)]
            bits = torch.repeat_interleave(torch.tensor(config.split), torch.tensor(groups))
            draft += sparsify_linear(subject.model, path, upper, None, bits, config.group_size, even, rest=True)
        drafts.add(draft)
    return {"split": list(config.split)}


def _upper_half(values: Tensor) -> Tensor:
    return values > values.median()


def _known(config: LRPConfig, gram: Tensor | None, prunes: bool) -> _Known:
    """What solving needs of the Gram matrix of maps that read the same; None where nothing is solved for."""
    if gram is None or prunes:
        return gram
    return factor_if_wide(gram) if config.rounding == "compensated" else None


def _draft(subject: Subject, path: str, known: _Known, decisions: _Decisions) -> Plan:
    config = subject.config
    kept = decisions.kept.get(path)
    bits = decisions.bits[path].long() if path in decisions.bits else None
    if kept is None:
        assert bits is not None
        even = config.is_symmetric(int(bits.max()))
        return pack_linear(subject.model, path, bits, config.group_size, even, known)
    weight = solve_masked(linear_map(subject.linears[path]).T, known, kept) if isinstance(known, Tensor) else None
    row = None if bits is None else bits.flatten()
    return sparsify_linear(subject.model, path, kept, weight, row, config.group_size, bool(config.symmetric))


def _bits(subject: Subject, slopes: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bits of the groups of all linear maps; of pruned ones, of the groups of what is left."""
    config, linears = subject.config, subject.linears
    total = sum(linear_map(linear).numel() for linear in linears.values())
    asked = config.bits if config.bits is not None else 8 * (config.target_bytes or 0) / total
    weights = Weights(linears, kept)
    shapes = [weights.shape(path) for path in linears]
    stored = sum(map(math.prod, shapes))
    padded = sum(outputs * filled(inputs, config.group_size) for outputs, inputs in shapes)
    if kept:  # a bit of every weight says whether it is there
        asked = (asked - 1) * total / stored
    whole = config.per == "module"
    budget = asked * stored / padded - overhead(config)
    fewest = MODULE_BITS[0] if whole else BITS[0]
    if budget < fewest:
        given = f"bits={config.bits:g}" if config.bits is not None else f"target_bytes={config.target_bytes}"
        raise ValueError(
            f"{given} leaves {max(0.0, budget):.2f} bits for each weight, where {fewest} are the fewest, once steps "
            f"of groups of {config.group_size} are stored and rows filled up to whole groups: ask for more, or change "
            "group_size="
        )
    with closing(error_costs(subject, slopes, kept)) as costs:
        if whole:
            together = read_together(subject.model, subject.context.calibration.batches[0], linears)
            return bits_of_modules(config, weights, costs, together, int(asked * stored + 1e-6))
        return bits_of_groups(config, BITS, weights, costs, budget, subject.aside)


def _notes(linears: Mapping[str, nn.Module], decisions: _Decisions) -> list[dict[str, Any]]:
    notes = []
    for path in linears:
        told: dict[str, Any] = {"linear": path}
        if path in decisions.kept:
            told["kept"] = float(decisions.kept[path].float().mean())
        if path in decisions.bits:
            values, counts = decisions.bits[path].unique(return_counts=True)
            told["groups"] = {str(int(bits)): int(count) for bits, count in zip(values, counts, strict=True)}
        notes.append(told)
    return notes
