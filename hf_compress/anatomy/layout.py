"""What a config says of single blocks, and how it has to change when blocks are taken out.

Four kinds of field speak of single blocks: lists with an entry a block (cut), lists of block indices (renumbered),
numbers that end or begin a run of blocks (counted anew), and numbers that mean a period or an offset. The last stay, and
whether the result is still right is checked by rebuilding the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError

# Lists of block indices. One of these can happen to have as many entries as there are blocks, so the name decides.
INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "local_layer_ids",
        "mlp_only_layers",
        "moe_layers",
        "ple_layer_ids",
        "rope_scaling_layers",
    }
)

# Lists with an entry a block whose names do not say so.
PER_BLOCK_LISTS = frozenset({"intermediate_size", "activation_sparsity_pattern"})
_PER_BLOCK_WORDS = ("layer", "block", "pattern")

# Numbers that end or begin a run of blocks: (value, blocks before, indices kept) -> the value afterwards.
_RUNS: dict[str, Callable[[int, int, Sequence[int]], int]] = {
    "first_k_dense_replace": lambda first, length, kept: sum(i < first for i in kept),
    "num_dense_layers": lambda first, length, kept: sum(i < first for i in kept),
    "moe_layer_start_index": lambda first, length, kept: sum(i < first for i in kept),
    "moe_layer_end_index": lambda last, length, kept: last if last < 0 else sum(i <= last for i in kept) - 1,
    "num_kv_shared_layers": lambda last, length, kept: sum(i >= length - last for i in kept),
}

# Periods and offsets, named in the error when a layout cannot be expressed.
_PERIODS = frozenset(
    {
        "attn_layer_offset",
        "attn_layer_period",
        "cross_layer_interval",
        "decoder_sparse_step",
        "encoder_sparse_step",
        "expert_layer_offset",
        "expert_layer_period",
        "moe_layer_interval",
    }
)


def per_block_fields(config: PreTrainedConfig, length: int) -> list[str]:
    """Names of the fields of `config` with an entry for each of `length` blocks."""
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple, str))
        and len(value) == length
        and name not in INDEX_LISTS
        and (name in PER_BLOCK_LISTS or any(word in name for word in _PER_BLOCK_WORDS))
        and (not isinstance(value, str) or "pattern" in name)
    ]


def position_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `config` that mean a position in the stack, with their values."""
    return {name: vars(config)[name] for name in sorted(_PERIODS | _RUNS.keys()) if vars(config).get(name) is not None}


def cut_config(
    config: PreTrainedConfig, count_fields: Sequence[str], length: int, kept: Sequence[int], undo: Undo
) -> None:
    """Change `config` from `length` blocks to the blocks `kept`.

    Raises:
        UnsupportedModelError: a field speaks of single blocks in a way that cannot be cut.
    """
    _spell_out_sparse_step(config, length, undo)
    for name in per_block_fields(config, length):
        value = vars(config)[name]
        undo.set(config, name, "".join(value[i] for i in kept) if isinstance(value, str) else [value[i] for i in kept])
    for name in sorted(INDEX_LISTS & vars(config).keys()):
        if vars(config)[name]:
            undo.set(config, name, _renumber(name, vars(config)[name], length, kept))
    for name, count in _RUNS.items():
        if type(value := vars(config).get(name)) is int:
            undo.set(config, name, count(value, length, kept))
    _cut_overrides(config, kept, undo)
    for name in count_fields:
        undo.set(config, name, len(kept))


def _spell_out_sparse_step(config: PreTrainedConfig, length: int, undo: Undo) -> None:
    """Say by the list `mlp_only_layers` which blocks have no experts, instead of by a period that a cut would break."""
    step = vars(config).get("decoder_sparse_step")
    dense = vars(config).get("mlp_only_layers")
    if type(step) is int and step > 1 and isinstance(dense, (list, tuple)):
        every = set(dense) | {i for i in range(length) if (i + 1) % step != 0}
        undo.set(config, "mlp_only_layers", sorted(every))
        undo.set(config, "decoder_sparse_step", 1)


def _cut_overrides(config: PreTrainedConfig, kept: Sequence[int], undo: Undo) -> None:
    """Renumber `per_layer_config`, by which Transformers gives single blocks settings of their own."""
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        old = spec.per_layer_overrides
        overrides = {new: old[index] for new, index in enumerate(kept) if index in old}
        undo.set(config, "_heterogeneity_spec", replace(spec, per_layer_overrides=overrides))


def _renumber(name: str, indices: Sequence[int], length: int, kept: Sequence[int]) -> list[int]:
    """Block indices of before as indices of after; those of blocks that are gone are left out."""
    if any(type(i) is not int or not 0 <= i < length for i in indices):
        raise UnsupportedModelError(f"the config field {name}={list(indices)} is no list of indices of {length} blocks")
    position = {old: new for new, old in enumerate(kept)}
    return [position[i] for i in indices if i in position]
