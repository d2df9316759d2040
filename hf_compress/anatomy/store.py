"""Files for the weights of offloaded models that have changed since they were read from their checkpoint."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn

from hf_compress.anatomy.dispatch import aligning_hook
from hf_compress.errors import OffloadError, one_line
from hf_compress.numerics.tensor_file import write_tensors

_STORE = "hf_compress_store"  # what a hook calls the store of its model


class Store:
    """A folder of changed weights. A file goes when no module reads from it any more, with its model at the latest.

    Args:
        folder: made where it is missing. When None, a temporary one, which goes with the last of its files.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(mkdtemp(prefix="hf_compress_") if folder is None else folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def write(self, tensors: Mapping[str, Tensor]) -> StoredWeights:
        """Put tensors into a file, whole or not at all. One that several names have is written once.

        Raises:
            OffloadError: there is no room, or no folder any more.
        """
        path = self.folder / f"{uuid4().hex}.safetensors"
        first: dict[int, str] = {}
        index = {name: _entry(path, first.setdefault(id(tensor), name), tensor) for name, tensor in tensors.items()}
        try:
            write_tensors(path, {name: tensors[name] for name in first.values()}, {})
        except OSError as error:
            raise OffloadError(f"changed weights cannot be written to {path}: {one_line(error)}") from error
        return StoredWeights(self, path, index)


class StoredWeights(OffloadedWeightsLoader):
    """A file of a store, as accelerate's hooks read it; who has it keeps the file in being."""

    def __init__(self, store: Store, path: Path, index: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(index=index)
        self.store, self.path = store, path
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeights:
        """Itself, for a copy of its model: it never changes."""
        return self


def _entry(path: Path, name: str, tensor: Tensor) -> dict[str, str]:
    return {"safetensors_file": str(path), "weight_name": name, "dtype": str(tensor.dtype).removeprefix("torch.")}


def keep_changes_in(model: nn.Module, folder: str | Path) -> Store:
    """Have what changes in an offloaded model be kept in a folder of the caller's, from now on."""
    store = Store(folder)
    for module in model.modules():
        if (hook := aligning_hook(module)) is not None:
            setattr(hook, _STORE, store)
    return store


_shared: weakref.ref[Store] | None = None


def store_of(hook: AlignDevicesHook) -> Store:
    """The store of the model that a hook belongs to: the one in the folder that was named, or one for all others."""
    global _shared
    if isinstance(own := getattr(hook, _STORE, None), Store):
        return own
    store = None if _shared is None else _shared()
    if store is None:
        store = Store()
        _shared = weakref.ref(store)
    return store


def inherit_store(hook: AlignDevicesHook, of: AlignDevicesHook) -> None:
    """Have a new hook keep its changes where the others of its model do."""
    if (store := getattr(of, _STORE, None)) is not None:
        setattr(hook, _STORE, store)
