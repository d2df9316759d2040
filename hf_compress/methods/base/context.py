"""What a method works on while it decides: the model, its anatomy, and calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from traceback import walk_tb

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.residency import resident
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.state import accept
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import Calibration
from hf_compress.calibration.memory import working_memory
from hf_compress.errors import CalibrationError, PlanError, UnsupportedModelError, one_line
from hf_compress.methods.base.journal import Journal
from hf_compress.numerics.aside import Spare
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import Change, change_modules
from hf_compress.rewrite.record import unsealed


@dataclass
class Drafts:
    """What a method has carried out on a model while it decides; see `CalibrationContext.drafts`.

    Attributes:
        keeps_tensors: whether the plan has the drafts' tensors.
        plan: all drafts as one.
        undo: takes them back.
        journal: keeps those that are finished.
    """

    model: PreTrainedModel
    keeps_tensors: bool
    plan: Plan = field(default_factory=Plan)
    undo: Undo = field(default_factory=Undo)
    journal: Journal = field(default_factory=Journal)
    _aside: Spare = field(default_factory=lambda: working_memory().spare())

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Hold a module in memory while drafts change it, and nothing else.

        What an offloaded one was, its files still tell, so that none of its old tensors are kept to take drafts back.
        Those of one in memory are put into files afterwards, where there is room, so that a model is not held twice.
        """
        if not is_offloaded(module):
            yield
            self.undo.set_aside(chain(self.model.parameters(), self.model.buffers()), self._aside.put)
            return
        lasting, self.undo = self.undo, Undo()
        try:
            with resident(module, lasting):
                try:
                    yield
                except BaseException:
                    self.undo.rollback()
                    raise
        finally:
            lasting.changed += self.undo.changed
            self.undo = lasting

    def add(self, draft: Plan) -> None:
        """Carry a draft out. It takes no blocks out."""
        done = change_modules(draft, self.model, self.undo)
        accept(self.undo.changed)
        self.plan = self.plan.then(done if self.keeps_tensors else Plan(done.edits, {}, done.notes))

    def rewrite(self, names: Iterable[str]) -> None:
        """Have the plan give parameters, by their names, the values that they have now; `undo` knows the old ones."""
        if not self.keeps_tensors:
            return
        tensors = {}
        for name in names:
            with resident(self.model.get_submodule(name.rpartition(".")[0])):
                tensors[name] = self.model.get_parameter(name).detach().clone()
        self.plan = self.plan.then(Plan((), tensors))

    def take_back(self) -> None:
        """Leave the model as it was before the first draft, and the plan empty."""
        self.undo_all()
        self.plan = Plan()

    def undo_all(self) -> None:
        """Leave the model as it was before the first draft."""
        changed = self.undo.changed
        self.undo.rollback()
        accept(changed)


@dataclass
class CalibrationContext:
    """A model and calibration data, for a method to make a plan from.

    A method may try changes out on the model, inside `trial()`; it is as it was when the trial ends.

    Attributes:
        model: the model to decide about.
        data: calibration data, or None.
        seconds: how long each stage of planning took.
        change: of the model, where what the method carries out on it is to stay; None where it is to make a plan.
        journal: keeps results that took time, so that a run which is repeated goes on behind them.
    """

    model: PreTrainedModel
    data: Calibration | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    change: Change | None = None
    journal: Journal = field(default_factory=Journal)

    @property
    def anatomy(self) -> Anatomy:
        """The model's anatomy as it is now."""
        return Anatomy(self.model)

    @property
    def calibration(self) -> Calibration:
        """The calibration data; CalibrationError where there is none."""
        if self.data is None:
            raise CalibrationError("this method needs calibration data: pass calibration=, such as texts")
        return self.data

    def stack(self, path: str | None) -> Stack:
        """The residual stack to work on; see `Anatomy.stack`."""
        return self.anatomy.stack(path)

    def trial(self) -> Undo:
        """Changes made through it last until the end of the `with` block that it opens."""
        return Undo()

    @contextmanager
    def drafts(self) -> Iterator[Drafts]:
        """Drafts carried out on the model one after another, each made for what the last one has left.

        In the end the model is as it was, and their plan has the tensors. In a change that is to stay, they stay, and
        the plan has none, so that no tensor is held twice. After an error they are taken back either way.
        """
        drafts = Drafts(self.model, keeps_tensors=self.change is None, journal=self.journal)
        unsealed(Plan(), self.model, drafts.undo)  # now, and not in the turn of a block
        accept(drafts.undo.changed)
        try:
            yield drafts
            if self.change is not None:
                self.change.keep(drafts.plan.module_edits, drafts.undo)
        finally:
            drafts.undo_all()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Let errors out of the model's own code name the part: it may not run on the data, or as a method tries it.

        Raises:
            UnsupportedModelError: in the place of any other error that comes from a module of the model.
        """
        try:
            yield
        except (UnsupportedModelError, CalibrationError, PlanError, torch.OutOfMemoryError, MemoryError, ImportError):
            raise
        except Exception as error:
            if (path := _failing(self.model, error)) is None:
                raise
            raise UnsupportedModelError(
                f"{path} does not run ({one_line(error)}): either it reads sizes or weights of its parts itself, where "
                "a change of those does not reach it, or it does not take this data; take another method, or other data"
            ) from error

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a stage of planning."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def _failing(model: PreTrainedModel, error: Exception) -> str | None:
    """The path of the innermost module that an error comes from; None where our own code has raised it."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if frames[-1].f_globals.get("__name__", "").startswith("hf_compress."):
        return None
    paths = {id(module): path or type(model).__name__ for path, module in model.named_modules()}
    callers = (paths.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))
    return next((path for path in callers if path is not None), None)
