"""Tiny random models and a word tokenizer for every test: nothing here is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before Transformers is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and tiny models lose more to threads than they win

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import _http
from hypothesis import settings
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import Stack
from hf_compress.calibration.data import Calibration, DataOptions, prepare
from tests.helpers.hub_server import OTHER, READER, WRITER, HubServer, User
from tests.helpers.language import WORDS, tiny_llama, word_tokenizer, words

settings.register_profile("any machine", deadline=None)  # a busy one is slow now and then
settings.load_profile("any machine")

LENGTHS = (9, 3, 12, 5, 7, 12, 4, 10, 6, 11, 8, 5)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, nothing around a text."""
    return word_tokenizer(add_special=False)


@pytest.fixture
def framing_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and `<s> ... </s>` around a text."""
    return word_tokenizer(add_special=True)


@pytest.fixture
def texts() -> list[str]:
    """Twelve texts of three to twelve words."""
    return [words(count, seed=seed) for seed, count in enumerate(LENGTHS)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Five blocks that do quite different things."""
    return tiny_llama(layers=5)


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def stack(model: PreTrainedModel) -> Stack:
    return Anatomy(model).stack()


@pytest.fixture
def calibration(model: PreTrainedModel, framing_tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Calibration:
    """The twelve texts for `model`, padded, three at a time, with special tokens around each."""
    return prepare(texts, model, framing_tokenizer, DataOptions(batch_size=3))


@pytest.fixture
def ids() -> Tensor:
    """(12, 8) token ids, none special."""
    return torch.randint(4, len(WORDS), (12, 8), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of its own for each test, that the client takes for the real one; nothing is kept outside of tmp_path."""
    with HubServer({WRITER: User("me"), READER: User("me", writes=False), OTHER: User("other")}) as server:
        values = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "stored_tokens"),
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it would keep the endpoint of an earlier test
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between one try and the next
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
        _http.close_session()
        assert list((tmp_path / "temporary").iterdir()) == []
