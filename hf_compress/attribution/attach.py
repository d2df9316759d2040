"""The rules of a composite put on a model, and taken off again.

What is hooked are instances: the modules of one model, and Transformers' attention functions for as long as it lasts,
which all other models go through unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers import activations as transformers_activations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.heads import ROLES
from hf_compress.anatomy.parts import is_linear, is_norm, linear_widths
from hf_compress.anatomy.undo import Undo
from hf_compress.attribution.composites import Composite, resolve
from hf_compress.attribution.rules import Rule
from hf_compress.calibration.capture import hooked
from hf_compress.errors import UnsupportedModelError
from hf_compress.modules.experts import SeparateExperts


@contextmanager
def lrp_rules(model: PreTrainedModel, composite: str | Composite = "attnlrp", epsilon: float = 0.0) -> Iterator[None]:
    """Give every module of `model` its backward rule; what it computes stays as it was, bit for bit.

    Args:
        composite: which rules, or the name that they are registered by.
        epsilon: of the ε-rule of linear maps, in units of their outputs; 0 leaves their gradient alone.

    Raises:
        UnsupportedModelError: a part that a rule does not fit, such as a norm that holds no single scale a token, when
            it runs.
        ValueError: an unknown composite; an ε where linear maps have a rule already.
    """
    rules = resolve(composite).with_epsilon(epsilon)
    with Undo() as undo:
        _set_attention(model, rules, undo)
        with hooked(chain(_hooks(model, rules), _gate_hooks(model, rules), _attention_hooks(model, rules))):
            yield


def _hooks(model: PreTrainedModel, composite: Composite) -> Iterator[RemovableHandle]:
    for path, module in model.named_modules():
        yield from _put(_rule_of(module, composite), path, module)


def _rule_of(module: nn.Module, composite: Composite) -> Rule | None:
    """The rule for a module by its class, or else by its kind."""
    own = next((composite.modules[kind] for kind in type(module).__mro__ if kind in composite.modules), None)
    if own is not None:
        return own
    if is_activation(module):
        return composite.activation
    if normalises(module):
        return composite.norm
    return composite.linear if is_linear(module) else None


def _put(rule: Rule | None, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
    if rule is not None:
        yield module.register_forward_hook(partial(_rule_hook, rule.at(_part(path, module))), with_kwargs=True)


def _part(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})"


def _rule_hook(rule: Rule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not isinstance(output, Tensor) and is_linear(module):  # a router, which is a linear map by class alone
        return output
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if given is None or not isinstance(output, Tensor):
        raise UnsupportedModelError(f"{rule.part} does not make one tensor of another, so relevance has no rule for it")
    return rule(module, given, output)


def _gate_hooks(model: PreTrainedModel, composite: Composite) -> Iterator[RemovableHandle]:
    """Both factors of a gated product are linear in what is read: to halve theirs, halve what they hand on."""
    factor, routing = composite.factor, composite.routing
    paths = {module: path for path, module in model.named_modules()}
    for module in model.modules():
        for linear in _gated_inputs(module):
            yield from _put(factor, paths[linear], linear)
    for stack in Anatomy(model).stacks if factor is not None or routing is not None else ():
        for index, block in enumerate(stack.blocks):
            ffn = Anatomy(model).parts(stack, index).ffn
            if ffn is not None and ffn.experts is not None:
                experts = block.get_submodule(ffn.experts)
                part, apart = _part(paths[experts], experts), isinstance(experts, SeparateExperts)
                whole = None if apart or not getattr(experts, "has_gate", True) else factor
                hook = partial(_experts_hook, _placed(whole, part), _placed(routing, part))
                yield experts.register_forward_pre_hook(hook, with_kwargs=True)
                for expert in experts.experts if isinstance(experts, SeparateExperts) and experts.gated else ():
                    yield from _put(factor, paths[expert.up], expert.up)


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


def _placed(rule: Rule | None, part: str) -> Rule | None:
    return None if rule is None else rule.at(part)


def _ruled(rule: Rule | None, module: nn.Module, value: Any) -> Any:
    """What a module is called with, by the rule for it; as it is where it has no gradient."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return rule(module, value, value) if rule is not None and real else value


def _experts_hook(
    factor: Rule | None, routing: Rule | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gated experts in one tensor read halved states; what weighs experts has a rule of its own."""
    values = [*args, *kwargs.values()]
    if len(values) != 3 or not isinstance(values[0], Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is not given states, experts and weights")
    states, index, weights = values
    new = (_ruled(factor, module, states), index, _ruled(routing, module, weights))
    return new[: len(args)], dict(zip(kwargs, new[len(args) :], strict=True))


def _set_attention(model: PreTrainedModel, composite: Composite, undo: Undo) -> None:
    """Have the attention functions of Transformers treat this model's modules by the rules."""
    rules = (composite.query, composite.key, composite.value, composite.bias)
    own = {id(module): [_placed(rule, _part(path, module)) for rule in rules] for path, module in model.named_modules()}
    table = ALL_ATTENTION_FUNCTIONS._local_mapping
    for name in {"eager", *ALL_ATTENTION_FUNCTIONS}:
        plain = table.get(name) or ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
        undo.put(table, name, _with_rules(own, plain))


def _with_rules(own: dict[int, list[Rule | None]], function: Callable[..., Any] | None) -> Callable[..., Any]:
    """An attention function with other gradients for some modules; None stands for that of a module's own family."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = function or _of_family(module, "eager_attention_forward")
        if id(module) in own:
            *states, bias = own[id(module)]
            args = tuple(_ruled(bias, module, other) for other in args)
            kwargs = {name: _ruled(bias, module, other) for name, other in kwargs.items()}
            query, key, value = map(_ruled, states, [module] * 3, (query, key, value))
        return plain(module, query, key, value, *args, **kwargs)

    return attend


def _attention_hooks(model: PreTrainedModel, composite: Composite) -> Iterator[RemovableHandle]:
    """The same for families whose attention is written out: what is linear after a projection changes no share."""
    for path, module in model.named_modules():
        children = {name: child for name, child in module.named_children() if is_linear(child)}
        found = [next((n for n in children if pattern.match(n)), None) for pattern in ROLES.values()]
        if None in found or _of_family(module, "ALL_ATTENTION_FUNCTIONS") is not None:
            continue
        for name, rule in zip(found, (composite.query, composite.key, composite.value), strict=True):
            if name is not None:
                yield from _put(rule, f"{path}.{name}", children[name])


def _of_family(module: nn.Module, name: str) -> Any:
    """What is called so in the file of a module's class, or in those of the classes that it derives from."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next((vars(file)[name] for file in files if name in vars(file)), None)
