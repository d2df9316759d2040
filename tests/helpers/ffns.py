"""FFNs of tiny models, and hooks that make an untouched model compute what a changed one has to."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.rewrite.apply import carry_out
from tests.helpers.changes import forward
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_seq2seq_model

HIDDEN = 64


@dataclass(frozen=True)
class Family:
    """One FFN of a tiny model: its first projection, its activation and its last projection, in a block of a stack."""

    build: Callable
    stack: str
    index: int
    width: int
    first: str
    activation: str | None
    last: str

    def path(self, name):
        return f"{self.stack}.{self.index}.{name}"


FAMILIES = {
    # gate and up
    "llama": Family(tiny_model, "model.layers", 1, 96, "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj"),
    "gemma2": Family(tiny_model, "model.layers", 3, 96, "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj"),
    "qwen3_moe": Family(tiny_model, "model.layers", 0, 96, "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj"),
    # gate and up in one
    "phi3": Family(tiny_model, "model.layers", 0, 96, "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj"),
    "glm": Family(tiny_model, "model.layers", 2, 96, "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj"),
    # transposed
    "gpt2": Family(tiny_model, "transformer.h", 1, 256, "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    # plain, in a module of its own
    "gptj": Family(tiny_model, "transformer.h", 0, 256, "mlp.fc_in", "mlp.act", "mlp.fc_out"),
    "gpt_neox": Family(tiny_model, "gpt_neox.layers", 3, 96, "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h"),
    "vit": Family(tiny_base_model, "layers", 1, 96, "mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    "distilbert": Family(tiny_base_model, "transformer.layer", 2, 96, "ffn.lin1", "ffn.activation", "ffn.lin2"),
    "t5": Family(
        tiny_seq2seq_model,
        *("decoder.block", 1, 96),
        *("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.act", "layer.2.DenseReluDense.wo"),
    ),
    # over two modules
    "bert": Family(
        tiny_base_model,
        *("encoder.layer", 1, 96),
        *("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ),
    # in the block itself
    "opt": Family(tiny_model, "model.decoder.layers", 1, 96, "fc1", "activation_fn", "fc2"),
    "bart": Family(tiny_seq2seq_model, "model.encoder.layers", 0, 96, "fc1", "activation_fn", "fc2"),
}
PLAIN = ["gpt2", "gptj", "gpt_neox", "vit", "distilbert", "t5", "bert", "opt", "bart"]
TOLERANCE = 1e-5  # of the largest output


def families(names=FAMILIES):
    return pytest.mark.parametrize("name", list(names))


def built(name):
    """A model, its stack, its inputs and what it gives for them."""
    family = FAMILIES[name]
    model = family.build(name)
    inputs = tiny_inputs(model)
    return model, Anatomy(model).stack(family.stack), inputs, forward(model, inputs)


def noise(*shape, seed=7, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_units(width, count, seed=8):
    """`count` of `width` hidden units, in no order."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:count]


def assert_close(got, expected, reference=None):
    """Equal but for rounding and, when the unchanged model's output is given, not because nothing was changed."""
    size = expected.abs().max()
    assert (got - expected).abs().max() <= TOLERANCE * size
    assert reference is None or (expected - reference).abs().max() > 1e-3 * size, "the oracle changes nothing"


@contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrix_of(module):
    """The weight that multiplies from the right."""
    weight = module.weight.detach()
    return weight if isinstance(module, Conv1D) else weight.T


def bias_of(module, width):
    return torch.zeros(width) if module.bias is None else module.bias.detach()


class Subject:
    """A tiny model of which one block is to be changed: its inputs, and what it gives for them."""

    def __init__(self, model, family):
        self.model, self.family, self.inputs = model, family, tiny_inputs(model)
        self.block = Anatomy(model).block(family.index, family.stack)
        self.reference = self.output()

    def part(self, name):
        """A module by the name that the family has for it."""
        return self.model.get_submodule(self.family.path(getattr(self.family, name)))

    def output(self, *handles):
        """What the model gives now, with these hooks, which go again."""
        with hooked(*handles):
            return forward(self.model, self.inputs)

    def after(self, plan, undo=None):
        """What it gives when a plan was carried out."""
        carry_out(plan, self.model, undo or Undo())
        return self.output()

    def masked(self, units):
        """What the original gives when all other hidden units are put to zero just before the last projection."""
        mask = torch.zeros(self.family.width)
        mask[units] = 1
        last = self.part("last")
        return self.output(last.register_forward_pre_hook(lambda module, args: (args[0] * mask, *args[1:])))

    def with_linear(self, matrix, bias=0.0):
        """What the original gives when x·W + b takes the place of what its FFN makes of x."""
        seen = []

        def take(module, args):
            seen.append(args[0])

        def give(module, args, output):
            return (seen.pop() @ matrix + bias).view_as(output)

        first, last = self.part("first"), self.part("last")
        return self.output(first.register_forward_pre_hook(take), last.register_forward_hook(give))


def subject(name):
    return Subject(FAMILIES[name].build(name), FAMILIES[name])
