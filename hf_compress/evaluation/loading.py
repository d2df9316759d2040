"""Models from their files, as the classes that they were saved by: nothing in them is made up."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_compress import models
from hf_compress.errors import UnsupportedModelError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of weights; auto is as they are stored


def load_saved(name: str, **kwargs: Any) -> PreTrainedModel:
    """The model in a directory or on the Hub, with the head that it was saved with and all weights from its files.

    Args:
        name: a directory, or a model's name on the Hub.
        kwargs: as for `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        OSError: no model there; as Transformers says it.
        UnsupportedModelError: it was saved by a class that is not known, or weights are missing, or of other shapes
            than the config says.
    """
    load: Any = saved_class(name)[0].from_pretrained  # annotated as if it gave no loading report
    # Sizes that do not match are told here, by name; Transformers' own error points to a log.
    model, found = load(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in found["mismatched_keys"]]
    if wrong := sorted([*found["missing_keys"], *mismatched]):
        raise UnsupportedModelError(
            f"{name}: {len(wrong)} weights of {type(model).__name__}, such as {min(wrong)}, are missing there or "
            "have other shapes than its config says; they would be random"
        )
    return model


def saved_class(name: str) -> tuple[Any, PreTrainedConfig]:
    """The class that the model in a directory or on the Hub was saved by, and its config; no weights are read.

    Raises:
        OSError, UnsupportedModelError: as for `load_saved`.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:  # offline, its message does not name the model
        raise OSError(f"no model {name!r}: {error}") from error
    kind = _class_of(config.architectures, name)
    if kind is transformers.AutoModelForCausalLM:
        kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), kind)
    return kind, config


def _class_of(architectures: Any, name: str) -> Any:
    """The class that a model was saved by; the causal language model of its type where its config names none."""
    if not architectures:
        return transformers.AutoModelForCausalLM
    known = str(architectures[0] if isinstance(architectures, list) else architectures)
    kind = next((found for home in (transformers, models) if (found := getattr(home, known, None))), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{name} was saved by the class {known}, which is no model of Transformers or hf_compress: load "
            "it in Python, and give the model to the functions of hf_compress"
        )
    return kind


def default_device() -> str:
    """Where models are loaded when nobody says: a CUDA device, if there is one, or else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
