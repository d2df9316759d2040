"""What tests of every kind do with a model."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration.capture import hooked
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` as from_pretrained loads it in a dtype: unlike model.to(), that leaves buffers in float32."""
    own = type(model)._from_config(model.config, dtype=dtype).eval()
    own.load_state_dict(model.state_dict())
    return own


def leftovers(model: PreTrainedModel) -> list[str]:
    """Hooks and replaced forwards that somebody forgot to take off."""
    found = []
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            found.append(f"hooks of {path}")
        if "forward" in vars(module):
            found.append(f"forward of {path}")
    return found


@contextmanager
def refusing(
    model: PreTrainedModel, error: type[BaseException] | tuple[type[BaseException], ...], message: str | None = None
) -> Iterator[None]:
    """What stands inside is refused in these words, and leaves the model as it was."""
    before, own = Trace.of(model), leftovers(model)
    with pytest.raises(error, match=message):
        yield
    assert before.difference(model) is None
    assert leftovers(model) == own


def is_plain(model: PreTrainedModel) -> bool:
    """Whether its structure stands in the config's own fields."""
    return getattr(model.config, "quantization_config", None) is None


def assert_reloads(
    model: PreTrainedModel, folder: Path, run: Callable[[PreTrainedModel], Tensor], **options: Any
) -> PreTrainedModel:
    """Saved and loaded again, it gives the same bit for bit, and its structure stands in the same place."""
    again = type(model).from_pretrained(save(model, folder), **options)
    with torch.no_grad():
        assert torch.equal(run(again), run(model))
    assert is_plain(again) == is_plain(model)
    return again


@contextmanager
def watching(modules: Mapping[Hashable, nn.Module]) -> Iterator[dict[Any, tuple[Tensor, Tensor]]]:
    """What each module reads and writes when it last runs inside, by its key."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def keep(key: Hashable) -> Callable[..., None]:
        return lambda module, args, output: seen.update({key: (args[0].detach(), output)})

    with hooked(module.register_forward_hook(keep(key)) for key, module in modules.items()):
        yield seen


def saved_and_loaded(model: PreTrainedModel, folder: Path, inputs: dict[str, Tensor]) -> PreTrainedModel:
    """`model` from the files that it is saved to; it has to give the same for these inputs."""
    return assert_reloads(model, folder, lambda one: forward(one, inputs))
