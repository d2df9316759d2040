"""What a run is known by, so that another does not go on from what it has left."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.anatomy.offloaded import values_of
from hf_compress.calibration.data import Calibration
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.fingerprint import fingerprint
from hf_compress.training.heal_config import HealConfig

_UNSAID = ("_name_or_path", "architectures", "transformers_version")  # how it was saved, and not what it is
_PACKAGES = ("torch", "transformers", "accelerate")


def identity_of(
    model: PreTrainedModel,
    config: CompressionConfig | HealConfig | None,
    data: Calibration | None,
    device: str | torch.device | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """JSON values: a hash of the model's weights and its config, the settings, a hash of the data, versions.

    Args:
        config: the settings of the run; None where it is of several.
        device: where it is computed; where the model is when None.
        processes: how many share the work.
    """
    from hf_compress import __version__

    return {
        "model": f"{type(model).__name__} {fingerprint(values_of(model))}",
        "config of the model": {name: value for name, value in model.config.to_dict().items() if name not in _UNSAID},
        **({} if config is None else {"settings": config.to_dict()}),
        "data": fingerprint(tensors_of(data)),
        "device": torch.device(device or computing_device(model)).type,
        "processes": processes,
        "versions": {"hf_compress": __version__} | {name: version(name) for name in _PACKAGES},
    }


def tensors_of(data: Calibration | None) -> Iterator[Tensor]:
    """All that data tells a method."""
    for batch in data or ():
        others = (batch.real, batch.labels, batch.targets, batch.decoded)
        yield from (tensor for tensor in (*batch.inputs.values(), *others) if tensor is not None)


def known_in_memory(model: PreTrainedModel) -> str:
    """What a model is known by of which nothing is read for it: names, and a hash of what is in memory."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return f"{[name for name, _ in named]} {fingerprint(tensor for _, tensor in named if not tensor.is_meta)}"
