"""Keeping an optimizer in step with a model whose parameters come and go while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer


@contextmanager
def following(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """After a change of `model`, its parameters are the optimizer's, as if it had been made for the changed model.

    Groups keep their number and settings, so that the learning rate schedule fits them still; a parameter that has
    taken the place of another, under its name, comes into the same group, a new one into that of the parameters with as
    many dimensions. Each group is in the order of `named_parameters`, in which a resumed run makes it too. State of
    parameters that are gone is dropped.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    groups = inner.param_groups
    place = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    names = {name: place[id(p)] for name, p in model.named_parameters() if id(p) in place}
    by_dimensions = {p.ndim: place[id(p)] for p in model.parameters() if id(p) in place}
    yield
    members: list[list[nn.Parameter]] = [[] for _ in groups]
    for name, parameter in model.named_parameters():
        number = place.get(id(parameter))
        if number is None and parameter.requires_grad:
            number = names.get(name, by_dimensions.get(parameter.ndim, 0))
        if number is not None:
            members[number].append(parameter)
    for group, parameters in zip(groups, members, strict=True):
        group["params"][:] = parameters
    alive = {id(p) for p in model.parameters()}
    for parameter in [p for p in inner.state if id(p) not in alive]:
        del inner.state[parameter]
