"""Keeping an optimizer in step with a model whose parameters come and go while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


@contextmanager
def following(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """After a change of `model`, its parameters are the optimizer's, as if it had been made for the changed model.

    Groups keep their number and settings, so that the learning rate schedule fits them still; a parameter that has
    taken the place of another, under its name, comes into the same group, a new one into that of the parameters with as
    many dimensions. In modules of which the optimizer had nothing, it gets nothing. Each group is in the order of
    `named_parameters`, in which a resumed run makes it too. State of parameters that are gone is dropped.
    """
    if optimizer is None:  # a Trainer makes it later
        yield
        return
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    groups = inner.param_groups
    place = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    names = {name: place[id(p)] for name, p in model.named_parameters() if id(p) in place}
    by_dimensions = {p.ndim: place[id(p)] for p in model.parameters() if id(p) in place}
    ignored = {_owner(name) for name, _ in model.named_parameters()} - {_owner(name) for name in names}
    before = {id(p) for p in model.parameters()}
    members = [[p for p in group["params"] if id(p) not in before] for group in groups]  # none of the model's
    yield
    for name, parameter in model.named_parameters():
        number = place.get(id(parameter), names.get(name))
        if number is None and parameter.requires_grad and _owner(name) not in ignored:
            number = by_dimensions.get(parameter.ndim, 0)
        if number is not None and (parameter.requires_grad or id(parameter) in place):
            members[number].append(parameter)
    for group, parameters in zip(groups, members, strict=True):
        group["params"][:] = parameters
    alive = {id(p) for group in groups for p in group["params"]}
    for parameter in [p for p in inner.state if id(p) not in alive]:
        del inner.state[parameter]


def _owner(name: str) -> str:
    """The path of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where no parameter of a model is to be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient, so there is nothing to train: call "
            "model.requires_grad_(True), or train adapters by heal(), whose lora='default' needs none"
        )
