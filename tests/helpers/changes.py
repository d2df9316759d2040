"""What the matrix does to one model: a few changes, and what must hold after each of them."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Batch
from hf_compress.errors import UnsupportedModelError
from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.parity import attention_of
from hf_compress.rewrite.probe import Probe
from tests.helpers.tiny import tiny_inputs

NEW_TOKENS = 5
LONGEST_MESSAGE = 600

Build = Callable[[], PreTrainedModel]


class MatrixFailure(AssertionError):
    """A difference, a crash or a trace left behind: what the matrix exists to find."""


@dataclass(frozen=True)
class Outcome:
    """What became of one change: `refusal` is the error's message, None where the model survived."""

    change: str
    refusal: str | None


# --- the changes ------------------------------------------------------------------------------------------------------


def removals(length: int) -> dict[str, tuple[int, ...]]:
    """The blocks to take out of a stack, by what the table calls them."""
    if length < 2:
        return {}
    wanted = {"the first": (0,), "the last": (length - 1,)}
    if length > 2:
        wanted |= {"one in the middle": (length // 2 - 1 or 1,)}
    if length > 3:
        wanted |= {"two neighbours": (length // 2 - 1, length // 2)}
    return wanted


def merge_plan(anatomy: Anatomy, stack: Stack) -> Plan | None:
    """The average of the two nearest blocks of the same kind in place of the first of them; None where all differ."""
    kinds = anatomy.kinds(stack)
    pairs = [(i, j) for j in range(len(stack)) for i in range(j) if kinds[i] == kinds[j]]
    if not pairs:
        return None
    first, second = min(pairs, key=lambda pair: (pair[1] - pair[0], pair))
    others = dict(stack.blocks[second].named_parameters(remove_duplicate=False))
    tensors = {
        f"{stack.path}.{first}.{name}": torch.lerp(own.detach(), others[name].detach(), 0.5)
        for name, own in stack.blocks[first].named_parameters(remove_duplicate=False)
    }
    return Plan((MergeBlocks(stack.path, first, (second,)),), tensors)


def left_out(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy with the plan's tensors, in which its blocks return what they are given; made without the package."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(plan.tensors, strict=False)
    for path in plan.stacks:
        for index in plan.removed(path):
            block = twin.get_submodule(path)[index]
            block.forward = _handing_through(block.forward)
    return twin


def _handing_through(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = (args[0] if args else next(iter(kwargs.values()))).clone()
        if "hidden_states" in kwargs:
            stream = kwargs["hidden_states"].clone()
        output = own(*args, **kwargs)
        if "prev_attn_output" in kwargs:  # Reformer, of which a block has two streams
            return output._replace(hidden_states=stream, attn_output=kwargs["prev_attn_output"])
        return type(output)([stream, *output[1:]]) if isinstance(output, (tuple, list)) else stream

    return forward


# --- what must hold ---------------------------------------------------------------------------------------------------


def outcomes(build: Build, path: str) -> Iterator[Outcome]:
    """Try every change of the stack at `path` on a fresh model each.

    Raises:
        MatrixFailure: the model neither survived nor was refused as it should be.
    """
    model = build()
    inputs = tiny_inputs(model)
    generates = can_generate(model, inputs)
    anatomy = Anatomy(model)
    stack = anatomy.stack(path)
    plans: dict[str, Plan | None] = {
        name: Plan((RemoveBlocks(stack.path, blocks),)) for name, blocks in removals(len(stack)).items()
    }
    plans["merging two"] = merge_plan(anatomy, stack)
    for name, plan in plans.items():
        if plan is None:
            continue
        refusal = try_change(model, plan, inputs, generates)
        yield Outcome(name, refusal)
        if refusal is None:  # a refused model is as it was, which has been checked, and serves again
            model = build()


def try_change(model: PreTrainedModel, plan: Plan, inputs: dict[str, Tensor], generates: bool) -> str | None:
    """Carry a plan out on `model` and check what comes of it. The message where it is refused."""
    forward(model, inputs)  # some models (RWKV) change themselves when they first run
    before = Trace.of(model)
    reference, twin = forward(model, inputs), left_out(model, plan)
    try:
        apply(plan, model, Probe.of(model, Batch(inputs, None)))
    except UnsupportedModelError as error:
        message = str(error)
        check_message(message, model)
        if difference := before.difference(model):
            raise MatrixFailure(f"refused ({message}), but left behind: {difference}") from error
        if not same(reference, forward(model, inputs)):
            raise MatrixFailure(f"refused ({message}), but gives other outputs than before") from error
        return message
    if not same(forward(model, inputs), forward(twin, inputs)):
        raise MatrixFailure("it gives other outputs than the original with those blocks left out")
    check_reloads(model, inputs, generates)
    return None


def check_reloads(model: PreTrainedModel, inputs: dict[str, Tensor], generates: bool) -> None:
    """Save, load with stock Transformers, and compare outputs and continuations bit for bit."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, attn_implementation=attention_of(model.config))
        own_memory(loaded)
    if not same(forward(model, inputs), forward(loaded, inputs)):
        raise MatrixFailure("the loaded model gives other outputs")
    if generates and not torch.equal(generate(model, inputs), generate(loaded, inputs)):
        raise MatrixFailure("the loaded model generates other tokens")


def own_memory(model: PreTrainedModel) -> None:
    """Copy every parameter and buffer out of the file that it is mapped from.

    Tensors in a safetensors file stand at multiples of 4 or 8 bytes, PyTorch's own at multiples of 64, and some kernels
    (grouped matrix products) sum in another order at other alignments. That is a difference in the last bit between two
    places in memory, with or without any compression.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


# --- running ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output: logits, the last hidden states, or a backbone's maps of features in one row.

    A random generator that a model may use starts anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = model(**inputs)[0]
        return first if isinstance(first, Tensor) else torch.cat([part.flatten() for part in first])


@torch.no_grad()
def generate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Greedy continuation with the model's cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


def can_generate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Whether the uncompressed model continues these inputs; some heads and some tiny models do not."""
    try:
        generate(model, inputs)
    except Exception:
        return False
    return True


def same(first: Tensor, second: Tensor) -> bool:
    """The same bits, if they have any; NaN, which no tiny model should give, is not the same as itself."""
    if first.is_meta or second.is_meta:
        return first.shape == second.shape and first.is_meta and second.is_meta
    return first.shape == second.shape and torch.equal(first, second)


def runs_of_blocks(model: PreTrainedModel) -> dict[str, list[int]]:
    """How often one forward pass of the tiny inputs runs each block of each stack."""
    runs: Counter[tuple[str, int]] = Counter()
    stacks = Anatomy(model).stacks
    for stack in stacks:
        for index, block in enumerate(stack.blocks):
            place = (stack.path, index)
            block.register_forward_pre_hook(lambda *_, place=place: runs.update([place]))
    forward(model, tiny_inputs(model))
    return {stack.path: [runs[stack.path, index] for index in range(len(stack))] for stack in stacks}


# --- a refused model must be as it was --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """All that a refused change could have left behind in a model."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    attributes: dict[str, dict[str, Any]]

    @staticmethod
    def of(model: PreTrainedModel) -> "Trace":
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return Trace(tensors, copy.deepcopy(model.config.to_dict()), _attributes(model))

    def difference(self, model: PreTrainedModel) -> str | None:
        """What tells `model` from when this was taken, in words; None where nothing does."""
        now = Trace.of(model)
        for what in ("config", "attributes"):
            then_values, now_values = getattr(self, what), getattr(now, what)
            for name in then_values.keys() | now_values.keys():
                if then_values.get(name) != now_values.get(name):
                    return f"{what}: {name} was {then_values.get(name)!r}, is {now_values.get(name)!r}"
        if list(self.tensors) != list(now.tensors):
            return "other tensors in the state dict"
        return next((name for name, tensor in now.tensors.items() if not same(tensor, self.tensors[name])), None)


def _attributes(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Every module's plain settings, its layer index and the like; a cut list of blocks would lack modules here."""
    return {
        path: {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for path, module in model.named_modules()
    }


# --- a refusal must say what is in the way ----------------------------------------------------------------------------


def check_message(message: str, model: PreTrainedModel) -> None:
    """A refusal is one line, and names a field of the config, or a part of the model by its path."""
    if "\n" in message or len(message) > LONGEST_MESSAGE:
        raise MatrixFailure(f"the refusal is no line that one can read: {message!r}")
    names = {name.lstrip("_") for name in _fields(model.config) if "_" in name}
    for path, module in model.named_modules():
        names |= {
            _any_block(f"{path}.{name}").lstrip(".") for name in (*vars(module), *dict(module.named_parameters()))
        }
    words = {_any_block(word.strip(".").removeprefix("config.")) for word in re.findall(r"[\w.]+", message)}
    if not any(word in names or any(name.startswith(f"{word}.") for name in names if "." in word) for word in words):
        raise MatrixFailure(f"the refusal names no field and no part of the model: {message!r}")


def _any_block(path: str) -> str:
    """A path without its indices: blocks have other numbers after a change than before."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", path)


def _fields(config: PreTrainedConfig) -> Iterator[str]:
    yield from vars(config)
    yield from config.attribute_map
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value)
