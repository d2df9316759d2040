"""Settings as a file of their own, in a folder or in a repository of the Hub, as those of PEFT's adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "compression_config.json"


def write_settings(text: str, folder: str | Path) -> Path:
    """Write settings, as JSON text, into a folder, which is made where there is none; the path of the file."""
    path = Path(folder) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_settings(name: str | Path, **where: Any) -> dict[str, Any]:
    """The settings in a file, a folder, or a repository of the Hub.

    Args:
        where: of a repository, as `huggingface_hub.hf_hub_download` takes it: `revision`, `subfolder`, `token`,
            `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file holds something else.
    """
    path = Path(name)
    if not path.exists():
        path = _downloaded(str(name), where)
    elif other := sorted(where.keys() - {"subfolder"}):
        raise TypeError(f"{', '.join(other)}: of a repository on the Hub; {name} is on this computer")
    elif path.is_dir():
        path = path / where.get("subfolder", "") / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no {CONFIG_FILE}, which save_pretrained() of settings writes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON text: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, 'method' and its settings; got {type(values).__name__}")
    return values


def _downloaded(name: str, where: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, CONFIG_FILE, **where))
    except (LocalEntryNotFoundError, GatedRepoError):  # it may be there: the Hub says why it cannot be had
        raise
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} has no {CONFIG_FILE}: it is neither a folder that save_pretrained() wrote settings to, nor a "
            "repository on the Hub with that file"
        ) from error


def push_settings(text: str, repo_id: str, message: str, **where: Any) -> Any:
    """Put settings, as JSON text, into a repository of the Hub, which is made where there is none; the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=where.pop("token", None), library_name="hf_compress")
    repo = api.create_repo(repo_id, private=where.pop("private", None), exist_ok=True).repo_id
    return api.upload_file(
        path_or_fileobj=f"{text}\n".encode(), path_in_repo=CONFIG_FILE, repo_id=repo, commit_message=message, **where
    )
