"""What a run is known by, so that another does not go on from what it has left."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.anatomy.offloaded import values_of
from hf_compress.calibration.data import Calibration
from hf_compress.methods.base.settings import CompressionConfig
from hf_compress.numerics.fingerprint import fingerprint

_UNSAID = ("_name_or_path", "transformers_version")  # where it was loaded from, and who had written it
_PACKAGES = ("torch", "transformers", "accelerate")


def identity_of(model: PreTrainedModel, config: CompressionConfig, data: Calibration | None) -> dict[str, Any]:
    """JSON values: a hash of the model's weights and its config, the settings, a hash of the data, versions."""
    from hf_compress import __version__

    inputs = (tensor for batch in data or () for tensor in batch.inputs.values())
    return {
        "model": f"{type(model).__name__} {fingerprint(values_of(model))}",
        "config of the model": {name: value for name, value in model.config.to_dict().items() if name not in _UNSAID},
        "settings": config.to_dict(),
        "data": fingerprint(inputs),
        "device": computing_device(model).type,
        "versions": {"hf_compress": __version__} | {name: version(name) for name in _PACKAGES},
    }
