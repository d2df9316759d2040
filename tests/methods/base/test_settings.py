"""Settings: validated when made, the same after JSON and YAML, and found by the method's name."""

import json
import math
from dataclasses import dataclass, fields

import pytest

import hf_compress.methods.base.settings as config_module
from hf_compress.methods.base.amounts import blocks_to_remove
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.base.settings import CompressionConfig, config_class, method_names
from hf_compress.methods.drop_blocks import CRITERIA, DropBlocksConfig
from hf_compress.methods.mka import MKAConfig

CONFIGS = [
    DropBlocksConfig(ratio=0.25),
    DropBlocksConfig(num_blocks=3, criterion="random", seed=7, stack="model.layers"),
    MKAConfig(ratio=0.5),
    MKAConfig(threshold=0.9, variant="paper", similarity="cka", manifold="none", alpha=0.5, iterative=False),
    MKAConfig(num_merges=2, bandwidth=1.5, time=2.0, components=3, neighbors=5, pooling="last", choice_samples=8),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_and_yaml_round_trip(config, tmp_path):
    values = json.loads(config.to_json())
    assert values["method"] == type(config).method
    assert CompressionConfig.from_dict(values) == config
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


@pytest.mark.parametrize("name", ["MKA", "none", 3, None])
def test_an_unknown_method(name):
    with pytest.raises(ValueError, match=f"unknown method {name!r}; known are .*mka"):
        CompressionConfig.from_dict({"method": name})


def test_no_method():
    with pytest.raises(ValueError, match=r"'method', one of .*mka; got \['ratio'\]"):
        CompressionConfig.from_dict({"ratio": 0.5})


def test_a_recipe_that_is_no_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- mka\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: a recipe is a mapping.*got list"):
        CompressionConfig.from_yaml(path)


BAD = [
    *((MKAConfig, {"ratio": value}, "ratio must lie strictly between 0 and 1") for value in (0, 1, -1, 2.5, math.nan)),
    (MKAConfig, {"ratio": "0.25"}, "ratio must lie strictly.*got '0.25'"),
    (MKAConfig, {"ratio": True}, "ratio must lie strictly.*got True"),
    (DropBlocksConfig, {"ratio": 1.0}, r"ratio must lie strictly.*got 1\.0"),
    (DropBlocksConfig, {"ratio": [0.5]}, r"ratio must lie strictly.*got \[0\.5\]"),
    *((MKAConfig, {"num_merges": value}, "num_merges must be a whole number") for value in (0, -1, 1.5, "2", True)),
    (DropBlocksConfig, {"num_blocks": 0}, "num_blocks must be a whole number of at least 1; got 0"),
    (MKAConfig, {}, "say how much to merge: ratio="),
    (DropBlocksConfig, {}, "say how much to leave out: ratio="),
    (MKAConfig, {"threshold": 0.5}, "or, in the paper variant, threshold="),
    (MKAConfig, {"ratio": 0.5, "threshold": 0.5}, "belong to variant='paper'"),
    (MKAConfig, {"ratio": 0.5, "alpha": 0.5}, "belong to variant='paper'"),
    (MKAConfig, {"ratio": 0.5, "num_merges": 2}, "give ratio or num_merges, not both; got ratio=0.5 and num_merges=2"),
    (DropBlocksConfig, {"ratio": 0.5, "num_blocks": 2}, "give ratio or num_blocks, not both"),
    (DropBlocksConfig, {"ratio": 0.5, "criterion": "best"}, "criterion must be one of angular, .*; got 'best'"),
    (MKAConfig, {"ratio": 0.5, "similarity": "best"}, "similarity must be one of angular, .*information; got 'best'"),
    (MKAConfig, {"ratio": 0.5, "variant": "best"}, "variant must be one of paper, refit; got 'best'"),
    (MKAConfig, {"ratio": 0.5, "manifold": "umap"}, "manifold must be one of diffusion, none, pca; got 'umap'"),
    (MKAConfig, {"ratio": 0.5, "pooling": "max"}, "pooling must be one of last, mean; got 'max'"),
    (MKAConfig, {"ratio": 0.5, "components": 0}, "components must be a whole number of at least 1; got 0"),
    (MKAConfig, {"ratio": 0.5, "components": 2.5}, "components must be a whole number of at least 1; got 2.5"),
    (MKAConfig, {"ratio": 0.5, "neighbors": "3"}, "neighbors must be a whole number of at least 1; got '3'"),
    (MKAConfig, {"ratio": 0.5, "choice_samples": 0.5}, "choice_samples must be a whole number"),
    (MKAConfig, {"ratio": 0.5, "refit_tokens": 0}, "refit_tokens must be a whole number"),
    (MKAConfig, {"ratio": 0.5, "time": -1.0}, r"time must be a number of at least 0; got -1\.0"),
    (MKAConfig, {"ratio": 0.5, "bandwidth": 0}, "bandwidth must be a number above 0.*got 0"),
    (MKAConfig, {"ratio": 0.5, "bandwidth": "wide"}, "bandwidth must be a number above 0.*got 'wide'"),
    *((MKAConfig, {"ratio": 0.5, "alpha": value}, "alpha must lie between 0 and 1") for value in (-0.1, 1.1, "half")),
    (MKAConfig, {"ratio": 0.5, "threshold": 2}, "threshold must lie between 0 and 1; got 2"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD)
def test_bad_settings(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_dict({"method": cls.method, **values})


@pytest.mark.parametrize("cls", [MKAConfig, DropBlocksConfig])
def test_every_field_says_what_it_is(cls):
    for field in fields(cls):
        assert field.metadata.get("help"), field.name


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        MKAConfig(0.5).ratio = 2


def test_the_criteria_of_the_issue_are_all_there():
    assert set(CRITERIA) == {"last", "block_influence", "angular", "perplexity", "random"}


@pytest.mark.parametrize(
    ("total", "ratio", "expected"),
    [(12, 0.25, 3), (12, 0.5, 6), (4, 0.01, 1), (10, 0.25, 3), (6, 0.25, 2), (24, 0.1, 2), (2, 0.5, 1), (32, 0.9, 29)],
)
def test_a_ratio_is_rounded_to_the_nearest_number_of_blocks(total, ratio, expected):
    assert blocks_to_remove(total, ratio, None, "num") == expected


@pytest.mark.parametrize(("total", "ratio", "num"), [(4, 0.95, None), (4, None, 4), (1, 0.5, None), (1, None, 1)])
def test_some_block_must_be_left(total, ratio, num):
    asked = f"num={num}" if num else f"ratio={ratio}"
    with pytest.raises(ValueError, match=f"{asked} takes . of {total} blocks and leaves none; at most {total - 1} can"):
        blocks_to_remove(total, ratio, num, "num")


@pytest.mark.parametrize("method", method_names())
def test_every_setting_is_of_its_kind(method):
    """`iterative="no"` would be true, and nobody would know."""
    amounts = {"drop_blocks": {"num_blocks": 1}, "layer_collapse": {"num_layers": 1}, "mka": {"num_merges": 1}}
    given = {"illc": {"gamma": 0.5}, "lrp": {"sparsity": 0.5}, **amounts}.get(method, {})
    cls = config_class(method)
    cls(**given)
    wrong = {
        "bool": ("no", 0, None),
        "str": (5, True, ["model.layers"]),
        "int": ("x", 2.5, True, [1], {}),
        "float": ("x", [1]),
    }
    for field in fields(cls):
        kinds = str(field.type).split(" | ")
        for value in wrong.get(kinds[0], ()):
            if value is None and "None" in kinds:
                continue
            with pytest.raises((ValueError, TypeError), match=field.name):
                cls(**given | {field.name: value})
