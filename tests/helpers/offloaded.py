"""Models that are loaded with parts on the disk, and models whose weights are changed on the way there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel


def dispatched(
    model: PreTrainedModel, folder: Path, placed: dict[str, Any] | None = None, **saving: Any
) -> PreTrainedModel:
    """`model`, saved in `folder` and loaded again with its parts as `placed` says; on the disk altogether when None."""
    model.save_pretrained(folder / "checkpoint", **saving)
    placed = {"": "disk"} if placed is None else placed
    kind: Any = type(model)
    return kind.from_pretrained(folder / "checkpoint", device_map=placed, offload_folder=folder / "converted")


def every_second_block(model: PreTrainedModel, stack: str = "model.layers") -> dict[str, str]:
    """A device map that has every second block on the disk, and a head that is not tied; the rest in memory."""
    inner, _, last = stack.rpartition(".")
    placed = {f"{inner}.{name}": "cpu" for name, _ in model.get_submodule(inner).named_children() if name != last}
    blocks = {f"{stack}.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.get_submodule(stack)))}
    return placed | blocks | {"lm_head": "cpu" if model.all_tied_weights_keys else "disk"}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors in a checkpoint's files, which `change` is given by their names, a file at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (it is no dict)
        change(tensors)
        save_file(tensors, path, metadata=metadata)
