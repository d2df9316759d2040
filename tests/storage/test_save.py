"""save(): whole and proven, or not at all."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress.storage.save as save_module
import hf_compress.storage.staging as staging
from hf_compress.api.compress import compress
from hf_compress.errors import ParityError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.report.stages import Size, Stage
from hf_compress.storage.manifest import ManifestError, verify_files
from hf_compress.storage.save import save
from tests.helpers.models import in_dtype

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked to exchange two folders in one step")
DROP_TWO = DropBlocksConfig(num_blocks=2, criterion="last")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    """A directory that holds something."""
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("an older model's")
    (folder / "inner" / "notes.txt").write_text("keep me")
    return folder


def test_all_of_it_is_written(model, tokenizer, ids, tmp_path):
    compress(model, DROP_TWO)
    folder = save(model, tmp_path / "deep" / "down" / "out", tokenizer)
    assert folder == tmp_path / "deep" / "down" / "out"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert len(loaded.model.layers) == 3
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    report = CompressionReport.from_json((folder / REPORT_FILE).read_text())
    assert report == CompressionReport.from_json(model.compression_report.to_json())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def report_of(model) -> CompressionReport:
    size = Size(parameters=1, bytes=4, blocks={"model.layers": 5})
    return CompressionReport("org/base", [Stage("nothing", {}, size, size, [], {}, [], {}, parity=True)])


def test_the_card_is_made_of_the_report(model, tokenizer, tmp_path):
    model.compression_report = report_of(model)
    card = files(save(model, tmp_path / "out", tokenizer))["README.md"].decode()
    assert "org/base" in card
    assert "tokenizer = AutoTokenizer" in card
    assert "AutoTokenizer" not in files(save(model, tmp_path / "bare"))["README.md"].decode()


def test_a_card_that_is_given_is_written_as_it_is(model, old):
    model.compression_report = report_of(model)
    (old / "README.md").write_text("of the older model")
    save(model, old, overwrite=True, card=ModelCard("---\nlicense: mit\n---\n\nMine.\n"))
    assert (old / "README.md").read_text() == "---\nlicense: mit\n---\n\nMine.\n"


def test_the_files_can_be_read_by_whom_the_umask_lets(model, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    folder = save(model, tmp_path / "out")
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_a_link_stays_one(model, old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    assert save(model, tmp_path / "link", overwrite=True) == tmp_path / "link"
    assert (tmp_path / "link").readlink() == old
    assert verify_files(old)


def test_what_changes_before_it_is_in_place_is_not_put_there(model, old, monkeypatch):
    before, own = files(old), save_module.verify

    def change_after(model, folder, probe):
        own(model, folder, probe)
        with (folder / "model.safetensors").open("r+b") as weights:
            weights.seek(-1, 2)
            weights.write(b"\x01")

    monkeypatch.setattr(save_module, "verify", change_after)
    with pytest.raises(ManifestError, match=r"model\.safetensors was changed"):
        save(model, old, overwrite=True)
    assert files(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_directory_that_holds_something_is_refused(model, old):
    before = files(old)
    with pytest.raises(FileExistsError, match=r"out exists and is not empty: choose another.*overwrite=True"):
        save(model, old)
    assert files(old) == before


def test_a_file_in_the_way_is_refused(model, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="out exists"):
        save(model, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_an_empty_directory_is_filled(model, tmp_path):
    (tmp_path / "out").mkdir()
    assert "config.json" in files(save(model, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def in_two_steps(monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)


def in_one_step(monkeypatch):
    monkeypatch.setattr(staging, "_put_aside_and_rename", _raise)


@pytest.mark.parametrize("way", [in_two_steps, pytest.param(in_one_step, marks=linux)])
def test_overwriting_replaces_the_whole(model, old, monkeypatch, way):
    way(monkeypatch)
    save(model, old, overwrite=True)
    assert json.loads((old / "config.json").read_text())["num_hidden_layers"] == 5
    assert not (old / "inner").exists()
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_a_file_is_overwritten_if_asked_to(model, tmp_path, monkeypatch):
    for name, way in (("one", lambda _: None), ("two", in_two_steps)):
        way(monkeypatch)
        (tmp_path / name).write_text("a file")
        assert verify_files(save(model, tmp_path / name, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_appears_at_the_target_while_saving_stays(model, tmp_path, monkeypatch):
    own = save_module.verify

    def meanwhile(*arguments):
        own(*arguments)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("of another process")

    monkeypatch.setattr(save_module, "verify", meanwhile)
    with pytest.raises(OSError, match="out"):
        save(model, tmp_path / "out")
    assert files(tmp_path) == {"out/theirs": b"of another process"}


class Broken(Exception):
    pass


def _raise(*_, **__):
    raise Broken


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def fail_writing(monkeypatch, model):
    own = type(model).save_pretrained

    def half(self, folder, **kwargs):
        own(self, folder, **kwargs)
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", half)
    return OSError, "no space left"


def fail_verifying(monkeypatch, model):
    monkeypatch.setattr(save_module, "verify", _interrupt)
    return KeyboardInterrupt, None


def fail_renaming(which):
    def install(monkeypatch, model):
        in_two_steps(monkeypatch)
        own, calls = Path.rename, []

        def rename(self, target):
            calls.append(target)
            return _raise() if len(calls) == which else own(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        return Broken, None

    return install


def spoil_weights(monkeypatch, model):
    own = type(model).save_pretrained

    def spoil(self, folder, **kwargs):
        with torch.no_grad():
            weight = self.model.layers[1].mlp.up_proj.weight
            kept = weight[0, 0].clone()
            weight[0, 0] += 1
            own(self, folder, **kwargs)
            weight[0, 0] = kept

    monkeypatch.setattr(type(model), "save_pretrained", spoil)
    return ParityError, r"model\.layers\.1\.mlp\.up_proj\.weight has other values"


def spoil_config(monkeypatch, model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1  # which no config can say of one block
    return ParityError, "the same tensors as the one in memory, but gives other outputs"


FAILURES = {
    "writing": fail_writing,
    "verifying": fail_verifying,
    "putting the old one aside": fail_renaming(1),
    "other weights": spoil_weights,
    "another config": spoil_config,
    "putting the new one in place": fail_renaming(2),
}


@pytest.mark.parametrize("when", FAILURES)
def test_a_failure_leaves_what_was_there_and_nothing_else(model, old, monkeypatch, when):
    before = files(old)
    error, message = FAILURES[when](monkeypatch, model)
    with pytest.raises(error, match=message):
        save(model, old, overwrite=True)
    assert files(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("when", list(FAILURES)[:-1])
def test_a_failure_leaves_nothing_where_nothing_was(model, tmp_path, monkeypatch, when):
    error, message = FAILURES[when](monkeypatch, model)  # the first renaming is then that of the new one
    with pytest.raises(error, match=message):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_the_model_as_it_is(model, tmp_path):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "out")
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_and_tied_embeddings(make_llama, tmp_path, dtype, ids):
    model = in_dtype(make_llama(layers=2, tied=True), dtype)
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "out"))
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
