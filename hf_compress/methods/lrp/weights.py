"""Single weights of a stack left out and rounded, block by block, each on the compressed blocks' activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_compress.anatomy.parts import linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.apply import carry_out
from hf_compress.calibration.walks import start_walks
from hf_compress.drafts import pack_linear, sparsify_linear
from hf_compress.methods.lrp.config import BITS, MODULE_BITS
from hf_compress.methods.lrp.experts import plan_separation
from hf_compress.methods.lrp.grams import advance, few_at_once, grams_of, linears_of
from hf_compress.methods.lrp.linears import changeable_linears, weights_of
from hf_compress.methods.lrp.masks import kept_weights
from hf_compress.methods.lrp.precision import bits_of_groups, overhead
from hf_compress.methods.lrp.scores import Scores, score, some_batches
from hf_compress.methods.lrp.whole import bits_of_modules, read_together
from hf_compress.methods.lrp.worth import worth_of_errors
from hf_compress.modules.packed import filled
from hf_compress.numerics.masked import solve_masked
from hf_compress.plan import Plan
from hf_compress.workbench import Workbench

if TYPE_CHECKING:
    from hf_compress.methods.lrp.config import LRPConfig


@dataclass
class _Decisions:
    """What becomes of each linear map, by its path: which weights stay, and how many bits the groups get."""

    kept: dict[str, Tensor]
    bits: dict[str, Tensor]


def plan_weights(config: LRPConfig, bench: Workbench, stack: Stack, undo: Undo, prunes: bool) -> Plan:
    """Leave weights out, round the rest, or both; the model stays changed until `undo` is rolled back."""
    with bench.stage("separate experts"):
        apart = plan_separation(bench, stack, undo)
    return apart.then(_plan_linears(config, bench, stack, undo, prunes))


def _plan_linears(config: LRPConfig, bench: Workbench, stack: Stack, undo: Undo, prunes: bool) -> Plan:
    linears = changeable_linears(bench, stack)
    if config.split is not None:
        return _split(config, bench, linears, undo)
    with bench.stage("score weights"):
        scores = score(config, bench, linears, {}, config.score_name) if prunes else Scores()
        kept = kept_weights(config, scores.weights) if prunes else {}
    with bench.stage("allocate bits"):
        bits = _bits(config, bench, stack, linears, scores.slopes, kept) if config.quantizes else {}
    decisions = _Decisions(kept, bits)
    with bench.stage("solve weights"):
        solves = config.solves if prunes else config.rounding == "compensated"
        walks = start_walks(bench.model, stack, bench.calibration, config.tokens) if solves else []
        plan = Plan()
        for index in tqdm(range(len(stack)), desc="solving blocks", disable=None):
            draft = Plan()
            for own in few_at_once(linears_of(stack, index, linears)):
                grams = grams_of(stack, index, own, walks)
                for path in own:
                    draft += _draft(config, bench, path, linears[path], grams.get(path), decisions)
            carry_out(draft, bench.model, undo)
            plan += draft
            advance(walks, index)
    return Plan(plan.edits, plan.tensors, {"linears": _notes(linears, decisions)})


def _split(config: LRPConfig, bench: Workbench, linears: Mapping[str, nn.Module], undo: Undo) -> Plan:
    """The paper's mixed precision: of each layer's weights the half above the median in more bits, one by one."""
    assert config.split is not None
    with bench.stage("score weights"):
        scores = score(config, bench, linears, {}, config.score_name).weights
    plan = Plan()
    for path, values in scores.items():
        upper = values > values.median()
        count = int(upper.sum())
        if not 0 < count < values.numel():
            raise ValueError(f"the scores of {path} have no median to split them by: too few of them differ")
        groups = [filled(part, config.group_size) // config.group_size for part in (count, values.numel() - count)]
        bits = torch.repeat_interleave(torch.tensor(config.split), torch.tensor(groups))
        even = config.is_symmetric(config.split[0]) or config.split[0] > 8  # zeros are stored in a byte
        plan += sparsify_linear(bench.model, path, upper, None, bits, config.group_size, even, rest=True)
    carry_out(plan, bench.model, undo)
    return Plan(plan.edits, plan.tensors, {"split": list(config.split)})


def _draft(
    config: LRPConfig, bench: Workbench, path: str, linear: nn.Module, gram: Tensor | None, decisions: _Decisions
) -> Plan:
    kept, bits = decisions.kept.get(path), decisions.bits.get(path)
    if kept is None:
        assert bits is not None
        own = gram if config.rounding == "compensated" else None
        even = config.is_symmetric(int(bits.max()))
        return pack_linear(bench.model, path, bits, config.group_size, even, own)
    weight = None if gram is None else solve_masked(linear_map(linear).T, gram, kept)
    row = None if bits is None else bits.flatten()
    return sparsify_linear(bench.model, path, kept, weight, row, config.group_size, bool(config.symmetric))


def _bits(
    config: LRPConfig,
    bench: Workbench,
    stack: Stack,
    linears: Mapping[str, nn.Module],
    slopes: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Bits of the groups of all linear maps; of pruned ones, of the groups of what is left."""
    weights = weights_of(linears)
    total = sum(weight.numel() for weight in weights.values())
    asked = config.bits if config.bits is not None else 8 * (config.target_bytes or 0) / total
    if kept:  # a bit of every weight says whether it is there
        left = sum(int(mask.sum()) for mask in kept.values())
        asked = (asked - 1) * total / left
        weights = {path: weight[kept[path]][None] for path, weight in weights.items()}
    padded = sum(len(weight) * filled(weight.shape[1], config.group_size) for weight in weights.values())
    stored = sum(weight.numel() for weight in weights.values())
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
    worth = worth_of_errors(config, bench, stack, linears, slopes=slopes, kept=kept)
    if whole:
        together = read_together(bench.model, some_batches(bench, 1)[0], linears)
        return bits_of_modules(config, weights, worth, together, int(asked * stored + 1e-6))
    return bits_of_groups(config, BITS, weights, worth, budget)


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
