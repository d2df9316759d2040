"""Settings in a file of their own: of a folder, and of a repository on the Hub."""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_compress.methods.base.files import CONFIG_FILE
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names
from hf_compress.methods.lrp import LRPConfig
from hf_compress.methods.mka import MKAConfig

CONFIG = LRPConfig(bits=4.25, seed=7)
REPO = "me/settings"


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder(given, tmp_path):
    path = CONFIG.save_pretrained(tmp_path / "new" / "one")
    assert path == tmp_path / "new" / "one" / "compression_config.json"
    assert json.loads(path.read_text()) == CONFIG.to_dict()
    place = path if given == "file" else path.parent
    assert LRPConfig.from_pretrained(place) == CONFIG
    assert CompressionConfig.from_pretrained(str(place)) == CONFIG


def test_the_hub(hub, tmp_path):
    CONFIG.push_to_hub(REPO, private=True)
    assert json.loads(hub.files(REPO)[CONFIG_FILE]) == CONFIG.to_dict()
    assert hub.repos[REPO].private
    assert CompressionConfig.from_pretrained(REPO) == CONFIG
    MKAConfig(ratio=0.5).push_to_hub(REPO, "Merge instead")
    assert [commit.title for commit in hub.repos[REPO].commits.values()][-1] == "Merge instead"
    assert MKAConfig.from_pretrained(REPO, revision="main") == MKAConfig(ratio=0.5)


def test_settings_of_another_method(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="has settings of lrp: read them by LRPConfig"):
        MKAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/at all", "me/nothing"])
def test_where_there_are_none(hub, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} has no compression_config\.json: it is neither a folder"):
        MKAConfig.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no compression_config\.json"):
        MKAConfig.from_pretrained(tmp_path)
    assert [request for request in hub.asked("resolve") if str(tmp_path) in request.path] == []


def test_a_folder_in_a_folder_and_words_of_the_hub(tmp_path):
    MKAConfig(ratio=0.5).save_pretrained(tmp_path)
    CONFIG.save_pretrained(tmp_path / "sub")
    assert CompressionConfig.from_pretrained(tmp_path, subfolder="sub") == CONFIG
    with pytest.raises(TypeError, match="revision: of a repository on the Hub"):
        MKAConfig.from_pretrained(tmp_path, revision="main")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    with pytest.raises(LocalEntryNotFoundError):
        MKAConfig.from_pretrained("me/settings", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON text"), ("[1]", "must hold a mapping.*got list"), ("{}", "a config needs the key 'method'")],
)
def test_a_file_of_something_else(text, message, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_it(method, tmp_path):
    ratio = {} if method == "adaptive_compress" else {"ratio": 0.5}
    config = config_class(method)(**ratio)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path) == config
