"""Tiny models whose weights accelerate reads from the disk, and how often it does."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn
from transformers import PreTrainedModel

EVERYTHING = {"": "disk"}


def offloaded(
    model: PreTrainedModel, folder: Path, device_map: dict[str, str] | None = None, shard: str = "5GB", **options: Any
) -> PreTrainedModel:
    """A model saved to `folder` and loaded from there, all of it on the disk unless a device map says otherwise."""
    model.save_pretrained(folder / "saved", max_shard_size=shard)
    return (
        type(model)
        .from_pretrained(
            folder / "saved", device_map=device_map or EVERYTHING, offload_folder=folder / "offloaded", **options
        )
        .eval()
    )


def logits_of(model: PreTrainedModel) -> Tensor:
    """What a model makes of four texts of seven random tokens."""
    ids = torch.randint(
        4, model.config.get_text_config().vocab_size, (4, 7), generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def in_memory(module: nn.Module) -> list[str]:
    """The names of the parameters that are no placeholders."""
    return [name for name, parameter in module.named_parameters() if not parameter.is_meta]


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """How often each offloaded tensor is read meanwhile."""
    reads: Counter[str] = Counter()
    read = OffloadedWeightsLoader.__getitem__

    def counted(self: OffloadedWeightsLoader, key: str) -> Tensor:
        reads[key] += 1
        return read(self, key)

    OffloadedWeightsLoader.__getitem__ = counted
    try:
        yield reads
    finally:
        OffloadedWeightsLoader.__getitem__ = read


def mapped_bytes():
    """Of this process's memory, what lies in files without names."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if "hf_compress-" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))
