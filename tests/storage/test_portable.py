"""portable=True: a process that knows nothing of hf_compress gets the model, or is told what to install.

Upon plain checkpoints the shim is forced: there it must change nothing.
"""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2DoubleHeadsModel, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_compress.storage.manifest import verify_files
from hf_compress.storage.portable import SHIM_MODULE, forget_shim, write_shim
from hf_compress.storage.save import save
from tests.helpers.language import tiny_llama
from tests.helpers.round_trip import change

SHIM = f"{SHIM_MODULE}.py"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def needing_plugin() -> LlamaForCausalLM:
    """A model with an FFN narrower than the others, which no config of a Llama can say."""
    model = change(tiny_llama(), "narrow one FFN")
    assert model.config.quantization_config["quant_method"] == "hf_compress"
    return model


def test_a_plain_checkpoint_needs_no_shim(model, tmp_path):
    folder = save(model, tmp_path / "out", portable=True)
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in config_of(folder)


def test_what_needs_the_plugin_gets_one(tmp_path):
    model = needing_plugin()
    bare, folder = save(model, tmp_path / "bare"), save(model, tmp_path / "out", portable=True)
    assert {path.name for path in folder.iterdir()} == {SHIM} | {path.name for path in bare.iterdir()}
    assert SHIM in verify_files(folder)
    named = {"auto_map": {"AutoModelForCausalLM": f"{SHIM_MODULE}.LlamaForCausalLM"}}
    assert config_of(folder) == config_of(bare) | named
    body = ast.parse((folder / SHIM).read_text()).body
    assert [ast.unparse(node) for node in body[1:3]] == ["import hf_compress", "import transformers"]
    assert isinstance(body[3], ast.ClassDef)
    assert ast.unparse(body[3].bases[0]) == "transformers.LlamaForCausalLM"
    assert len(body) == 4
    assert len(body[3].body) == 1, "a docstring"


def test_other_entries_of_the_auto_map_stay(model, tmp_path):
    folder = save(model, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"auto_map": {"AutoConfig": "theirs.Config"}}))
    write_shim(model, folder)
    assert config_of(folder)["auto_map"] == {
        "AutoConfig": "theirs.Config",
        "AutoModelForCausalLM": f"{SHIM_MODULE}.LlamaForCausalLM",
    }


class OfMyOwn(LlamaForCausalLM):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OfMyOwn(tiny_llama().config), r"test_portable\.OfMyOwn is no model class of Transformers"),
        (
            lambda: GPT2DoubleHeadsModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)),
            "no Auto class .*GPT2DoubleHeadsModel",
        ),
    ],
)
def test_a_class_that_cannot_be_named_is_refused(tmp_path, make, message):
    model = make()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        write_shim(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_config_forgets_the_shim_and_nothing_else(model):
    forget_shim(model.config)
    assert not hasattr(model.config, "auto_map")
    ours = {"AutoModelForCausalLM": f"{SHIM_MODULE}.LlamaForCausalLM"}
    model.config.auto_map = dict(ours)
    forget_shim(model.config)
    assert not hasattr(model.config, "auto_map")
    model.config.auto_map = ours | {"AutoConfig": "theirs.Config"}
    forget_shim(model.config)
    assert model.config.auto_map == {"AutoConfig": "theirs.Config"}


# --- in processes of their own ----------------------------------------------------------------------------------------


def tiny_phi3() -> Phi3ForCausalLM:
    """A class with `prepare_inputs_for_generation` of its own, which Transformers wraps once more when it is remote."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads)).eval()


@pytest.fixture
def folders(tmp_path) -> Path:
    """Two plain checkpoints with the shim, one that needs the plugin, and the logits that they should give."""
    for name, model in (("llama", tiny_llama()), ("phi3", tiny_phi3()), ("needing", needing_plugin())):
        folder = save(model, tmp_path / name, portable=True)
        if not (folder / SHIM).exists():
            write_shim(model, folder)
        ids = torch.arange(4, 12)[None]
        with torch.no_grad():
            save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / f"{name}.safetensors")
    return tmp_path


PRELUDE = """
import builtins, importlib.abc, os, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM as Auto

def never(*_): raise AssertionError("a prompt")
builtins.input = never

def right(model, name):
    expected = load_file(f"{name}.safetensors")
    model.generate(expected["ids"], max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        return torch.equal(model(expected["ids"]).logits, expected["logits"])

def remote(folder): return Auto.from_pretrained(folder, trust_remote_code=True)

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_compress":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""


def run(code: str, where: Path) -> None:
    """Run code in a process that has not imported hf_compress, though it could."""
    own = {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(where / "modules"), "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=where,
        env=os.environ | own | {"PYTHONPATH": root},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_needs_the_plugin(folders):
    """The full path: built with hf_compress, saved as portable, loaded where nobody has imported it."""
    code = """
def stops(auto, **given):
    try:
        auto.from_pretrained("needing", **given)
    except RuntimeError as error:
        return "ignore_mismatched_sizes" in str(error)

assert stops(Auto) and stops(Auto, trust_remote_code=False), "as without the shim"
assert stops(transformers.AutoModel, trust_remote_code=True), "an Auto class that the shim is not for"
assert "hf_compress" not in sys.modules and not os.path.exists("modules")
model = remote("needing")
assert right(model, "needing")
model.save_pretrained("again")
assert right(remote("again"), "needing")

import hf_compress
assert right(remote(hf_compress.save(model, "saved", portable=True)), "needing")
plain = Auto.from_pretrained("needing")
assert type(plain) is transformers.LlamaForCausalLM and right(plain, "needing")
assert right(remote(hf_compress.save(plain, "saved-plain", portable=True)), "needing")

from hf_compress.storage.portable import forget_shim
forget_shim(plain.config)
plain.save_pretrained("plain")
assert type(remote("plain")) is transformers.LlamaForCausalLM and right(remote("plain"), "needing")
"""
    run(code, folders)


@pytest.mark.slow
def test_where_it_is_installed(folders):
    code = """
for name, kind in (("llama", transformers.LlamaForCausalLM), ("phi3", transformers.Phi3ForCausalLM)):
    plain = Auto.from_pretrained(name)
    assert type(plain) is kind and right(plain, name), "as without the shim"
    assert Auto.from_pretrained(name, trust_remote_code=False).__class__ is kind
    if name == "llama":
        assert "hf_compress" not in sys.modules
        assert not os.path.exists("modules/transformers_modules"), "the shim was not even copied"
    model = remote(name)
    assert "hf_compress" in sys.modules
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__ and right(model, name)
    assert kind._auto_class is None, "the class of Transformers is not marked as remote"
    plain.save_pretrained(f"{name}-plain")
    assert not [file for file in os.listdir(f"{name}-plain") if file.endswith(".py")]

    model.save_pretrained(f"{name}-again")
    assert open(f"{name}-again/modeling_hf_compress.py").read() == open(f"{name}/modeling_hf_compress.py").read()
    assert right(remote(f"{name}-again"), name)
    assert type(Auto.from_pretrained(f"{name}-again")) is kind

    from pathlib import Path
    from hf_compress import save
    from hf_compress.storage.portable import forget_shim, write_shim
    saved = save(model, f"{name}-saved")
    assert right(remote(saved), name)
    write_shim(model, saved)
    assert open(saved / "modeling_hf_compress.py").read() == open(f"{name}/modeling_hf_compress.py").read()
    forget_shim(plain.config)
    plain.save_pretrained(f"{name}-plain")
    assert type(remote(f"{name}-plain")) is kind and right(remote(f"{name}-plain"), name)
"""
    run(code, folders)


@pytest.mark.slow
def test_where_it_is_not_installed(folders):
    code = """
sys.meta_path.insert(0, Hidden())
try:
    remote("needing")
except ImportError as error:
    assert "packages that were not found" in str(error) and "Run `pip install hf_compress`" in str(error), error
else:
    raise AssertionError("it loaded")
assert type(Auto.from_pretrained("llama")) is transformers.LlamaForCausalLM, "the checkpoint is plain here"
"""
    run(code, folders)


def test_the_name_that_pip_is_told_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["name"]
    assert canonicalize_name("hf_compress") == canonicalize_name(project)
