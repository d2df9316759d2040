"""A folder with a model, texts, and things that are neither."""

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.helpers.language import tiny_llama, word_tokenizer, words


@pytest.fixture(autouse=True)
def _verbosity() -> object:
    """The commands turn Transformers' down; other tests should find it as it was."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny_llama(6).save_pretrained(home / "model")
    word_tokenizer(add_special=False).save_pretrained(home / "model")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": words(20, s)}) + "\n" for s in range(24)))
    (home / "a file").write_text("text")
    (home / "an empty folder").mkdir()
    return home


@pytest.fixture(scope="module")
def model_folder(home: Path) -> str:
    return str(home / "model")


@pytest.fixture(scope="module")
def text_file(home: Path) -> str:
    return str(home / "texts.jsonl")
