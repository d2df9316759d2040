"""Models, and what reads data for them, as the commands name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    name: str, dtype: str = "auto", device: str | None = None, offload_folder: Path | None = None
) -> PreTrainedModel:
    """The model in a directory or on the Hub, with the head that it was saved with.

    Args:
        device: where it goes; "disk" to leave it there and read it when it runs.
        offload_folder: where weights go then that the disk has in another form than they are used in.

    Raises:
        ValueError: an unknown dtype.
        OSError, UnsupportedModelError: as for `load_saved`.
    """
    from hf_compress.evaluation.loading import Dtype, default_device, load_saved

    if dtype not in (known := get_args(Dtype)):
        raise ValueError(f"--dtype must be one of {', '.join(known)}; got {dtype!r}")
    check_folder(name)
    place = device or default_device()
    return load_saved(name, dtype=dtype, device_map={"": place}, offload_folder=offload_folder)


def check_folder(name: str) -> None:
    """Transformers would look for a folder that is not there on the Hub, and say so at length."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{name} holds no config.json: it is no model that save_pretrained has written")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such directory")


def how_to_load(directory: Path) -> str:
    """The Python line that loads a saved model again."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hf_compress import models
    from hf_compress.evaluation.loading import saved_class
    from hf_compress.rewrite.record import recorded

    kind, config = saved_class(str(directory))
    name = kind.__name__
    own = hasattr(models, name)
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        name = "AutoModelForCausalLM"
    plugin = "import hf_compress; " if recorded(config) or own else ""
    return f'{plugin}{"hf_compress." * own}{name}.from_pretrained("{directory}")'
