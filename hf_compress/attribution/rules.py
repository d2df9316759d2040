"""The rules of relevance propagation put on a model, and taken off again.

Linear maps keep their gradient (the ε-rule divides it by 1 + ε/|z|); elementwise activations hand it on by f(x) / x;
norms hold their scale fast; of a gated product each factor gets half. Attention gives half to the values, the softmax
keeps its own gradient, and what it hands on is shared by queries and keys; or, as CP-LRP has it, all goes to the
values. Sources: AttnLRP (arXiv 2402.05602), section 3; CP-LRP: A. Ali et al., 2022 (arXiv 2202.07304).

What is hooked are instances: the modules of one model, and Transformers' attention functions for as long as it lasts,
which all other models go through unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers import activations as transformers_activations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.heads import ROLES
from hf_compress.anatomy.parts import is_linear, is_norm, linear_widths
from hf_compress.anatomy.undo import Undo
from hf_compress.attribution.gradients import NormRule, scale_gradient, through_origin
from hf_compress.calibration.capture import hooked
from hf_compress.errors import CalibrationError, UnsupportedModelError
from hf_compress.modules.experts import SeparateExperts

AttentionRule = Literal["attnlrp", "cp"]
ATTENTION_RULES: tuple[AttentionRule, ...] = get_args(AttentionRule)
_SHARES: dict[AttentionRule, tuple[float, float, float]] = {"attnlrp": (0.25, 0.25, 0.5), "cp": (0.0, 0.0, 1.0)}


@contextmanager
def lrp_rules(model: PreTrainedModel, attention: AttentionRule = "attnlrp", epsilon: float = 0.0) -> Iterator[None]:
    """Give every module of `model` its backward rule; what it computes stays as it was, bit for bit.

    Args:
        attention: how relevance passes a softmax.
        epsilon: of the ε-rule of linear maps, in units of their outputs; 0 leaves their gradient alone.

    Raises:
        UnsupportedModelError: a normalisation that holds no single scale a token, when it runs.
    """
    with Undo() as undo:
        _set_attention(model, attention, undo)
        with hooked(chain(_hooks(model, epsilon), _gate_hooks(model), _attention_hooks(model, attention))):
            yield


def _hooks(model: PreTrainedModel, epsilon: float) -> Iterator[RemovableHandle]:
    for path, module in model.named_modules():
        if is_activation(module):
            yield module.register_forward_hook(_activation_hook)
        elif normalises(module):
            yield module.register_forward_hook(_NormHook(f"{path} ({type(module).__name__})"))
        elif epsilon and is_linear(module):
            yield module.register_forward_hook(partial(_epsilon_hook, epsilon))


def _gate_hooks(model: PreTrainedModel) -> Iterator[RemovableHandle]:
    """Both factors of a gated product are linear in what is read: to halve theirs, halve what they hand on."""
    for module in model.modules():
        for linear in _gated_inputs(module):
            yield linear.register_forward_hook(partial(_scale_hook, 0.5))
    for stack in Anatomy(model).stacks:
        for index, block in enumerate(stack.blocks):
            ffn = Anatomy(model).parts(stack, index).ffn
            if ffn is not None and ffn.experts is not None:
                experts = block.get_submodule(ffn.experts)
                yield experts.register_forward_pre_hook(_experts_hook, with_kwargs=True)
                for expert in experts.experts if isinstance(experts, SeparateExperts) and experts.gated else ():
                    yield expert.up.register_forward_hook(partial(_scale_hook, 0.5))


def _gated_inputs(module: nn.Module) -> list[nn.Module]:
    """Of a gated FFN, what reads its input: gate and up apart, or in one matrix; nothing of other modules."""
    children = list(module.children())
    linears = [child for child in children if is_linear(child)]
    for output in reversed(linears) if any(map(is_activation, children)) else []:  # the last, where all are square
        inputs = [linear for linear in linears if linear is not output]
        width, hidden = linear_widths(output)
        if [linear_widths(linear) for linear in inputs] in ([(hidden, width)] * 2, [(hidden, 2 * width)]):
            return inputs
    return []


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise nonlinearity."""
    kind = type(module)
    known = kind.__module__ in (transformers_activations.__name__, nn.ReLU.__module__)
    mixes = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention, nn.GLU)
    return known and not isinstance(module, mixes) and not any(True for _ in module.children())


def normalises(module: nn.Module) -> bool:
    """Whether a module is a norm that looks at its input; a batch norm only scales by what it has learned."""
    return is_norm(module) and "batchnorm" not in type(module).__name__.lower()


def _activation_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return through_origin(module, args[0], output)


class _NormHook:
    """The rule of one normalisation, found when it first runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rule: NormRule | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        given = args[0] if args else None
        if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            raise CalibrationError(f"{self.name} gives NaN or infinite values on this data")
        if isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape:
            self.rule = self.rule or NormRule.of(module, given.detach(), output.detach())
            if self.rule is not None:
                return self.rule.apply(given, output)
        raise UnsupportedModelError(
            f"{self.name} is no normalisation by one scale a token, so relevance has no rule for it"
        )


def _epsilon_hook(epsilon: float, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):  # a router, which is a linear map by class alone
        return output
    size = output.detach().abs()
    return scale_gradient(output, size / (size + epsilon))


def _scale_hook(factor: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return scale_gradient(output, factor) if factor else output.detach()


def _experts_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Experts in one tensor read halved states, if they are gated; the router's weights count as constants."""
    values = [*args, *kwargs.values()]
    if len(values) != 3 or not isinstance(values[0], Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is not given states, experts and weights")
    states, index, weights = values
    if not isinstance(module, SeparateExperts) and getattr(module, "has_gate", True):
        states = scale_gradient(states, 0.5)
    new = (states, index, weights.detach())
    return new[: len(args)], dict(zip(kwargs, new[len(args) :], strict=True))


def _set_attention(model: PreTrainedModel, rule: AttentionRule, undo: Undo) -> None:
    """Have the attention functions of Transformers treat this model's modules by the rule."""
    own = frozenset(map(id, model.modules()))
    table = ALL_ATTENTION_FUNCTIONS._local_mapping
    for name in {"eager", *ALL_ATTENTION_FUNCTIONS}:
        undo.put(table, name, _ruled(rule, own, table.get(name) or ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)))


def _ruled(rule: AttentionRule, own: frozenset[int], function: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function with other gradients for some modules; None stands for that of a module's own family."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = function or _of_family(module, "eager_attention_forward")
        if id(module) in own:
            args = tuple(map(_held, args))  # in the mask may be a bias by distance
            kwargs = {name: _held(value) for name, value in kwargs.items()}
            query, key, value = (
                scale_gradient(tensor, factor) if factor else tensor.detach()
                for tensor, factor in zip((query, key, value), _SHARES[rule], strict=True)
            )
        return plain(module, query, key, value, *args, **kwargs)

    return attend


def _held(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _attention_hooks(model: PreTrainedModel, rule: AttentionRule) -> Iterator[RemovableHandle]:
    """The same rule for families whose attention is written out: what is linear after a projection changes no share."""
    for module in model.modules():
        children = {name: child for name, child in module.named_children() if is_linear(child)}
        found = [next((c for n, c in children.items() if pattern.match(n)), None) for pattern in ROLES.values()]
        if None in found or _of_family(module, "ALL_ATTENTION_FUNCTIONS") is not None:
            continue
        for linear, factor in zip(found, _SHARES[rule], strict=True):
            assert linear is not None
            yield linear.register_forward_hook(partial(_scale_hook, factor))


def _of_family(module: nn.Module, name: str) -> Any:
    """What is called so in the file of a module's class, or in those of the classes that it derives from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next((vars(file)[name] for file in files if name in vars(file)), None)
