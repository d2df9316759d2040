"""What tests of every kind do with a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

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


def saved_and_loaded(model: PreTrainedModel, folder: Path, inputs: dict[str, torch.Tensor]) -> PreTrainedModel:
    """`model` from the files that it is saved to; it has to give the same for these inputs."""
    loaded = type(model).from_pretrained(save(model, folder))
    assert torch.equal(forward(loaded, inputs), forward(model, inputs))
    return loaded
