"""A record as vLLM needs it: out of its way, parted, and carried out on the model that Transformers' class makes."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.engines.vllm.structure import Structure, structure_of
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.rewrite.dense import write_out
from tests.helpers.engines import CHANGES, fewer_heads, wide_llama
from tests.helpers.linears import lrp, made


@dataclass(frozen=True)
class Arch:
    """As vLLM's `ModelArchitectureConfig`."""

    total_num_hidden_layers: int
    total_num_attention_heads: int
    per_layer_overrides: list | None = None


def saved(folder, change):
    model = wide_llama()
    if change == "heads":
        fewer_heads(model)
    elif CHANGES[change] is not None:
        hfc.compress(model, CHANGES[change], torch.randint(2, 250, (16, 24)))
    return hfc.save(model, folder)


def settings():
    return SimpleNamespace(model_arch_config=Arch(3, 2))


@pytest.mark.parametrize("change", [*CHANGES, "heads"])
def test_the_class_of_transformers_is_rebuilt(change, tmp_path):
    folder = saved(tmp_path / "model", change)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    write_out(expected)
    config = AutoConfig.from_pretrained(folder)
    structure = structure_of(config)
    assert getattr(config, "quantization_config", None) is None
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    if structure is None:
        assert change in ("as it was", "depth")
    else:
        structure.rebuild(model, settings(), 1)
    # A seal stays in the reference, where no packed weights were written out.
    expected = {
        name.replace(".inner.", "."): tuple(tensor.shape)
        for name, tensor in expected.model.state_dict().items()
        if tensor.numel()
    }
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_the_record_is_found_again(tmp_path):
    """vLLM asks in several places, and hands its config to other processes."""
    config = AutoConfig.from_pretrained(saved(tmp_path / "model", "linear"))
    first = structure_of(config)
    assert structure_of(config) == first
    assert structure_of(AutoConfig.for_model(**config.to_dict())) == first


def test_other_quantizations_are_left_alone():
    config = wide_llama().config
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    assert structure_of(config) is None
    assert config.quantization_config["quant_method"] == "awq"


def test_blocks_with_fewer_heads_are_told(tmp_path):
    config = AutoConfig.from_pretrained(saved(tmp_path / "model", "heads"))
    structure, told = structure_of(config), settings()
    with torch.device("meta"):
        structure.rebuild(AutoModel.from_config(config), told, 1)
    assert told.model_arch_config.per_layer_overrides == [
        {},
        {"total_num_attention_heads": 1, "total_num_kv_heads": 1},
        {},
    ]


def test_a_linear_ffn_is_not_split(tmp_path):
    config = AutoConfig.from_pretrained(saved(tmp_path / "model", "linear"))
    structure = structure_of(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"one linear map, which vLLM cannot split over 2 processes"):
        structure.rebuild(model, settings(), 2)


def test_experts_that_are_apart_are_refused():
    model = made("Mixtral")
    lrp(model, bits=6, group_size=16)
    with pytest.raises(UnsupportedModelError, match=r"stored apart: write them out first, with hf-compress export"):
        structure_of(model.config)


def test_a_record_that_is_none_is_refused():
    config = wide_llama().config
    config.quantization_config = {"quant_method": "hf_compress", "version": 1, "plan": [{"edit": "x"}]}
    with pytest.raises(PlanError, match="unknown edit"):
        structure_of(config)


def test_numbers_that_no_model_has_are_refused(tmp_path):
    config = AutoConfig.from_pretrained(saved(tmp_path / "model", "linear"))
    config.num_hidden_layers = 10**6
    with pytest.raises(PlanError, match="num_hidden_layers"):
        structure_of(config)


def test_parts_are_told_apart():
    edits = [edit for change in ("linear", "packed") for edit in _edits(change)]
    parted = Structure.of(edits)
    assert len(parted.edits) + len(parted.stored) + len(parted.seals) == len(edits)
    assert parted.stored
    assert parted.edits


def _edits(change):
    model = wide_llama()
    hfc.compress(model, CHANGES[change], torch.randint(2, 250, (16, 24)))
    structure = structure_of(model.config)
    return (*structure.edits, *structure.stored, *structure.seals)
