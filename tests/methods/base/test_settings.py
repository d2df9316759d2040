"""Settings: validated when made, the same after JSON and YAML, and found by the method's name."""

import inspect
import json
from dataclasses import dataclass, fields

import pytest

import hf_compress as hfc
import hf_compress.methods.base.settings as config_module
from hf_compress.methods.adaptive_compress import AdaptiveCompressConfig
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names, settings_of
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.illc import ILLCConfig
from hf_compress.methods.layer_collapse import LayerCollapseConfig
from hf_compress.methods.lrp import LRPConfig
from hf_compress.methods.mka import MKAConfig

CONFIGS = [
    DropBlocksConfig(ratio=0.25),
    DropBlocksConfig(num_blocks=3, criterion="random", seed=7, stack="model.layers"),
    MKAConfig(ratio=0.5),
    MKAConfig(threshold=0.9, variant="paper", similarity="cka", manifold="none", alpha=0.5, iterative=False),
    AdaptiveCompressConfig(layers=range(3), ratio=0.25),
    AdaptiveCompressConfig(fractions=[0.5, 1], variant="topk", skip=0.2, tie_weights=True, mode="observe"),
    ILLCConfig(ratio=0.3, example=[0, 0.5], variant="paper", kernel_width=0.3, iterative=False, seed=4),
    LayerCollapseConfig(target_r2=0.5),
    LayerCollapseConfig(ratio=0.5, gradual=True, blend="leaky", alpha="learned", alpha_lr=0.5, lc=2.0, tolerance=0.01),
    LayerCollapseConfig(num_layers=3, rank=4, penalty=0.25, choice_samples=8, alpha_init=0.125, ramp=0.75),
    LRPConfig(ratio=0.5, bits=5, pattern=[1, 4]),
    LRPConfig(variant="paper", prune=False, split=[8, 4], seed=3, temper=0),
    LRPConfig(bits=5, per="module", symmetric=False),
    MKAConfig(num_merges=2, bandwidth=1.5, time=2.0, components=3, neighbors=5, pooling="last", choice_samples=8),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_and_yaml_round_trip(config, tmp_path):
    values = json.loads(config.to_json())
    assert values["method"] == type(config).method
    assert CompressionConfig.from_dict(values) == config
    assert hash(CompressionConfig.from_dict(values)) == hash(config)
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    assert CompressionConfig.from_yaml(path) == config


def test_from_dict_leaves_the_dictionary_alone():
    values = {"method": "mka", "ratio": 0.5}
    CompressionConfig.from_dict(values)
    assert values == {"method": "mka", "ratio": 0.5}


def test_keys_of_a_newer_version_are_dropped_with_a_warning():
    with pytest.warns(UserWarning, match="MKAConfig does not know brightness, zeal; ignored"):
        assert CompressionConfig.from_dict({"method": "mka", "ratio": 0.5, "zeal": 1, "brightness": 2}) == MKAConfig(
            0.5
        )


def test_the_methods_are_found_by_name():
    assert {"drop_blocks", "mka"} <= set(method_names())
    assert method_names() == sorted(method_names())
    assert config_class("mka") is MKAConfig
    assert config_class("drop_blocks") is DropBlocksConfig
    assert MKAConfig.paper == "https://arxiv.org/abs/2406.16330"


def test_a_new_method_registers_itself_and_none_is_overwritten(monkeypatch):
    monkeypatch.setattr(config_module, "_REGISTRY", dict(config_module._REGISTRY))

    @dataclass(frozen=True)
    class Mine(CompressionConfig, method="mine"):
        share: float = 0.5

    assert config_class("mine") is Mine
    assert CompressionConfig.from_dict({"method": "mine", "share": 0.1}) == Mine(0.1)
    with pytest.raises(ValueError, match="'mka' is registered already, by MKAConfig"):
        type("Other", (CompressionConfig,), {}, method="mka")
    assert config_class("mka") is MKAConfig
    with pytest.raises(TypeError, match="Mine has no method: its package has to call register"):
        plan_for(Mine(), None)


@pytest.mark.parametrize("name", ["magic", "", 3, None])
def test_an_unknown_method(name):
    with pytest.raises(ValueError, match=f"unknown method {name!r}; known are .*mka"):
        CompressionConfig.from_dict({"method": name})


@pytest.mark.parametrize(
    ("name", "method"),
    [("MKA", "mka"), ("LayerCollapse", "layer_collapse"), ("drop-blocks", "drop_blocks"), ("layer collapse",) * 2],
)
def test_other_spellings(name, method):
    assert config_class(name) is config_class(method)


def test_what_may_be_meant():
    with pytest.raises(ValueError, match=r"unknown method 'layercolapse' \(did you mean 'layer_collapse'\?\)"):
        config_class("layercolapse")


def test_settings_beside_a_name():
    assert settings_of("MKA", {"ratio": 0.25}) == MKAConfig(ratio=0.25)
    assert settings_of(MKAConfig(ratio=0.25), {}) == MKAConfig(ratio=0.25)
    with pytest.raises(TypeError, match="mka has no setting 'gama'"):
        settings_of("mka", {"gama": 0.5})
    with pytest.raises(TypeError, match=r"ratio: settings belong inside the config, MKAConfig\(ratio=…\), or beside"):
        settings_of(MKAConfig(num_merges=1), {"ratio": 0.5})


@pytest.mark.parametrize("call", [hfc.compress, hfc.make_plan, hfc.estimate])
def test_no_setting_has_the_name_of_an_argument(call):
    arguments = set(inspect.signature(call).parameters) - {"settings"}
    assert not arguments & {field.name for method in method_names() for field in fields(config_class(method))}


def test_no_method():
    with pytest.raises(ValueError, match=r"'method', one of .*mka; got \['ratio'\]"):
        CompressionConfig.from_dict({"ratio": 0.5})


def test_a_recipe_that_is_no_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- mka\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: a recipe is a mapping.*got list"):
        CompressionConfig.from_yaml(path)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        MKAConfig(0.5).ratio = 2
