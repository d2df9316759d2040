"""The paper's own rule: the most similar neighbours become one block by averaging their parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_compress.anatomy.kinds import block_kind
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.statistics import Earlier
from hf_compress.methods.base.context import CalibrationContext, Drafts
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.similarity import block_similarity
from hf_compress.plan.edits import MergeBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.blocks import remove_blocks


def plan_by_averaging(config: MKAConfig, context: CalibrationContext) -> Plan:
    """Merge the most similar like-kind neighbours, again and again, on the model itself, and take it all back.

    The fused block stands in the earlier one's place and takes part again.

    With a threshold alone, merging ends where no pair is left that may be merged.

    Raises:
        ValueError: no two neighbouring blocks are of one kind, or no block would be left.
    """
    stack = context.stack(config.stack)
    bounded = config.amount is not None
    most = config.amount.of_blocks(len(stack)) if config.amount is not None else len(stack)
    groups = [[index] for index in range(len(stack))]  # of the blocks that became one, in the model's own numbering
    merges: list[dict[str, Any]] = []
    matrix: Tensor | None = None
    earlier = Earlier() if config.iterative and most > 1 else None
    with context.drafts() as drafts:
        with context.trial() as undo:  # of the blocks that are gone, which the plan takes out by itself
            while len(merges) < most:
                pairs = _like_neighbours(stack)
                if not pairs and merges and not bounded:
                    break
                if not pairs:
                    raise ValueError(
                        f"no two neighbouring blocks of the {len(stack)} in {stack.path} are of one kind: nothing can "
                        "be merged; ask for fewer merges, or leave blocks out instead (DropBlocksConfig)"
                    )
                if matrix is None or config.iterative:
                    with context.step("measure similarity"):
                        matrix = _measured(config, context, stack, len(merges), earlier)
                    if not merges:
                        first = matrix.clone()
                pair = _most_similar(stack, pairs, matrix)
                similarity = matrix[pair, pair + 1].item()
                if config.threshold is not None and similarity < config.threshold:
                    break
                alpha = min(1.0, max(0.0, similarity)) if config.alpha is None else config.alpha
                merges.append({"blocks": groups[pair] + groups[pair + 1], "similarity": similarity, "alpha": alpha})
                _fuse(drafts, stack, pair, alpha)
                remove_blocks(context.model, stack, [pair + 1], undo)
                if earlier is not None:
                    earlier.merged(pair)
                groups[pair] += groups.pop(pair + 1)
                matrix = _without(matrix, pair)
        for group in groups:
            if len(group) > 1:
                drafts.rewrite(
                    f"{stack.path}.{group[0]}.{name}" for name, _ in stack.blocks[group[0]].named_parameters()
                )
    return Plan(
        tuple(MergeBlocks(stack.path, group[0], tuple(group[1:])) for group in groups if len(group) > 1),
        drafts.plan.tensors,
        {"similarity": first.tolist(), "merges": merges},
    )


def _measured(
    config: MKAConfig, context: CalibrationContext, stack: Stack, merges: int, earlier: Earlier | None
) -> Tensor:
    """The similarities of all blocks that are left after so many merges."""
    measure = partial(block_similarity, config, context.model, stack, context.calibration, earlier)
    return context.journal.tensors(f"similarity after {merges} merges", lambda: {"all": measure()})["all"]


def _like_neighbours(stack: Stack) -> list[int]:
    """The earlier block of every pair of neighbours of one kind."""
    kinds = [block_kind(stack, index) for index in range(len(stack))]
    return [index for index in range(len(stack) - 1) if kinds[index] == kinds[index + 1]]


def _most_similar(stack: Stack, pairs: list[int], matrix: Tensor) -> int:
    """The one of `pairs` that is the most similar."""
    return max(pairs, key=lambda index: matrix[index, index + 1].item())


def _fuse(drafts: Drafts, stack: Stack, pair: int, alpha: float) -> None:
    """Turn block `pair` into alpha * itself + (1 - alpha) * the next, parameter by parameter."""
    earlier, later = stack.blocks[pair], stack.blocks[pair + 1]
    with drafts.hold(earlier), resident(later):
        others = dict(later.named_parameters())
        for name, parameter in earlier.named_parameters():
            fused = alpha * parameter.detach().double() + (1 - alpha) * others[name].detach().double()
            drafts.undo.write(parameter, fused)


def _without(matrix: Tensor, pair: int) -> Tensor:
    """The similarities after a merge when they are not measured anew: the fused block is to each side what the block on
    that side was, the earlier one to what comes before, the later one to what comes after."""
    size = len(matrix)
    row = torch.cat([matrix[pair, : pair + 1], matrix[pair + 1, pair + 1 :]])
    matrix = matrix.clone()
    matrix[pair, :], matrix[:, pair] = row, row
    keep = [index for index in range(size) if index != pair + 1]
    return matrix[keep][:, keep]
