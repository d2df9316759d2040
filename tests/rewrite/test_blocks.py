"""Taking blocks out of a live model."""

import pytest

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.kinds import INDEX_ATTRIBUTE
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError
from hf_compress.rewrite.blocks import remove_blocks
from tests.helpers.tiny import tiny_model, tiny_seq2seq_model


def remove(model, removed, path=None) -> None:
    remove_blocks(model, Anatomy(model).stack(path), removed, Undo())


def places(module) -> list[int]:
    """Every index that a module and the modules in it keep of themselves."""
    return [v for m in module.modules() for k, v in vars(m).items() if INDEX_ATTRIBUTE.match(k)]


def test_the_blocks_that_stay_are_the_same_objects_and_know_their_place():
    model = tiny_model("llama")
    blocks = list(model.model.layers)
    remove(model, [1])
    assert list(model.model.layers) == [blocks[0], blocks[2], blocks[3]]
    assert [places(block) for block in model.model.layers] == [[0], [1], [2]]
    assert model.config.num_hidden_layers == 3


def test_two_attentions_in_a_block_have_two_places_in_the_cache():
    model = tiny_model("longcat_flash")
    remove(model, [1, 2])
    attentions = [[attention.layer_idx for attention in block.self_attn] for block in model.model.layers]
    assert attentions == [[0, 1], [2, 3]]
    assert [block.layer_idx for block in model.model.layers] == [0, 1]


def test_a_seed_that_is_an_index_follows():
    model = tiny_model("big_bird")
    remove(model, [0])
    assert [block.attention.seed for block in model.bert.encoder.layer] == [0, 1, 2]


def test_only_one_side_of_an_encoder_decoder_changes():
    model = tiny_seq2seq_model("bart")
    remove(model, [0, 3], "encoder")
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (2, 4)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 4)


@pytest.mark.parametrize("removed", [[4], [-1], [0, 7]])
def test_a_block_that_is_not_there(removed):
    with pytest.raises(ValueError, match=r"model\.layers has the blocks 0 to 3; cannot remove"):
        remove(tiny_model("llama"), removed)


def test_at_least_one_block_has_to_stay():
    with pytest.raises(ValueError, match="leaves none; keep at least one"):
        remove(tiny_model("llama"), [0, 1, 2, 3])


def test_one_field_that_counts_two_stacks_is_refused():
    with pytest.raises(UnsupportedModelError, match="num_layers_per_stack counts the blocks of both"):
        remove(tiny_model("hrm_text"), [1])
