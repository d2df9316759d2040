"""Every method on models whose weights are on the disk: what it makes of them is what it makes of them in memory."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaConfig,
)

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.dispatch import without_values
from tests.helpers.disk import counted_reads, in_memory, offloaded
from tests.helpers.every_method import NAMES, SETTINGS
from tests.helpers.marks import only_quick
from tests.helpers.models import leftovers
from tests.helpers.offloaded import every_second_block
from tests.helpers.tiny import randomise, tiny_model, tiny_of, tiny_seq2seq_model

IDS = torch.randint(4, 90, (24, 9), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(9) < torch.tensor([9, 6, 8] * 8)[:, None]).long()


def llama(blocks=4):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, num_hidden_layers=blocks, max_position_embeddings=32, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, 1)
    return model


def saved(model, folder):
    """The tensors of a saved model, by name, and its config."""
    hfc.save(model, folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    return tensors, config


def hooks_of(model):
    """What `leftovers` finds, but for the forwards that accelerate puts on every module."""
    return [found for found in leftovers(model) if found.startswith("hooks")]


def assert_same(plain, model, config, data, folder):
    """Compress a model in memory and one like it on the disk, save both, and compare all that was saved."""
    before = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}
    held = set(in_memory(model))
    options = hfc.DataOptions(batch_size=4)
    hfc.compress(plain, config, copy.copy(data), options=options)
    hfc.compress(model, config, copy.copy(data), options=options)
    assert without_values(model) == []
    assert hooks_of(model) == hooks_of(plain)
    assert {name for name in in_memory(model) if name in before} <= held
    expected, there = saved(plain, folder / "in memory")
    found, here = saved(model, folder / "from disk")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert here == there
    assert expected.keys() != before.keys() or any(not torch.equal(expected[n], before[n]) for n in before)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_of_it_is_what_is_made_of_it_in_memory(name, tmp_path):
    plain = llama()
    model = offloaded(plain, tmp_path)
    data = IDS[:, :6] if name.startswith("drop") else {"input_ids": IDS, "attention_mask": MASK}
    assert_same(plain, model, SETTINGS[name], data, tmp_path)
    assert in_memory(model) == []


@pytest.mark.parametrize("name", ["merge, paper", "bits", "weights", "rows across maps"])
def test_only_some_blocks_are_on_the_disk(name, tmp_path):
    plain = llama()
    model = offloaded(plain, tmp_path, every_second_block(plain))
    assert_same(plain, model, SETTINGS[name], IDS, tmp_path)


@pytest.mark.parametrize("name", ["merge, paper", "bits", "weights", "weights by Wanda", "halves, paper", "neurons"])
def test_blocks_are_read_once_for_all_batches(name, tmp_path):
    """However many batches there are."""
    reads = []
    for size in (3, 12):
        model = offloaded(llama(), tmp_path / str(size))
        with counted_reads() as counts:
            hfc.compress(model, SETTINGS[name], IDS, options=hfc.DataOptions(batch_size=size))
        reads.append({path: count for path, count in counts.items() if "layers." in path})
    assert reads[0] == reads[1]
    assert len(reads[0]) >= 36


FAMILIES = {
    "tied": lambda: tiny_model("gpt2"),
    "experts": lambda: tiny_model("mixtral"),
    "norms around": lambda: tiny_model("gemma2"),
    "encoder": lambda: tiny_of(AutoModelForSequenceClassification, "bert", 0),
    "images": lambda: tiny_of(AutoModelForImageClassification, "vit", 0),
    "positions in attention": lambda: tiny_seq2seq_model("t5"),
    "encoder and decoder": lambda: tiny_seq2seq_model("bart"),
}
OF_FAMILIES = {
    "bits": {"bits": 5.5, "group_size": 16},
    "relevance": {"sparsity": 0.5},
    "relevance, cp": {"sparsity": 0.5, "composite": "cp", "score": "signed", "compensation": "none"},
}


@pytest.mark.parametrize("settings", OF_FAMILIES)
@pytest.mark.parametrize("family", only_quick(FAMILIES, "tied"))
def test_relevance_of_other_families(family, settings, tmp_path):
    """Those with biases, tied weights, experts in tensors, and blocks that are handed more than the stream."""
    plain = FAMILIES[family]()
    model = offloaded(plain, tmp_path)
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    data = {"pixel_values": images} if family == "images" else {"input_ids": IDS % 60 + 4, "attention_mask": MASK}
    for stack in Anatomy(plain).stacks:
        config = hfc.LRPConfig(**OF_FAMILIES[settings], stack=stack.path)
        assert_same(plain, model, config, data, tmp_path / stack.path)
