"""Where the residual stacks of a model are, and which config field counts each one's blocks.

A stack is a ModuleList of blocks through which one residual stream runs. It is found by structure: a ModuleList with as
many entries as a counting field of its config says. No model class is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.compact import CompactLinear

# Counting fields, most specific first. `attribute_map` resolves names such as GPT-2's n_layer.
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers", "n_decoder_layers", "decoder_num_hidden_layers")
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "n_encoder_layers", "encoder_num_hidden_layers")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth", "num_layers_per_stack")


@dataclass(frozen=True, eq=False)
class Stack:
    """One residual stack.

    Attributes:
        path: of the ModuleList in the model, such as "model.layers".
        blocks: the ModuleList itself.
        configs: every config object of the model that counts these blocks, with the names of its counting fields; no
            name where the count is the length of a per-block list.
        side: "encoder" or "decoder" in an encoder-decoder's, else "".
    """

    path: str
    blocks: nn.ModuleList
    configs: tuple[tuple[PreTrainedConfig, tuple[str, ...]], ...]
    side: str = ""

    def __len__(self) -> int:
        return len(self.blocks)


def find_stacks(model: PreTrainedModel) -> list[Stack]:
    """Every residual stack of `model`, in the order of its modules.

    Raises:
        UnsupportedModelError: none is found, or one stack's blocks are spread over several lists.
    """
    found: list[Stack] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{stack.path}.") for stack in found) or not _holds_blocks(module):
            continue
        assert isinstance(module, nn.ModuleList)
        if configs := _counting_configs(model, path, len(module)):
            found.append(Stack(path, module, tuple(configs), _side(path)))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no list of blocks whose length a config field counts "
            f"(looked for {', '.join(_COUNTS)}, and the like of one side)"
        )
    _refuse_parallel_lists(model, found)
    return found


def _holds_blocks(module: nn.Module) -> bool:
    """Whether this is a list of modules with parts and parameters of their own, not of single layers."""
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any(True for _ in child.children()) for child in module)
        and (
            any(parameter.ndim >= 2 for parameter in module.parameters())
            or any(isinstance(part, CompactLinear) for part in module.modules())  # matrices, but stored as a row
        )
    )


def _side(path: str) -> str:
    """Which side of an encoder-decoder a module path lies in; the innermost word decides."""
    for part in reversed(path.split(".")):
        if "decoder" in part:
            return "decoder"
        if "encoder" in part:
            return "encoder"
    return ""


def _counting_configs(model: PreTrainedModel, path: str, length: int) -> list[tuple[PreTrainedConfig, tuple[str, ...]]]:
    """The configs that count a list of `length` blocks at `path`: the nearest owner's, then the saved one.

    Some encoder-decoders give each stack a copy of the config, which is not what is saved. Then both have to change.
    """
    own = nearest_config(model, path)
    side = _side(path)
    fields = _count_fields(own, side, length)
    if fields is None:
        return []
    saved = list(reachable_configs(model.config))
    if any(config is own for config in saved):
        return [(own, fields)]
    for config in saved:
        if (saved_fields := _count_fields(config, side, length)) is not None:
            return [(own, fields), (config, saved_fields)]
    return []


def nearest_config(model: PreTrainedModel, path: str) -> PreTrainedConfig:
    """The config of the module at `path`, or of the innermost one around it that has one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return model.config


def reachable_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """`config` and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from reachable_configs(value)


def _count_fields(config: PreTrainedConfig, side: str, length: int) -> tuple[str, ...] | None:
    """The stored names of the fields of `config` that count `length` blocks; None when nothing there counts them."""
    sided = {"decoder": _DECODER_COUNTS, "encoder": _ENCODER_COUNTS}.get(side, ())
    for names in (sided, _COUNTS):
        stored = dict.fromkeys(config.attribute_map.get(name, name) for name in names)
        if fields := tuple(name for name in stored if vars(config).get(name) == length):
            return fields
    # Some configs compute the count from a list with an entry a block.
    computed = "num_hidden_layers" not in vars(config) and getattr(config, "num_hidden_layers", None) == length
    return () if computed else None


COUNT_NAMES = frozenset(_COUNTS + _DECODER_COUNTS + _ENCODER_COUNTS)


def _refuse_parallel_lists(model: PreTrainedModel, stacks: list[Stack]) -> None:
    """XLM-like models keep attentions, FFNs and norms in lists side by side: there is no block to take out."""
    for first in stacks:
        owner = first.path.rpartition(".")[0]
        same = [s.path for s in stacks if s.path.rpartition(".")[0] == owner and len(s) == len(first)]
        if len(same) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the blocks are spread over the parallel lists {', '.join(same)}"
            )
