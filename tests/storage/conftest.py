"""A Hub of its own for tests that push (a server on this computer, and the real client), and saved checkpoints."""

import tempfile
from types import SimpleNamespace

import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.helpers.hub_server import OTHER, READER, WRITER, HubServer, User
from tests.helpers.untrusted import make_checkpoints


@pytest.fixture
def hub(monkeypatch, tmp_path):
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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folders of saved models with a record, by family; not to be written to."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
