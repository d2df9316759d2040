"""Models written for other engines, run there, and refused where the engine cannot say what they are."""

import json
import re
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_compress as hfc
from hf_compress.cli import app
from hf_compress.engines import export as module
from hf_compress.engines.agreement import Reference
from hf_compress.engines.gguf import Gguf
from hf_compress.engines.graphs import Onnx
from hf_compress.errors import ParityError, UnsupportedModelError
from tests.helpers.engines import CHANGES, fewer_heads
from tests.helpers.linears import lrp, made
from tests.helpers.tiny import tiny_inputs

PACKAGES = {"gguf": Gguf.packages, "onnx": Onnx.packages, "openvino": ("openvino",)}


@pytest.fixture
def saved(make_llama, calibration, framing_tokenizer, tmp_path):
    """Makes folders with a model of three blocks, changed in one of the ways."""

    def make(change="as it was"):
        model, folder = make_llama(layers=3), tmp_path / "model"
        if (config := CHANGES[change]) is not None:
            hfc.compress(model, config, calibration)
        return hfc.save(model, folder, framing_tokenizer)

    return make


def installed(form):
    return all(find_spec(name) is not None for name in PACKAGES[form])


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_a_graph_says_every_change(form, change, saved, tmp_path):
    assert installed(form), f"{form} needs packages that `pip install 'hf-compress[engines]'` brings"
    found = hfc.export(saved(change), tmp_path / "out", form)
    assert found.agreement.tokens >= 4
    assert found.agreement.ties == 0
    assert found.agreement.largest_difference < 1e-4
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


@pytest.fixture
def byte_model(tmp_path, texts):
    """A model whose tokenizer splits as GPT-2's does, and a function that saves it."""
    backend = ByteLevelBPETokenizer()
    learned = [*texts, *["it is 12345 o'clock"] * 9]
    backend.train_from_iterator(learned, vocab_size=300, min_frequency=1, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, bos_token_id=0, eos_token_id=1, **sizes)
    )

    def save():
        return hfc.save(model, tmp_path / "model", tokenizer)

    return model, save


@pytest.mark.slow
@pytest.mark.parametrize("change", ["as it was", "depth", "several widths", "packed", "sparse", "heads"])
def test_llama_cpp_says_blocks_that_differ_in_size(change, byte_model, tmp_path):
    assert installed("gguf"), "gguf needs packages that `pip install 'hf-compress[engines]'` brings"
    model, save = byte_model
    if change == "heads":
        fewer_heads(model)
    elif (config := CHANGES[change]) is not None:
        data = torch.randint(2, 250, (16, 24), generator=torch.Generator().manual_seed(0))
        hfc.compress(model, config, data)
    found = hfc.export(save(), tmp_path / "out", "gguf")
    assert not found.agreement.largest_difference > 0.01  # single precision, as the model
    assert (tmp_path / "out" / "model.gguf").stat().st_size < found.bytes
    smaller = hfc.export(tmp_path / "model", tmp_path / "small", "gguf", outtype="q8_0")
    assert smaller.bytes < 0.5 * found.bytes


@pytest.mark.slow
def test_another_way_to_split_texts_is_found_out(byte_model, tmp_path):
    _, save = byte_model
    with pytest.raises(ParityError, match=r"llama.cpp splits .* into other tokens .*: give pre_tokenizer="):
        hfc.export(save(), tmp_path / "out", "gguf", pre_tokenizer="llama-bpe")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_told(saved, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"llama.cpp's converter"):
        hfc.export(saved(), tmp_path / "out", "gguf")


@pytest.mark.parametrize("change", ["linear", "bottleneck"])
def test_llama_cpp_is_not_asked_what_it_cannot_say(change, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Gguf, "check_installed", lambda self: None)
    with pytest.raises(
        UnsupportedModelError, match=r"llama.cpp builds LlamaForCausalLM from its config, which cannot say"
    ):
        hfc.export(saved(change), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_dense_is_an_ordinary_checkpoint(change, saved, tmp_path):
    folder = saved(change)
    found = hfc.export(folder, tmp_path / "out", "dense")
    assert found.agreement is None
    assert "the same outputs, bit for bit" in str(found)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "out"))
    inputs = tiny_inputs(before)
    with torch.no_grad():
        assert torch.equal(before(**inputs).logits, after(**inputs).logits)
    history = hfc.history_of(after)
    if change in ("packed", "sparse"):
        assert [stage.method for stage in history.stages] == ["lrp", "dense"]
        assert history.stages[-1].after.bytes == history.stages[0].before.bytes
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert "written out as matrices" in (tmp_path / "out" / "README.md").read_text()
    elif history is not None:
        assert len(history.stages) == 1


def test_experts_are_written_as_files_of_their_class_have_them(tmp_path):
    """One by one, though packed ones were loaded apart: other tools look for them by these names."""
    model = made("Mixtral")
    hfc.save(model, tmp_path / "whole")
    lrp(model, bits=6, group_size=16)
    hfc.save(model, tmp_path / "packed")
    hfc.export(tmp_path / "packed", tmp_path / "out", "dense")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert any(re.search(r"experts\.0\.w1\.weight$", name) for name in after)


def test_compressed_tensors_goes_by_its_own_function(framing_tokenizer, tmp_path):
    model = made("Llama")
    lrp(model, bits=5.5, per="module", group_size=32)
    hfc.save(model, tmp_path / "model", framing_tokenizer)
    hfc.export(tmp_path / "model", tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@contextmanager
def parrot(self, folder, model):
    """An engine that says what Transformers says."""
    yield Reference(model)


@contextmanager
def stranger(self, folder, model):
    """An engine that says something else."""
    other = made("Llama").to(model.dtype)
    yield Reference(other)


@pytest.fixture
def written(monkeypatch):
    """An engine that needs no package, and writes a file."""
    monkeypatch.setattr(Onnx, "check_installed", lambda self: None)
    monkeypatch.setattr(
        Onnx, "write", lambda self, model, processor, folder, prompts: (folder / "file").write_text("x")
    )
    monkeypatch.setattr(Onnx, "speaker", parrot)


def test_prompts_may_be_texts(written, saved, tmp_path, texts, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Onnx, "write", lambda self, model, processor, folder, prompts: (asked.extend(prompts), (folder / "f").touch())
    )
    found = hfc.export(saved(), tmp_path / "out", "onnx", prompts=texts[:2])
    assert found.agreement.prompts == len(asked) == 2


def test_nothing_is_left_of_an_engine_that_differs(written, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Onnx, "speaker", stranger)
    folder = saved()
    with pytest.raises(ParityError, match="ONNX Runtime does not say what Transformers says: token 1 after prompt 1"):
        hfc.export(folder, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (
            {"to": "tflite"},
            ValueError,
            "to is 'tflite'; expected one of dense, compressed-tensors, gguf, onnx, openvino, vllm",
        ),
        ({"to": "onnx", "tolerance": 0.0}, ValueError, "tolerance"),
        ({"to": "dense", "outtype": "f16"}, TypeError, "dense has no .*outtype"),
        ({"to": "onnx", "outtype": "f16"}, TypeError, "outtype"),
        ({"to": "gguf", "outtype": "q3"}, ValueError, "outtype"),
        ({"to": "onnx", "prompts": []}, ValueError, "prompts: give at least one text"),
        ({"to": "vllm", "python": 3}, ValueError, "python"),
        ({"to": "vllm", "precision": "fp8"}, ValueError, "precision"),
    ],
)
def test_arguments_are_checked(arguments, error, told, written, saved, tmp_path):
    with pytest.raises(error, match=told):
        hfc.export(saved(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.engines.target.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="onnx needs onnx, onnxscript, onnxruntime: pip install onnx onnxscript"):
        hfc.export(saved(), tmp_path / "out", "onnx")


def test_too_old_a_transformers_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.engines.target.find_spec", lambda name: name)
    monkeypatch.setattr("hf_compress.engines.graphs.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx is written by Transformers' exporters, which 5[.0-9]+ has not"):
        hfc.export(saved(), tmp_path / "out", "onnx")


def test_a_folder_that_is_there_stays(written, saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        hfc.export(saved(), tmp_path / "out", "onnx")


def test_a_model_that_does_not_go_on_with_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Onnx, "check_installed", lambda self: None)
    hfc.save(made("BERT"), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="onnx is written of models that go on with a text; Bert"):
        hfc.export(tmp_path / "model", tmp_path / "out", "onnx")


def test_on_the_command_line(written, saved, tmp_path):
    folder = str(saved())
    told = CliRunner().invoke(app, ["export", folder, "--to", "onnx", "--output", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    assert "greedy tokens after 4 prompts" in " ".join(told.output.split())
    told = CliRunner().invoke(app, ["export", folder, "--to", "onnx", "--output", str(tmp_path / "out")])
    assert told.exit_code == 2
    assert "exists and is not empty: choose another, or pass --overwrite" in " ".join(told.output.split())


def test_forms_are_those_of_the_help():
    told = " ".join(CliRunner().invoke(app, ["export", "--help"]).output.replace("│", " ").split())
    assert all(form in told for form in module.FORMS)
