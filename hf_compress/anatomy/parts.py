"""What a block is made of: its attention, its FFN, its norms, and the projections that write to the residual stream.

Found by structure: which linear maps read the residual stream (input width = hidden size), which write to it (output
width = hidden size), and which of them belong together. Only the words for query, key and value are taken from names,
since nothing in the shapes tells an attention from an FFN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.activation import BlendedActivation
from hf_compress.modules.compact import CompactLinear
from hf_compress.modules.experts import SeparateExperts

# The last word of the projections from the residual stream to queries, keys and values.
_QKV = re.compile(
    r"^(q|k|v|qkv|query|key|value|query_key_value|c_attn|wqkv|q_attn|attn_qkv|query_proj|key_proj|value_proj"
    r"|(q|k|v|qkv|kv|qkvz|ba|fused_qkv)(_[ab])?_?(proj|lin|linear)(_with_mqa)?)$",
    re.IGNORECASE,
)

# Inside an attention: what weighs its output, and is no output itself.
_GATE = re.compile(r"(^|_)gate(_|$)")

FFNKind = Literal["plain", "gated", "fused", "experts"]


@dataclass(frozen=True)
class FFN:
    """A block's feed-forward part. Paths are relative to the block.

    Attributes:
        kind: "plain" (up, down), "gated" (gate and up, down), "fused" (gate and up in one matrix, down), or "experts".
        inputs: projections from the residual stream to the hidden units; empty for experts.
        output: the projection back to the residual stream; None for experts.
        width: number of hidden units (of one expert).
        activation: the module of the nonlinearity; None where there is none to be found.
        experts: the module that holds all experts, for those alone.
    """

    kind: FFNKind
    inputs: tuple[str, ...]
    output: str | None
    width: int
    activation: str | None = None
    experts: str | None = None


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of. Paths are relative to the block.

    Attributes:
        attention_output: the projection by which attention (or another token mixer) writes to the residual stream.
        ffn: the feed-forward part.
        norms: the normalisations, in order.
    """

    attention_output: str | None
    ffn: FFN | None
    norms: tuple[str, ...]

    @property
    def writers(self) -> tuple[str, ...]:
        """The linear maps that write to the residual stream: attention's, then the FFN's."""
        ffn = self.ffn.output if self.ffn else None
        return tuple(path for path in (self.attention_output, ffn) if path)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear map, of either of the two layouts in Transformers."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, CompactLinear)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: named so in its class, with at most a gain and a bias."""
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for p in module.parameters())


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map; `Conv1D` keeps its weight transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def linear_map(module: nn.Module) -> Tensor:
    """The weight of a linear map as it multiplies from the right, (inputs, outputs); a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, Conv1D) else weight.T


def hidden_size(config: PreTrainedConfig) -> int:
    """Width of the residual stream."""
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"{type(config).__name__} names no width of the residual stream (hidden_size)")


def block_parts(block: nn.Module, hidden: int) -> BlockParts:
    """Find the parts of `block` in a residual stream of width `hidden`; what is not found is None or empty."""
    linears = {path: linear_widths(module) for path, module in block.named_modules() if is_linear(module)}
    attention = _attention_scopes(linears, hidden)
    outside = {p: w for p, w in linears.items() if not any(p.startswith(f"{scope}.") for scope in attention)}
    mixers = _mixer_scopes(block)
    outside = {p: w for p, w in outside.items() if not p.startswith(mixers)}
    ungated = {path: widths for path, widths in linears.items() if not _GATE.search(path.rpartition(".")[2])}
    output = _last_writer(ungated, attention[0], hidden) if attention else None
    if output is None and mixers:
        output = _last_writer({p: w for p, w in linears.items() if p.startswith(mixers)}, "", hidden)
    ffn = _experts(block, hidden) or _ffn(outside, hidden)
    return BlockParts(output, ffn and _with_activation(ffn, block), tuple(_norms(block)))


def _mixer_scopes(block: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parts that mix tokens without attention, as state space models do: they hold a convolution."""
    return tuple(
        f"{path.partition('.')[0]}." for path, module in block.named_modules() if isinstance(module, nn.Conv1d) and path
    )


def _attention_scopes(linears: dict[str, tuple[int, int]], hidden: int) -> list[str]:
    """Paths of the innermost modules that hold query, key and value projections and an output projection."""
    scopes: list[str] = []
    for path in linears:
        scope, _, name = path.rpartition(".")
        if not _QKV.match(name):
            continue
        while scope and _last_writer(linears, scope, hidden) is None:
            scope = scope.rpartition(".")[0]
        if scope and scope not in scopes:
            scopes.append(scope)
    return scopes


def _is_qkv(path: str) -> bool:
    return _QKV.match(path.rpartition(".")[2]) is not None


def _last_writer(linears: dict[str, tuple[int, int]], scope: str, hidden: int) -> str | None:
    """The last linear map under `scope` that ends in the residual stream and is no query, key or value projection."""
    writers = [
        path
        for path, (_, outputs) in linears.items()
        if path.startswith(f"{scope}." if scope else "") and outputs == hidden and not _is_qkv(path)
    ]
    return writers[-1] if writers else None


def _ffn(linears: dict[str, tuple[int, int]], hidden: int) -> FFN | None:
    """The FFN among the linear maps that are not attention's: the widest, where there are several."""
    writers = [path for path, (_, outputs) in linears.items() if outputs == hidden and not _is_qkv(path)]
    found = [ffn for output in writers if (ffn := _ffn_to(output, linears, hidden))]
    return max(reversed(found), key=lambda ffn: ffn.width, default=None)


def _ffn_to(output: str, linears: dict[str, tuple[int, int]], hidden: int) -> FFN | None:
    """The FFN that ends in the linear map `output`."""
    width = linears[output][0]
    others = {path: widths for path, widths in linears.items() if path != output and widths[0] == hidden}
    inputs = tuple(path for path, (_, outputs) in others.items() if outputs == width)
    fused = tuple(path for path, (_, outputs) in others.items() if outputs == 2 * width)
    if len(inputs) == 2:
        return FFN("gated", inputs, output, width)
    if len(inputs) == 1:
        return FFN("plain", inputs, output, width)
    return FFN("fused", fused, output, width) if len(fused) == 1 else None


def _experts(block: nn.Module, hidden: int) -> FFN | None:
    """A mixture of experts: three-dimensional tensors, or a list of alike FFNs called experts."""
    for path, module in block.named_modules():
        if not path.rpartition(".")[2].endswith("experts"):
            continue
        if isinstance(module, SeparateExperts):
            return FFN("experts", (), None, module.width, experts=path)
        if isinstance(module, nn.ModuleList):
            shapes = [linear_widths(m) for m in module.modules() if is_linear(m)]
            return FFN("experts", (), None, _other_width(shapes[-1], hidden), experts=path) if shapes else None
        if tensors := [p for p in module.parameters(recurse=False) if p.ndim == 3]:
            # The down projection, (experts, hidden, width) or (experts, width, hidden), is the smallest of them.
            smallest = min(tensors, key=Tensor.numel)
            width = _other_width((smallest.shape[1], smallest.shape[2]), hidden)
            return FFN("experts", (), None, width, experts=path)
    return None


def _with_activation(ffn: FFN, block: nn.Module) -> FFN:
    """The FFN with its activation: the one such module in what holds its first projection, or else around that."""
    scope = ffn.experts or ffn.inputs[0].rpartition(".")[0]
    while True:
        owner = block.get_submodule(scope)
        found = [name for name, child in owner.named_children() if is_activation(child)]
        if len(found) == 1:
            return replace(ffn, activation=f"{scope}.{found[0]}".lstrip("."))
        if found or not scope:
            return ffn
        scope = scope.rpartition(".")[0]


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise nonlinearity: of PyTorch's or Transformers', without parameters, or ours."""
    if isinstance(module, BlendedActivation):
        return True
    home = type(module).__module__
    known = home in ("torch.nn.modules.activation", "transformers.activations")
    return known and not any(True for _ in module.parameters()) and not isinstance(module, nn.Softmax)


@dataclass(frozen=True)
class ExpertAxes:
    """Where the hidden units are in the tensors that hold all experts.

    Attributes:
        width: hidden units of one expert.
        of: tensor name -> the axis along which the units lie, and how many entries each has there: two where gate and
            up are in one tensor. The projection back to the stream comes first.
        interleaved: whether the two entries of a unit are neighbours, instead of all gates before all ups.
    """

    width: int
    of: dict[str, tuple[int, int]]
    interleaved: bool


def expert_axes(experts: nn.Module) -> ExpertAxes:
    """Find the hidden units in tensors (experts, …, …), the last of which projects back to the residual stream.

    Raises:
        UnsupportedModelError: the tensors do not tell which of their axes is the hidden units'.
    """
    tables = {name: table for name, table in experts.named_parameters(recurse=False) if table.ndim == 3}
    if len(tables) < 2:
        raise UnsupportedModelError(f"{type(experts).__name__} does not hold its experts' projections in a tensor each")
    *ups, down = tables
    sides = tables[down].shape[1:]
    transposed = getattr(experts, "is_transposed", None)
    if transposed is None:  # the stream's side is the one that all tensors have
        streams = [side for side in (0, 1) if all(sides[side] in tables[name].shape[1:] for name in ups)]
        if len(streams) != 1:
            raise UnsupportedModelError(f"{type(experts).__name__}: both sides of {down} could be the hidden units")
        transposed = streams[0] == 1
    width = sides[0 if transposed else 1]
    if not width:
        raise UnsupportedModelError(f"{type(experts).__name__}: the experts have no hidden units")
    of = {down: (1 if transposed else 2, 1)}
    for name in ups:
        axis = 2 if transposed else 1
        of[name] = (axis, tables[name].shape[axis] // width)
        for bias, table in experts.named_parameters(recurse=False):
            if table.ndim == 2 and bias.startswith(name):
                of[bias] = (1, of[name][1])
    return ExpertAxes(width, of, not getattr(experts, "is_concatenated", True))


def _other_width(widths: tuple[int, int], hidden: int) -> int:
    """The side of a projection from or to the residual stream that is not the stream's."""
    return widths[0] if widths[1] == hidden else widths[1]


def _norms(block: nn.Module) -> list[str]:
    """Paths of the normalisations."""
    return [path for path, module in block.named_modules() if is_norm(module)]
