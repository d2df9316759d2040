"""What rounding errors cost: the Fisher information of the model's outputs, for each linear map.

An error Δ of a weight moves what the linear map writes by Δ x, and the distribution of the model's outputs by a
Kullback-Leibler divergence of about ½ E (gᵀ Δ x)², g being the gradient, there, of the log-probability of an output
that is drawn from the model. With the entries of g taken as independent of each other and of x, as K-FAC has it
(J. Martens and R. Grosse, arXiv 1503.05671), that is ½ Σ_i E g_i² · (Δ G Δᵀ)_ii, where G = E x xᵀ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.anatomy.dispatch import is_offloaded
from hf_compress.anatomy.stacks import Stack
from hf_compress.anatomy.undo import Undo
from hf_compress.attribution.passes import set_gradient
from hf_compress.calibration.capture import forward, hooked, inference, watch_encoded
from hf_compress.calibration.data import Batch
from hf_compress.calibration.descent import NOT_BY_BLOCKS, Descent
from hf_compress.calibration.memory import working_memory
from hf_compress.calibration.objective import drawn_gradient, draws, first_tensor
from hf_compress.calibration.processes import summed_by_name
from hf_compress.calibration.progress import bar
from hf_compress.calibration.routing import watch_routes
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import Streams
from hf_compress.errors import CalibrationError, UnsupportedModelError, one_line
from hf_compress.methods.lrp.linears import linears_of
from hf_compress.methods.lrp.scores import real_rows
from hf_compress.numerics.aside import Aside

logger = logging.getLogger(__name__)


@dataclass
class Energies:
    """Sums over tokens, float32, by the path of the linear map.

    Attributes:
        read: Σ x_j² over real tokens, (inputs); of no map where they are not `wanted`.
        gradients: Σ g_i² at what it writes, (outputs); 0 where nothing hangs on that. Over all tokens, for the outputs
            of a classifier hang on its special ones; at padding it is 0 of itself.
        rows: how many real tokens there were.
    """

    read: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    wanted: bool = True

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        rows = {path: torch.tensor(count) for path, count in self.rows.items()}
        tables = {"read": self.read, "gradients": self.gradients, "rows": rows}
        return {f"{name}/{path}": tensor for name, table in tables.items() for path, tensor in table.items()}

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Energies:
        """The inverse of `state`."""
        found = Energies()
        for key, tensor in state.items():
            name, path = key.split("/", 1)
            getattr(found, name)[path] = int(tensor) if name == "rows" else tensor
        return found

    def reduce(self) -> None:
        """Make these the sums over the batches of all processes."""
        rows = {path: torch.tensor(count) for path, count in self.rows.items()}
        for table in (self.read, self.gradients, rows):
            summed_by_name(table)
        self.rows = {path: int(count) for path, count in rows.items()}

    def of_outputs(self, path: str) -> Tensor:
        """E g_i², (outputs)."""
        return self.gradients[path] / max(1, self.rows[path])


def energies(
    streams: Streams,
    linears: Mapping[str, nn.Module],
    seed: int,
    aside: Aside | None = None,
    of_inputs: bool = True,
) -> Energies:
    """Energies of inputs and of gradients of drawn outputs, in a forward and a backward pass a batch.

    Over the batches of all processes.

    Args:
        streams: of some batches; where they are not kept yet, they are, in one more pass.
        aside: where energies go; each as its block has been passed.
        of_inputs: whether those of inputs are wanted too.

    Raises:
        UnsupportedModelError: no gradients come through the model.
        CalibrationError: NaN or infinite outputs or gradients.
    """
    model = streams.model
    with inference(model), Undo() as undo:
        for parameter in model.parameters():
            set_gradient(parameter, False, undo)
        found = Energies(wanted=of_inputs)
        try:
            _block_by_block(streams, linears, seed, found, aside or working_memory().aside())
        except torch.OutOfMemoryError:
            raise
        except NOT_BY_BLOCKS:
            if is_offloaded(model):
                raise
            found = Energies(wanted=of_inputs)
            _at_once(streams, linears, seed, found)
    found.reduce()
    blind = [path for path, sums in found.gradients.items() if not bool(sums.any())]
    if len(blind) == len(found.gradients):
        raise _no_gradients("they are all 0")
    if blind:
        logger.warning(
            "no gradient reaches %s and %d other linear maps, which get the fewest bits", blind[0], len(blind) - 1
        )
    for path, sums in found.gradients.items():
        if not bool(torch.isfinite(sums).all()):
            raise CalibrationError(f"gradients at {path} hold NaN or infinity: load the model in float32 or bfloat16")
    return found


@torch.enable_grad()
def _at_once(streams: Streams, linears: Mapping[str, nn.Module], seed: int, found: Energies) -> None:
    """In passes of the whole model."""
    batches = [runner.batch for runner in streams.runners]
    for number, batch in bar(list(zip(streams.numbers, batches, strict=True)), "drawing outputs"):
        with _watched(streams.stack, batch, linears, found):
            output = forward(streams.model, batch)
            _backward(first_tensor(output), drawn_gradient(streams.model, output, batch, draws(seed, number)))


def _block_by_block(
    streams: Streams, linears: Mapping[str, nn.Module], seed: int, found: Energies, aside: Aside
) -> None:
    """The same with one block at a time in memory, or its graph."""

    @torch.enable_grad()
    def drawn(runner: BlockRunner, stream: Tensor) -> Tensor:
        given = stream.detach().requires_grad_()
        output = runner.finish(given.clone())
        generator = draws(seed, numbers[runner])
        _backward(first_tensor(output), drawn_gradient(streams.model, output, runner.batch, generator))
        return torch.zeros_like(given) if given.grad is None else given.grad

    numbers = dict(zip(streams.runners, streams.numbers, strict=True))
    if not streams.streams:
        streams.keep()
    descent = Descent(streams, drawn, through_first=False)
    for index in descent.blocks("drawing outputs"):
        inner = linears_of(streams.stack, index, linears)
        for place, runner in enumerate(streams.runners):
            with _watched(streams.stack, runner.batch, inner, found):
                descent.take_past(index, place)
        for table in (found.read, found.gradients):
            table |= {path: aside.put(table[path]) for path in inner if path in table}


@contextmanager
def _watched(stack: Stack, batch: Batch, linears: Mapping[str, nn.Module], found: Energies) -> Iterator[None]:
    """While a batch runs, forward and backward, all energies go into `found`."""

    def hook(path: str) -> Callable[..., Tensor]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows = real_rows(stack, batch, args[0], routes.get(module), encoded).detach()
            if found.wanted:
                _add(found.read, path, rows.float().square().sum(dim=0))
            found.rows[path] = found.rows.get(path, 0) + len(rows)
            found.gradients.setdefault(path, torch.zeros(output.shape[-1], dtype=torch.float32, device=output.device))
            traced = output if output.requires_grad else output.detach().requires_grad_()
            traced.register_hook(lambda g: _add(found.gradients, path, g.float().square().flatten(0, -2).sum(dim=0)))
            return output if traced is output else traced.clone()  # some families write into it

        return after

    hooks = (module.register_forward_hook(hook(path)) for path, module in linears.items())
    with watch_routes(stack.blocks) as routes, watch_encoded(stack) as encoded, hooked(hooks):
        yield


def _backward(output: Tensor, start: Tensor) -> None:
    """Take a gradient from the outputs back to the first linear maps, or to embeddings that were made to require it."""
    if not output.requires_grad:
        raise _no_gradients("its outputs have none")
    try:
        torch.autograd.backward(output, start)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise _no_gradients(one_line(error)) from error


def _no_gradients(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"gradients, which bits are given by, do not come through the model ({why}): take allocation='error'"
    )


def _add(table: dict[str, Tensor], path: str, value: Tensor) -> None:
    table[path] = table[path] + value if path in table else value
