"""The places of vLLM that the plugin wraps, in a stand-in of vLLM that has nothing else."""

import logging
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import hf_compress as hfc
from hf_compress.engines.vllm import plugin
from hf_compress.errors import UnsupportedModelError
from tests.helpers.engines import CHANGES, wide_llama

FILES = {
    "__init__.py": "__version__ = '0.0'",
    "config/model.py": """
        class ModelConfig:
            model_impl = "auto"
            def __init__(self, config, dtype=None):
                self.hf_config, self.dtype = config, dtype
            def get_model_arch_config(self):
                return getattr(self.hf_config, "quantization_config", None)
    """,
    "model_executor/models/transformers/base.py": """
        from types import SimpleNamespace
        class Base:
            def __init__(self, model):
                self.config, self.model, self.model_config = model.config, model, None
                self.tp_group = SimpleNamespace(world_size=1)
            def _create_hf_to_vllm_mapper(self):
                self.seen = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
    """,
    "model_executor/model_loader/default_loader.py": """
        class DefaultModelLoader:
            weights = ()
            def get_all_weights(self, model_config, model):
                yield from self.weights
    """,
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Its modules, by their last names, as the plugin leaves them."""
    for name, source in FILES.items():
        path = tmp_path / "vllm" / name
        for folder in (path.parent, *path.parent.parents):
            if folder == tmp_path:
                break
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        path.write_text(dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin.register()
    plugin.register()
    yield {name: import_module(f"vllm.{name.removesuffix('.py').replace('/', '.')}") for name in FILES if "/" in name}
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def saved(tmp_path):
    def make(change):
        model = wide_llama()
        hfc.compress(model, CHANGES[change], torch.randint(2, 250, (16, 24)))
        return hfc.save(model, tmp_path / "model")

    return make


def config_of(vllm, folder):
    return vllm["config/model.py"].ModelConfig(AutoConfig.from_pretrained(folder), torch.float32)


def test_the_installed_package_says_where_it_is():
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "hf_compress")
    assert found.load() is plugin.register


def test_registering_imports_no_vllm_and_no_torch():
    """It is called in every process of vLLM, and before vLLM has set PyTorch up."""
    code = "import sys, hf_compress.engines.vllm.plugin as p; p.register(); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("change", ["linear", "several widths", "bottleneck"])
def test_a_structure_goes_by_the_class_of_transformers(change, vllm, saved):
    folder = saved(change)
    config = config_of(vllm, folder)
    assert config.get_model_arch_config() is None  # which would be taken for a quantization
    assert config.model_impl == "transformers"
    with torch.device("meta"):
        own = vllm["model_executor/models/transformers/base.py"].Base(AutoModel.from_config(config.hf_config))
    own._create_hf_to_vllm_mapper()
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    read = vllm["model_executor/model_loader/default_loader.py"].DefaultModelLoader()
    read.weights = load_file(folder / "model.safetensors").items()
    given = {name: tuple(tensor.shape) for name, tensor in read.get_all_weights(config, None)}
    assert {f"model.{name}": shape for name, shape in own.seen.items()} == {
        name: shape for name, shape in given.items() if name.startswith("model.")
    }
    assert len(given) <= len(stored)


def test_packed_weights_alone_leave_vllm_its_own_class(vllm, saved):
    config = config_of(vllm, saved("packed"))
    assert config.get_model_arch_config() is None
    assert config.model_impl == "auto"


def test_its_own_class_cannot_be_asked_for(vllm, saved):
    config = config_of(vllm, saved("linear"))
    config.model_impl = "vllm"
    with pytest.raises(UnsupportedModelError, match=r"model_impl is 'vllm'.* one linear map.*Leave model_impl out"):
        config.get_model_arch_config()


def test_other_models_are_left_alone(vllm):
    model = wide_llama()
    config = vllm["config/model.py"].ModelConfig(model.config)
    model.config.quantization_config = {"quant_method": "awq"}
    assert config.get_model_arch_config() == {"quant_method": "awq"}
    assert config.model_impl == "auto"
    weights = [("model.norm.inner.weight", torch.ones(2))]
    read = vllm["model_executor/model_loader/default_loader.py"].DefaultModelLoader()
    read.weights = weights
    assert list(read.get_all_weights(model_config=config, model=None)) == weights


def test_a_version_without_such_a_place_is_told(tmp_path, monkeypatch, caplog, vllm):
    module = vllm["config/model.py"]
    del module._hf_compress
    del module.ModelConfig.get_model_arch_config
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "vLLM 0.0 has no vllm.config.model.ModelConfig.get_model_arch_config" in caplog.text
