"""The edit of the residual stream: a bottleneck behind a block."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.errors import PlanError
from hf_compress.modules.bottleneck import BOTTLENECK, Bottleneck, Form, Norm, Select, through_bottleneck
from hf_compress.plan.edits import ModuleEdit, Path, short_text
from hf_compress.rewrite.site import Site


@dataclass(frozen=True)
class InsertBottleneck(ModuleEdit):
    """What comes out of a block passes through a `Bottleneck` of `width` features; see `Form` for the other fields.

    One that is gated, as while it is trained, gives place to a later one.
    """

    block: Path
    hidden: int
    width: int
    skip: float = 0.1
    norm: Norm = "kept"
    select: Select = "all"
    active: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        try:
            selects = self.form.select != "all"
        except ValueError as error:
            raise PlanError(short_text(str(error))) from None
        super().__post_init__()
        if self.width > self.hidden and not selects:
            raise PlanError(f"a bottleneck must be narrower than the stream, {self.hidden}; got {self.width} features")
        if self.active is not None and self.active > self.width:
            raise PlanError(f"of {self.width} features no {self.active} can be active")

    @property
    def form(self) -> Form:
        return Form(self.skip, self.norm, self.select, self.active, self.gated)

    def describe(self) -> str:
        active = f", {self.active} of them active" if self.active is not None else ""
        return f"{self.width} features of a stream of {self.hidden}{active}"

    def restructure(self, site: Site) -> None:
        block = site.module(self.block)
        there = block._modules.get(BOTTLENECK)
        if there is not None and not (isinstance(there, Bottleneck) and there.form.gated):
            raise PlanError(f"{self.block} has a bottleneck already; put it behind another block")
        examples = [parameter for parameter in block.parameters() if self.hidden in parameter.shape]
        if not examples:
            raise PlanError(f"nothing in {self.block} is {self.hidden} wide, as the plan says of its residual stream")
        example = min(examples, key=lambda parameter: parameter.ndim > 1)  # the first vector, or else the first
        bottleneck = Bottleneck(self.hidden, self.width, self.form, device="meta", dtype=example.dtype)
        site.undo.put(block._modules, BOTTLENECK, bottleneck.train(block.training))
        if there is None:
            # First of all hooks: those by which Transformers collects hidden states, on a model that has been asked for
            # them, would otherwise see what the block gave. On a model that is loaded there are none yet.
            site.undo.later(block.register_forward_hook(through_bottleneck, prepend=True).remove)
