"""FFNs whose activation is blended with something linear, and the linear maps that are left of them at α = 1."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.parts import FFN, linear_map
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.capture import inference, stream_tokens, watch_module
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.processes import summed_by_name
from hf_compress.calibration.sweep import Sweep
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.modules.activation import Blend, BlendedActivation
from hf_compress.rewrite.site import shared_scope

_ROWS = 1024  # of the identity matrix, put through a gated FFN at once


def blended(model: PreTrainedModel, stack: Stack) -> dict[int, BlendedActivation]:
    """The blended activations of a stack's FFNs, by block."""
    found = {}
    for index, block in enumerate(stack.blocks):
        ffn = Anatomy(model).parts(stack, index).ffn
        if ffn is not None and ffn.activation is not None:
            module = block.get_submodule(ffn.activation)
            if isinstance(module, BlendedActivation):
                found[index] = module
    return found


def fitting_blend(ffn: FFN, activation: nn.Module) -> Blend:
    """What an FFN's activation is driven to: a gate to a constant, ReLU to PReLU and on, a smooth one to the identity.

    A linear gate would still be multiplied with another linear map, so it alone makes nothing collapse.
    """
    if ffn.kind in ("gated", "fused"):
        return "constant"
    return "leaky" if isinstance(activation, nn.ReLU) else "identity"


def mean_gates(model: PreTrainedModel, stack: Stack, data: Calibration, blocks: list[int]) -> dict[int, Tensor]:
    """The mean of each FFN's activation over the real tokens, a value a hidden unit, float64.

    The constants that gates are driven to.

    Raises:
        CalibrationError: no real token reaches an FFN, or its activation is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    with inference(model):
        sweep = Sweep(model, stack, data)
        for index in sweep.blocks("reading gates", max(blocks) + 1):
            if index not in blocks:
                continue
            activation = stack.blocks[index].get_submodule(ffn_of(Block(model, stack, index)).activation or "")
            with watch_module(activation) as seen:
                for passed in sweep.past(index):
                    real = stream_tokens(stack, passed.batch, passed.before)
                    assert seen.gave is not None
                    gate = seen.gave.view(*real.shape, -1)[real].double().cpu()
                    sums[str(index)] = sums.get(str(index), 0) + gate.sum(0)
                    counts[str(index)] = counts.get(str(index), 0) + torch.tensor(len(gate))
    summed_by_name(sums)
    summed_by_name(counts)
    means = {index: sums[str(index)] / counts[str(index)] for index in blocks}
    for index, mean in means.items():
        if not torch.isfinite(mean).all():
            raise CalibrationError(
                f"the FFN of block {index} of {stack.path} has no finite mean activation over the "
                f"{int(counts[str(index)])} calibration tokens that reach it: give longer "
                "texts, or load the model in float32 or bfloat16"
            )
    return means


@torch.no_grad()
def absorbed(block: Block) -> tuple[Tensor, Tensor]:
    """The affine map that a block's FFN is where its blended activation has α = 1.

    Two plain projections: W = W₁W₂, b = b₁W₂ + b₂ (multiplying from the right); with the activation driven to a
    constant, W = 0, b = c·W₂ + b₂. Gated: W_up · diag(c) · W_down.

    Returns:
        W (hidden, hidden) and b (hidden), float64.

    Raises:
        UnsupportedModelError: a gated FFN that is no module of its own, or that is not affine even then.
    """
    ffn, module = ffn_of(block), block.module
    assert ffn.output is not None
    down = module.get_submodule(ffn.output)
    if ffn.kind == "plain":
        up, activation = module.get_submodule(ffn.inputs[0]), module.get_submodule(ffn.activation or "")
        first, shift = linear_map(up).double(), _bias(up)
        if isinstance(activation, BlendedActivation) and activation.blend == "constant":
            first, shift = torch.zeros_like(first), activation.constant.double()
        return first @ linear_map(down).double(), shift @ linear_map(down).double() + _bias(down)
    scope = gated_module(block)
    # How a family lays out gate and up is its own affair: an affine map is known by what it makes of 0 and of the axes.
    holder = copy.deepcopy(module.get_submodule(scope)).double().eval()
    for part in holder.modules():
        if isinstance(part, BlendedActivation):
            part.alpha.fill_(1.0)
    hidden = linear_map(down).shape[1]
    axes = torch.eye(hidden, dtype=torch.float64, device=block.model.device)
    bias = holder(torch.zeros_like(axes[None, :1]))[0, 0]
    weight = torch.cat([holder(rows[None])[0] - bias for rows in axes.split(_ROWS)])
    probe = torch.linspace(-3, 3, hidden, dtype=torch.float64, device=block.model.device)
    error = (holder(probe[None, None])[0, 0] - probe @ weight - bias).abs().max()
    if error > 1e-6 * (1 + (probe @ weight).abs().max()):
        raise UnsupportedModelError(f"the FFN of {block} is not linear once its gate is constant")
    return weight, bias


def gated_module(block: Block) -> str:
    """The path, in its block, of the module that is a gated FFN; UnsupportedModelError where there is none."""
    ffn = ffn_of(block)
    assert ffn.output is not None
    scope = shared_scope((*ffn.inputs, ffn.output))
    if not scope:
        raise UnsupportedModelError(f"the gated FFN of {block} is no module of its own")
    return scope


def _bias(linear: nn.Module) -> Tensor:
    bias = linear._parameters.get("bias")
    return linear_map(linear).new_zeros(linear_map(linear).shape[1]).double() if bias is None else bias.double()


def ffn_of(block: Block) -> FFN:
    """The FFN of a block that has one."""
    ffn = block.parts.ffn
    assert ffn is not None
    return ffn
