"""Edits of dense FFNs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from torch import nn

from hf_compress.anatomy.parts import linear_widths
from hf_compress.errors import PlanError
from hf_compress.modules.activation import BLENDS, Blend, BlendedActivation
from hf_compress.plan.edits import ModuleEdit, Path, Paths, short
from hf_compress.rewrite.site import Site, resized, set_width, shared_scope


@dataclass(frozen=True)
class NarrowFFN(ModuleEdit):
    """An FFN has fewer hidden units.

    Attributes:
        inputs: the projections from the residual stream to the hidden units: up, or gate and up, or both in one.
        output: the projection back.
        width: hidden units left.
        bias: whether the output projection gets a bias that it did not have.
    """

    inputs: Paths
    output: Path
    width: int
    bias: bool = False

    def describe(self) -> str:
        return f"{self.width} hidden units" + (", the output with a bias" if self.bias else "")

    def restructure(self, site: Site) -> None:
        output = site.linear(self.output)
        old, hidden = linear_widths(output)
        linears = {path: site.linear(path) for path in self.inputs}
        if self.width > old:
            raise PlanError(f"the FFN of {self.output} has {old} hidden units; the plan asks for {self.width}")
        self._refuse_other_parts(site, old, hidden)
        for path, linear in linears.items():
            inputs, outputs = linear_widths(linear)
            if inputs != hidden or outputs not in (old, 2 * old):
                raise PlanError(
                    f"{path} maps {inputs} to {outputs} and is no input of an FFN {hidden} → {old} → {hidden}"
                )
            site.replace(path, resized(linear, inputs, self.width * (outputs // old)))
        bias = self.bias or output.bias is not None
        site.replace(self.output, resized(output, self.width, hidden, bias))
        for owner in {path.rpartition(".")[0] for path in (*self.inputs, self.output)}:
            set_width(site, owner, old, self.width)

    def _refuse_other_parts(self, site: Site, width: int, hidden: int) -> None:
        """An FFN with, say, a norm of its hidden units cannot be narrowed by its projections alone."""
        paths = (*self.inputs, self.output)
        scope = shared_scope(paths)
        if not scope or width == hidden:  # then nothing tells such parts from those of the stream
            return
        for name, tensor in site.module(scope).named_parameters():
            if width in tensor.shape and not f"{scope}.{name}".startswith(tuple(f"{path}." for path in paths)):
                raise PlanError(f"{scope}.{name} is {tuple(tensor.shape)}: it, too, has an entry for each hidden unit")


@dataclass(frozen=True)
class LinearFFN(ModuleEdit):
    """An FFN is one linear map.

    Attributes:
        inputs, output: as for `NarrowFFN`. What is left goes by the name of the output projection and, with a rank, of
            the last input projection.
        rank: of the map, which is then the product of two; full when None.
        bias: whether the map has a bias.
        activation: of the FFN; needed where it stands in the block itself, beside other parts.
    """

    inputs: Paths
    output: Path
    rank: int | None = None
    bias: bool = True
    activation: Path | None = None
    leaves: ClassVar = "one linear map"
    replaces_ffn: ClassVar = True

    def describe(self) -> str:
        maps = f"two linear maps of rank {self.rank}" if self.rank else "one linear map"
        return maps if self.bias else f"{maps}, no bias"

    def restructure(self, site: Site) -> None:
        output = site.linear(self.output)
        inner, hidden = linear_widths(output)
        for path in self.inputs:
            if linear_widths(site.linear(path))[0] != hidden:
                raise PlanError(f"{path} does not read a stream of width {hidden}, to which {self.output} writes")
        if self.rank is not None and self.rank > min(inner, hidden):
            raise PlanError(
                f"the FFN of {self.output} is {hidden} → {inner} → {hidden}; the plan asks for rank {self.rank}"
            )
        last = resized(output, self.rank or hidden, hidden, self.bias)
        first = resized(site.linear(self.inputs[-1]), hidden, self.rank, False) if self.rank else None
        paths = self.map_paths(site)
        if scope := _scope_of(site, (*self.inputs, self.output)):
            layers = [first, last] if first else [last]
            named = zip((_name(path) for path in paths), layers, strict=True)
            site.replace(scope, nn.Sequential(OrderedDict(named)))
            return
        site.replace(self.output, last)
        if scope := _scope_of(site, self.inputs):
            site.replace(scope, nn.Sequential(OrderedDict([(_name(paths[0]), first)] if first else [])))
        elif len(self.inputs) == 1 and self.activation is not None:
            if not isinstance(site.module(self.activation), BlendedActivation):
                _activation(site, self.activation)
            site.replace(self.inputs[0], first or nn.Identity())
            site.replace(self.activation, nn.Identity())
        else:
            raise PlanError(
                f"the FFN of {self.output} stands among other parts of its block and cannot be one linear map"
            )

    def map_paths(self, site: Site) -> tuple[str, ...]:
        """Where the maps stand that it is left with: with a rank, the first factor, and the last map.

        They take the places and names of the last input projection and of the output projection. Where all that holds
        those is replaced, a name tells the way that there was to it.
        """
        first, last = self.inputs[-1], self.output
        if whole := _scope_of(site, (*self.inputs, self.output)):
            first, last = _directly_in(whole, first), _directly_in(whole, last)
        elif scope := _scope_of(site, self.inputs):
            first = _directly_in(scope, first)
        return (first, last) if self.rank else (last,)


def _directly_in(scope: str, path: str) -> str:
    return f"{scope}.{path[len(scope) + 1 :].replace('.', '_')}"


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _scope_of(site: Site, paths: tuple[str, ...]) -> str:
    """The innermost module that holds all of `paths` and has no tensors but theirs; "" where there is none."""
    scope = shared_scope(paths)
    if not scope:
        return ""
    inside = set().union(*(site.tensors(path) for path in paths))
    blended = [path for path, module in site.module(scope).named_modules() if isinstance(module, BlendedActivation)]
    inside = inside.union(*(site.tensors(f"{scope}.{path}") for path in blended))  # which goes with the FFN
    # The other parts of the module are gone with it, so an FFN with a norm or a convolution inside is no such module.
    module = site.module(scope)  # of which one tensor is seldom looked at: it may be all of the model
    return scope if all(tensor in inside for tensor in chain(module.parameters(), module.buffers())) else ""


@dataclass(frozen=True)
class ReplaceActivation(ModuleEdit):
    """An activation is blended with what a linear map can absorb; see `BlendedActivation`."""

    activation: Path
    blend: Blend
    width: int | None = None

    def __post_init__(self) -> None:
        if self.blend not in BLENDS:
            raise PlanError(f"blend must be one of {', '.join(BLENDS)}; got {short(self.blend)}")
        if (self.blend == "constant") != (self.width is not None):
            raise PlanError(
                f'width is for the blend "constant", and needed there; got {short(self.width)} with {self.blend}'
            )
        super().__post_init__()

    def describe(self) -> str:
        return f"blended with {self.blend}"

    def restructure(self, site: Site) -> None:
        activation = _activation(site, self.activation)
        dtype = next(site.model.parameters()).dtype
        site.replace(self.activation, BlendedActivation(activation, self.blend, self.width, device="meta", dtype=dtype))


def _activation(site: Site, path: str) -> nn.Module:
    module = site.module(path)
    if any(True for _ in module.children()) or any(True for _ in module.parameters()):
        raise PlanError(f"the plan takes {path} for an activation, but it is {type(module).__name__} with parts")
    return module
