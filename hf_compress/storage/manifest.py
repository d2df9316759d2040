"""The list of a saved model's files with their hashes: written last, so that a folder that has it is whole.

It tells a file that was cut short, lost or mixed up on its way from the one that was written. It is not signed: whoever
can change the files can change the list.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PureWindowsPath
from typing import Any

MANIFEST_FILE = "hf_compress_manifest.json"
CARD_FILE = "README.md"

_VERSION = 1
_UNLISTED = frozenset({MANIFEST_FILE, CARD_FILE})  # a card is edited by hand, and by the Hub
_LOADABLE = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".pkl", ".py"})

Files = dict[str, dict[str, Any]]


class ManifestError(ValueError):
    """A folder does not hold what its manifest says; the message names the file."""


def describe(directory: str | Path) -> Files:
    """The hash and the size of each file in a folder, by its name.

    The card, which people edit, is left out, and so are folders inside it: nothing that `from_pretrained(directory)`
    takes a model from lies there.
    """
    paths = [path for path in sorted(Path(directory).iterdir()) if path.is_file() and path.name not in _UNLISTED]
    return {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in paths}


def write_manifest(directory: str | Path, files: Files | None = None) -> Path:
    """Write the manifest of a folder: of `files`, or of what is there now when None. Gives its path."""
    path = Path(directory) / MANIFEST_FILE
    listed = describe(directory) if files is None else files
    path.write_text(json.dumps({"version": _VERSION, "files": listed}, indent=2) + "\n", encoding="utf-8")
    return path


def verify_files(directory: str | Path) -> list[str]:
    """Check that a folder holds the files of its manifest, each as it was written, and no other weights or code.

    Other files may be added and the card be edited; nothing else. Every file is read once, in pieces.

    Returns:
        The names of the files that were checked.

    Raises:
        ManifestError: there is no manifest, or none that can be read; a file is missing, changed, or a link; or one was
            added that could be loaded in place of the listed ones.
    """
    folder = Path(directory)
    files = _read(folder)
    for name, expected in files.items():
        if problem := _problem(folder / name, expected):
            raise ManifestError(
                f"{folder / name} {problem}: get it anew, or, if that is your own doing, run "
                f"hf_compress.storage.manifest.write_manifest({str(folder)!r})"
            )
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _LOADABLE and path.name not in files:
            raise ManifestError(f"{path} is not in {MANIFEST_FILE}, and could be loaded in place of what is: remove it")
    return list(files)


def _problem(path: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a listed file, in words."""
    if path.is_symlink():
        return "is a link, where a file was expected (from the Hub, download with local_dir=...)"
    if not path.exists():
        return "is missing"
    if not path.is_file():
        return "is not a file"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"was changed: it has {size} bytes instead of {expected['bytes']}"
    if (found := _sha256(path)) != expected["sha256"]:
        return f"was changed: its SHA-256 is {found} instead of {expected['sha256']}"
    return None


def _read(folder: Path) -> Files:
    """The files that a folder's manifest lists; nothing in it is trusted."""
    path = folder / MANIFEST_FILE
    if path.is_symlink() or not path.is_file():
        raise ManifestError(f"{folder} has no file {MANIFEST_FILE}: hf_compress did not save it, or it is not whole")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON ({error}): get it anew") from error
    if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("files"), dict):
        version = data.get("version") if isinstance(data, dict) else None
        raise ManifestError(
            f"{path} has version {version!r} instead of {_VERSION}, or no files: get it anew, or upgrade hf-compress"
        )
    for name, entry in data["files"].items():
        if not _is_plain(name) or name in _UNLISTED:
            raise ManifestError(f"{path} lists {name!r}, which is not the name of a model's file: do not trust it")
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            raise ManifestError(f"{path} has no sha256 and bytes for {name!r}: get it anew")
    return data["files"]


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file right in the folder, on every system: no separators, drives, or `..`."""
    return name not in ("", "..") and "\0" not in name and PureWindowsPath(name).name == name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
