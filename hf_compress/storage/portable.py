"""A checkpoint that asks for the plugin by itself: `trust_remote_code=True` gives the model, or says what to install.

The folder gets a file of a few lines that imports hf_compress, and `config.json` an `auto_map` that names it.
Transformers reads neither unless it is given `trust_remote_code=True`. Then it looks first whether the file's imports
are there, and says `pip install hf_compress` if not (for pip the same name as hf-compress).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_compress.plan.plan import METHOD

SHIM_MODULE = "modeling_hf_compress"

# A class of its own, because Transformers marks the class it finds here as remote code, for as long as the process
# lives: every model of that class would then be saved with its source.
_SHIM = '''\
"""Loads a model that hf_compress has made smaller (pip install hf-compress)."""

import hf_compress  # noqa: F401  (Transformers then knows how to load it)
import transformers


class {name}(transformers.{name}):
    """The class of Transformers, as it is."""
'''


def make_portable(model: PreTrainedModel, folder: Path) -> bool:
    """Write the shim for `model`, saved in `folder`, if the checkpoint needs the plugin; gives whether it does.

    A plain checkpoint loads anywhere as it is, and stays as it is.

    Raises:
        ValueError: the model's class is none of Transformers, or none of its Auto classes gives it.
    """
    quantization = _read(folder / "config.json").get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return False
    write_shim(model, folder)
    return True


def write_shim(model: PreTrainedModel, folder: Path) -> None:
    """Write the shim for `model` into `folder`, and its name into the `config.json` there, whatever the checkpoint."""
    name = _own_class(model).__name__
    config = _read(folder / "config.json")
    config["auto_map"] = (config.get("auto_map") or {}) | dict.fromkeys(_auto_classes(model), f"{SHIM_MODULE}.{name}")
    (folder / f"{SHIM_MODULE}.py").write_text(_SHIM.format(name=name), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def forget_shim(config: PreTrainedConfig) -> None:
    """Take the shim out of the config of a model that was loaded without it.

    `model.save_pretrained` would write its name, but not its file, and `trust_remote_code=True` then fail.
    """
    named = getattr(config, "auto_map", None)
    if not isinstance(named, dict):  # a config from elsewhere may have anything there
        return
    config.auto_map = {k: v for k, v in named.items() if not _names_shim(v)}
    if not config.auto_map:
        del config.auto_map


def is_shim(kind: type) -> bool:
    """Whether a model's class is the one of a shim."""
    return kind.__module__.rpartition(".")[2] == SHIM_MODULE


def _names_shim(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith(f"{SHIM_MODULE}.")


def _own_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of Transformers that a model has, itself or through the shim."""
    kinds = [kind for kind in type(model).__mro__ if not is_shim(kind)]
    if getattr(transformers, kinds[0].__name__, None) is not kinds[0]:
        raise ValueError(
            f"portable=True: {kinds[0].__module__}.{kinds[0].__name__} is no model class of Transformers, so that the "
            "folder would need its source too; save with portable=False"
        )
    return kinds[0]


def _auto_classes(model: PreTrainedModel) -> list[str]:
    """The Auto classes that give this model for its config, by name."""
    own, kind = _own_class(model), type(model.config)
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or kind not in mapping:
            continue
        given = mapping[kind]
        if own in (given if isinstance(given, (list, tuple)) else (given,)):
            found.append(name)
    if not found:
        raise ValueError(f"portable=True: no Auto class of Transformers gives {own.__name__}; save with portable=False")
    return found


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
