"""Plans of every kind for tiny models, and a picture of a model by which to see that it is as it was."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.modules.bottleneck import Bottleneck
from hf_compress.rewrite import builders
from tests.helpers.changes import Trace
from tests.helpers.tiny import tiny_model

BLOCK = "model.layers.0"
MLP = f"{BLOCK}.mlp"
GATED = (f"{MLP}.gate_proj", f"{MLP}.up_proj")
DOWN = f"{MLP}.down_proj"
HIDDEN, WIDTH = 64, 96
UNITS = torch.arange(8, 40)


@dataclass(frozen=True)
class Before:
    """A model as it was: its tensors and settings, the very objects it is made of, and the hooks on them."""

    trace: Trace
    modules: list
    parameters: list
    hooks: list

    @staticmethod
    def of(model):
        modules = [(path, id(module), type(module)) for path, module in model.named_modules(remove_duplicate=False)]
        parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
        parameters += [(n, id(b), None) for n, b in model.named_buffers(remove_duplicate=False)]
        return Before(Trace.of(model), modules, parameters, hooks(model))

    def check(self, model):
        now = Before.of(model)
        assert self.trace.difference(model) is None
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        assert now.hooks == self.hooks


def hooks(model):
    """How many hooks of each kind every module has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [(path, [len(getattr(m, kind)) for kind in kinds]) for path, m in model.named_modules()]


def bottleneck_plan(model, index, width=16):
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(HIDDEN, width, generator=generator) / 8
    return builders.insert_bottleneck(Anatomy(model).block(index), linear_bottleneck(encoder, encoder.T))


@torch.no_grad()
def linear_bottleneck(encoder, decoder, form=None):
    """One with these maps, and zeros for all else."""
    bottleneck = Bottleneck(*encoder.shape, form, dtype=encoder.dtype)
    bottleneck.encoder.copy_(encoder)
    bottleneck.decoder.copy_(decoder)
    return bottleneck


def pack_plan(model, path, bits=4, group_size=16):
    outputs, inputs = model.get_submodule(path).weight.shape
    return builders.pack_linear(model, path, torch.full((outputs, inputs // group_size), bits), group_size)


def linear_plan(model, index=0, rank=None):
    generator = torch.Generator().manual_seed(2)
    shapes = [(HIDDEN, HIDDEN)] if rank is None else [(HIDDEN, rank), (rank, HIDDEN)]
    maps = [torch.randn(shape, generator=generator) / 8 for shape in shapes]
    return builders.linear_ffn(Anatomy(model).block(index), maps, torch.randn(HIDDEN, generator=generator))


# Every kind of edit, on Llama or (experts) on Mixtral.
PLANS = {
    "narrow": lambda model: builders.narrow_ffn(Anatomy(model).block(0), UNITS),
    "linear": linear_plan,
    "low rank": lambda model: linear_plan(model, rank=4),
    "bottleneck": lambda model: bottleneck_plan(model, 0),
    "packed": lambda model: pack_plan(model, f"{BLOCK}.self_attn.o_proj"),
    "identity": lambda model: builders.replace_activation(Anatomy(model).block(0), "identity", 0.5),
    "constant": lambda model: builders.replace_activation(Anatomy(model).block(0), "constant", 0.5, torch.zeros(WIDTH)),
    "experts": lambda model: builders.narrow_experts(Anatomy(model).block(0), UNITS.expand(4, -1)),
}


def model_for(name):
    return tiny_model("mixtral" if name == "experts" else "llama")


@contextmanager
def refused_without_trace(model, error, message=None):
    """What stands inside is refused in these words, and leaves the very objects that the model is made of."""
    before = Before.of(model)
    with pytest.raises(error, match=message):
        yield
    before.check(model)
