"""The arguments of the calls that users make: a model, a method's settings, and calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel

from hf_compress.anatomy.compressible import check_model
from hf_compress.calibration.compute import Compute
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from hf_compress.calibration.media import Processor
from hf_compress.methods.base.settings import CompressionConfig, config_class, settings_of


def prepared(
    data: Any, model: PreTrainedModel, tokenizer: Processor | None, options: DataOptions | None
) -> Calibration | None:
    """Calibration data in batches; None where there is none."""
    return None if data is None else prepare(data, model, tokenizer, options)


def check_arguments(model: Any, config: Any, settings: Mapping[str, Any]) -> CompressionConfig:
    """A method's settings; raises unless they are some, and the model is one that can be compressed."""
    _check_words(config, settings)
    config = settings_of(config, settings)
    if not isinstance(config, CompressionConfig):
        raise TypeError(
            f"config must be a method's settings, such as MKAConfig(ratio=0.25), or its name; got {config!r}"
        )
    check_model(model)
    return config


def _check_words(config: Any, settings: Mapping[str, Any]) -> None:
    """Raise TypeError for what is no setting but nearly an argument, or a field of one."""
    own = {field.name for field in fields(config_class(config))} if isinstance(config, str) else set()
    for name in settings.keys() - own:
        for argument, kind in (("options", DataOptions), ("compute", Compute)):
            if name in {field.name for field in fields(kind)}:
                raise TypeError(f"{name} belongs inside {argument}=, as {argument}={kind.__name__}({name}=…)")
        if close := get_close_matches(name, ("calibration", "tokenizer", "options", "compute"), n=1):
            raise TypeError(f"there is no argument {name!r} (did you mean {close[0]!r}?)")
