"""Where blocks are found, and what counts them."""

import pytest
from torch import nn

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.stacks import find_stacks
from hf_compress.errors import UnsupportedModelError
from tests.helpers.overrides import DEPTH
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model, tiny_vision_language_model


@pytest.mark.parametrize(
    ("model_type", "path", "fields"),
    [
        ("llama", "model.layers", ("num_hidden_layers",)),
        ("gpt2", "transformer.h", ("n_layer",)),
        ("opt", "model.decoder.layers", ("num_hidden_layers",)),
        ("longcat_flash", "model.layers", ("num_layers",)),
        ("nemotron_h", "model.layers", ()),  # counted by the length of its list alone
        ("xlstm", "backbone.blocks", ("num_hidden_layers", "num_blocks")),
    ],
)
def test_the_only_stack_of_a_decoder(model_type, path, fields):
    model = tiny_model(model_type)
    (stack,) = find_stacks(model)
    assert stack.path == path
    assert stack.blocks is model.get_submodule(path)
    assert len(stack) == DEPTH
    assert stack.configs == ((model.config, fields),)


def test_both_stacks_of_an_encoder_decoder():
    anatomy = Anatomy(tiny_seq2seq_model("bart"))
    assert [(stack.path, stack.side) for stack in anatomy.stacks] == [
        ("model.encoder.layers", "encoder"),
        ("model.decoder.layers", "decoder"),
    ]
    assert anatomy.stack() is anatomy.stack("decoder") is anatomy.stack("model.decoder.layers")


def test_a_config_that_is_a_copy_is_changed_together_with_the_saved_one():
    model = tiny_seq2seq_model("t5")
    encoder = Anatomy(model).stack("encoder")
    assert [config is model.config for config, _ in encoder.configs] == [False, True]


def test_a_vision_language_model_is_about_its_text():
    anatomy = Anatomy(tiny_vision_language_model("llava"))
    assert [stack.path for stack in anatomy.stacks] == [
        "model.vision_tower.encoder.layers",
        "model.language_model.layers",
    ]
    assert anatomy.stack().path == "model.language_model.layers"


def test_an_encoder():
    assert Anatomy(tiny_base_model("vit")).stack().path == "layers"


def test_lists_inside_blocks_are_no_stacks():
    model = tiny_model("longcat_flash")  # each block holds lists of two attentions and two FFNs
    assert sum(isinstance(module, nn.ModuleList) for module in model.modules()) > 1
    assert len(find_stacks(model)) == 1


def test_an_unknown_path_names_those_that_are_there():
    with pytest.raises(ValueError, match=r"no residual stack 'h'; this model has model\.layers"):
        Anatomy(tiny_model("llama")).stack("h")


def test_blocks_spread_over_parallel_lists_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"transformer\.attentions, transformer\.ffns"):
        find_stacks(tiny_model("xlm"))


def test_a_model_without_a_list_of_blocks_is_refused():
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers"):
        find_stacks(tiny_base_model("albert"))


def test_a_list_that_no_field_counts_is_no_stack():
    model = tiny_model("llama")
    model.config.num_hidden_layers = DEPTH + 1
    with pytest.raises(UnsupportedModelError, match="found no list of blocks"):
        find_stacks(model)
