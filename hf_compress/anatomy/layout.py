"""What a config says of single blocks, and how it has to change when blocks are taken out.

Six kinds of field speak of single blocks: lists with an entry a block (cut), lists of the blocks of some kind
(renumbered, without those that are gone), taps, behind which the stream is read (moved to the block before),
numbers that end or begin a run of blocks (counted anew), short forms of a list with an entry a block (spelled out, then
cut), and numbers that mean a period or an offset. The last stay, and whether the result is still right is checked: the
model is rebuilt, and compared with the original that has the blocks left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedConfig

from hf_compress.anatomy.stacks import COUNT_NAMES
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError

# Lists of the blocks of some kind, with the number of the first block. One of these can happen to have as many entries
# as there are blocks, so the name decides.
INDEX_LISTS: dict[str, int] = {
    "attn_layer_indices": 0,
    "cross_attention_layers": 0,
    "full_attn_idxs": 0,
    "fullatt_block_indexes": 0,
    "global_attention_blocks": 0,
    "global_attn_indexes": 0,
    "hybrid_layer_ids": 0,
    "local_layer_ids": 0,
    "look_ahead_layers": 0,
    "look_backward_layers": 0,
    "mlp_only_layers": 0,
    "moe_layers": 0,
    "ple_layer_ids": 1,
    "residual_block_indices": 0,
    "rope_scaling_layers": 0,
    "window_block_indices": 0,
}


class _Tap(NamedTuple):
    """What a field means that says where in a stack the stream is read for another use.

    Attributes:
        first: the hidden state that index 0 means: that before the first block (0) or behind it (1). Negative indices
            count from the last.
        once: whether a block may stand there once only, since the model asks of every block whether it does.
        counts: what the config that has the field calls the one that counts the blocks; "" where that is itself.
    """

    first: int
    once: bool = False
    counts: tuple[str, ...] = ("",)


_TAPS: dict[str, _Tap] = {
    "backbone_out_indices": _Tap(1, once=True),
    "cat_hidden_layers": _Tap(0, once=True),
    "deepstack_visual_indexes": _Tap(1, once=True),
    "extract_layers": _Tap(1, counts=("vision_config",)),
    "feature_layer": _Tap(0),
    "insert_layer_id": _Tap(1, counts=("", "vision_config")),
    "intermediate_hidden_state_indices": _Tap(1, once=True),
    "intermediate_hook_ids": _Tap(1, counts=("patch_model_config",)),
    "intermediate_layers_indices": _Tap(1),
    "spatial_vision_layer": _Tap(0, counts=("vision_config",)),
    "vision_feature_layer": _Tap(0, counts=("vision_config",)),
}

# Words in the names of fields that may say something of single blocks, be it not known here what.
_SPEAKS_OF_BLOCKS = re.compile(
    r"(layer|block|attn|stage).*_(ids?|idxs?|ind(ex|exes|ices))$|_(idxs|indexes|indices)$|_layers?$"
)

# Lists with an entry a block whose names do not say so.
PER_BLOCK_LISTS = frozenset({"attention_window", "intermediate_size", "moe_topk", "num_experts"})
_PER_BLOCK_WORDS = ("layer", "block", "pattern", "_types")

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
        "global_attn_every_n_layers",
        "moe_layer_interval",
        "n_layers_per_attn_res_block",
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
        and name not in _SHORT_FORMS
        and name not in _TAPS
        and not name.startswith("mtp_")  # of blocks for predicting several tokens, which are no part of the stack
        and (name in PER_BLOCK_LISTS or any(word in name for word in _PER_BLOCK_WORDS))
        and (not isinstance(value, str) or "pattern" in name)
    ]


def position_fields(config: PreTrainedConfig, length: int) -> dict[str, Any]:
    """The fields of `config` that say where in a stack of `length` blocks which kind stands, with their values."""
    named = sorted(_PERIODS | _RUNS.keys() | INDEX_LISTS.keys() | _SHORT_FORMS.keys())
    return {
        name: vars(config)[name]
        for name in dict.fromkeys([*per_block_fields(config, length), *named])
        if vars(config).get(name) not in (None, [], ())
    }


def fields_with_indices(configs: Iterable[PreTrainedConfig]) -> list[str]:
    """Fields whose names and values may speak of single blocks, for messages: "deepstack_visual_indexes=[1, 3]"."""
    return [
        f"{name}={value}"
        for config in configs
        for name, value in vars(config).items()
        if _SPEAKS_OF_BLOCKS.search(name)
        and name not in COUNT_NAMES
        and (value is True or (isinstance(value, (list, tuple)) and value and all(type(i) is int for i in value)))
    ]


def cut_config(
    config: PreTrainedConfig, count_fields: Sequence[str], length: int, kept: Sequence[int], undo: Undo
) -> None:
    """Change `config` from `length` blocks to the blocks `kept`.

    Raises:
        UnsupportedModelError: a field speaks of single blocks in a way that cannot be cut.
    """
    if _lists_are_of(config, count_fields):
        _cut_lists(config, length, kept, undo)
    for name, count in _RUNS.items():
        if type(value := vars(config).get(name)) is int:
            undo.set(config, name, count(value, length, kept))
    _cut_overrides(config, kept, undo)
    _cut_stages(config, length, kept, undo)
    for name in count_fields:
        undo.set(config, name, len(kept))


def _lists_are_of(config: PreTrainedConfig, count_fields: Sequence[str]) -> bool:
    """Whether the per-block lists of `config` speak of the stack that `count_fields` count.

    Where encoder and decoder share a config, its lists go with what it calls `num_hidden_layers`, the encoder (LED).
    """
    hidden = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return not count_fields or hidden in count_fields or hidden not in vars(config)


def _cut_lists(config: PreTrainedConfig, length: int, kept: Sequence[int], undo: Undo) -> None:
    _spell_out_sparse_step(config, length, undo)
    for name, (spell_out, shorten) in _SHORT_FORMS.items():
        if value := vars(config).get(name):
            entries = spell_out(value, length)
            if len(entries) != length:
                raise UnsupportedModelError(f"the config field {name}={value} does not speak of {length} blocks")
            undo.set(config, name, shorten([entries[i] for i in kept]))
    for name in per_block_fields(config, length):
        value = vars(config)[name]
        undo.set(config, name, "".join(value[i] for i in kept) if isinstance(value, str) else [value[i] for i in kept])
    for name, first in INDEX_LISTS.items():
        if value := vars(config).get(name):
            undo.set(config, name, _renumber(name, value, range(first, first + length), kept))
    move_taps(config, "", length, kept, undo)


def move_taps(config: PreTrainedConfig, counts: str, length: int, kept: Sequence[int], undo: Undo) -> None:
    """Move the places where `config` has the stream of a stack read; `counts` is what it calls the stack's config.

    Raises:
        UnsupportedModelError: a place was behind the first block, and that is gone, or two places would be one.
    """
    for name, tap in _TAPS.items():
        value = vars(config).get(name)
        if counts not in tap.counts or isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
            continue
        old = [value] if isinstance(value, int) else list(value)
        states = [index + tap.first if index >= 0 else index + length + 1 for index in old]
        if not all(0 <= state <= length for state in states):
            continue  # left from a deeper model, and of no use in this one
        after = [sum(block < state for block in kept) for state in states]
        new = [a - tap.first if index >= 0 else a - len(kept) - 1 for a, index in zip(after, old, strict=True)]
        least = 1 if isinstance(value, int) and not tap.first else 0  # Transformers takes a hidden state 0 for none
        if any(a < least <= b for a, b in zip(new, old, strict=True)) or (tap.once and len(set(new)) < len(set(old))):
            raise UnsupportedModelError(
                f"the config field {name}={value} has the stream read behind blocks, each for a use of its own, and "
                f"of the blocks {sorted(set(range(length)) - set(kept))} one is needed for that: leave it in"
            )
        undo.set(config, name, new[0] if isinstance(value, int) else new)


# Lists with an entry a block in a short form: field -> (spelled out for so many blocks, and written again).
_SHORT_FORMS: dict[str, tuple[Callable[[Any, int], list[Any]], Callable[[list[Any]], list[Any]]]] = {
    # RecurrentGemma: a tile, repeated to the depth
    "block_types": (lambda tile, length: [tile[i % len(tile)] for i in range(length)], list),
    # GPT-Neo: pairs of a tile and how often it stands there
    "attention_types": (
        lambda pairs, length: [kind for tile, times in pairs for _ in range(times) for kind in tile],
        lambda kinds: [[kinds, 1]],
    ),
}


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


def _cut_stages(config: PreTrainedConfig, length: int, kept: Sequence[int], undo: Undo) -> None:
    """Name the stages of a vision backbone anew: stage i is the stream after i blocks, the stem the one before."""
    if len(vars(config).get("stage_names") or ()) != length + 1:
        return
    names = [f"stage{i}" if i else "stem" for i in range(len(kept) + 1)]
    undo.set(config, "stage_names", names)
    if (indices := vars(config).get("_out_indices")) is not None:
        after = sorted({sum(i < index % (length + 1) for i in kept) for index in indices})
        undo.set(config, "_out_indices", after)
        undo.set(config, "_out_features", [names[i] for i in after])


def cut_generation(config: GenerationConfig, kept: Sequence[int], undo: Undo) -> None:
    """Renumber what a generation config says of the blocks of the stack that generates."""
    fields = vars(config)
    if heads := fields.get("alignment_heads"):  # Whisper's, pairs of block and head
        left = [[kept.index(block), head] for block, head in heads if block in kept]
        if left:
            undo.set(config, "alignment_heads", left)
        else:  # as in models that have none
            undo.unset(config, "alignment_heads")
    if isinstance(layers := fields.get("dola_layers"), list):  # of which the hidden states are compared with the last
        undo.set(config, "dola_layers", sorted({sum(i < layer for i in kept) for layer in layers}))
    if isinstance(exit_after := fields.get("assistant_early_exit"), int):  # blocks that a draft runs through
        undo.set(config, "assistant_early_exit", max(1, sum(i < exit_after for i in kept)))


def _renumber(name: str, indices: Sequence[int], numbers: range, kept: Sequence[int]) -> list[int]:
    """Block indices of before as indices of after; those of blocks that are gone are left out."""
    if any(type(i) is not int or i not in numbers for i in indices):
        raise UnsupportedModelError(
            f"the config field {name}={list(indices)} is no list of indices of {len(numbers)} blocks"
        )
    after = {numbers[old]: numbers[new] for new, old in enumerate(kept)}
    return [after[i] for i in indices if i in after]
