"""What modules read and the gradients at what they write, while a model is explained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_compress.calibration.capture import hooked

Consumer = Callable[[str, Tensor, Tensor], None]


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], consume: Consumer) -> Iterator[None]:
    """In every backward pass, `consume(name, x, g)` with what each module read, (…, inputs), and the gradient there."""

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0].detach()  # a hook that held the tensor itself would keep itself alive
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: consume(name, given, gradient))

        return before

    with hooked([module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]):
        yield


@contextmanager
def watch_linears(modules: Mapping[str, nn.Module], consume: Consumer) -> Iterator[None]:
    """In every backward pass, `consume(name, x, g)` with what each linear map read and the gradient at what it wrote.

    Their outer product is the gradient of its weight. The hooks go before those of the rules, which work on outputs.
    """

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0].detach()
            if isinstance(output, Tensor) and output.requires_grad:  # routers that are linear maps by class give more
                output.register_hook(lambda gradient: consume(name, given, gradient))

        return after

    with hooked([module.register_forward_hook(hook(name), prepend=True) for name, module in modules.items()]):
        yield
