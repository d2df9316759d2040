"""How a config's words about single blocks change when blocks are taken out."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    Dinov2Config,
    GPTNeoConfig,
    HunYuanMoEV1Config,
    LEDConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

from hf_compress.anatomy.layout import cut_config, per_block_fields, position_fields
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import UnsupportedModelError

LENGTH = 4
KEPT = st.lists(st.integers(0, LENGTH - 1), min_size=1, unique=True).map(sorted)


def cut(config, kept, fields=("num_hidden_layers",)):
    """`config` after the cut, once more through its own dictionary, as saving and loading do."""
    cut_config(config, fields, LENGTH, kept, Undo())
    return type(config)(**config.to_dict())


@given(KEPT)
def test_lists_with_an_entry_a_block_are_cut(kept):
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = cut(Qwen3Config(num_hidden_layers=LENGTH, layer_types=types, sliding_window=4), kept)
    assert config.layer_types == [types[i] for i in kept]
    assert config.num_hidden_layers == len(kept)


@given(KEPT, st.sets(st.integers(0, LENGTH - 1)), st.integers(1, 4))
def test_the_dense_blocks_of_a_mixture_stay_the_dense_blocks(kept, dense, step):
    """Held against Qwen's own rule for which block has experts, whatever step and list."""

    def is_dense(config, i):
        return i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step != 0

    config = Qwen3MoeConfig(num_hidden_layers=LENGTH, mlp_only_layers=sorted(dense), decoder_sparse_step=step)
    before = [is_dense(config, i) for i in range(LENGTH)]
    after = cut(config, kept)
    assert [is_dense(after, i) for i in range(len(kept))] == [before[i] for i in kept]


def test_a_list_of_indices_with_as_many_entries_as_blocks_is_not_cut():
    config = Qwen3MoeConfig(num_hidden_layers=LENGTH, mlp_only_layers=[3, 2, 1, 0])
    assert per_block_fields(config, LENGTH) == []
    assert cut(config, [1, 3]).mlp_only_layers == [1, 0]


@given(KEPT, st.integers(0, LENGTH))
def test_a_run_of_blocks_is_counted_anew(kept, first):
    config = cut(DeepseekV3Config(num_hidden_layers=LENGTH, first_k_dense_replace=first), kept)
    assert config.first_k_dense_replace == len([i for i in kept if i < first])


@given(KEPT)
def test_the_short_form_of_gpt_neo_is_rewritten(kept):
    config = GPTNeoConfig(num_layers=LENGTH, attention_types=[[["global", "local"], 1], [["local"], 2]])
    layers = config.attention_layers
    assert cut(config, kept, ("num_layers",)).attention_layers == [layers[i] for i in kept]


@given(KEPT)
def test_the_tile_of_recurrent_gemma_is_spelled_out(kept):
    config = RecurrentGemmaConfig(num_hidden_layers=LENGTH, block_types=["recurrent", "recurrent", "attention"])
    kinds = config.layers_block_type
    assert cut(config, kept).layers_block_type == [kinds[i] for i in kept]


def test_a_short_form_of_another_depth_is_refused():
    config = GPTNeoConfig(num_layers=LENGTH, attention_types=[[["global", "local"], 2]])
    config.attention_types = [[["global"], 3]]
    with pytest.raises(UnsupportedModelError, match="attention_types"):
        cut(config, [0], ("num_layers",))


def test_experts_and_choices_per_block_are_cut():
    config = HunYuanMoEV1Config(num_hidden_layers=LENGTH, moe_topk=[1, 2, 3, 4])
    assert cut(config, [1, 3]).moe_topk == [2, 4]


@given(KEPT)
def test_the_stages_of_a_backbone_are_named_anew(kept):
    config = cut(Dinov2Config(num_hidden_layers=LENGTH, out_indices=[2, LENGTH]), kept)
    assert config.out_indices == sorted({len([i for i in kept if i < 2]), len(kept)})
    assert config.out_features == [config.stage_names[i] for i in config.out_indices]
    assert len(config.stage_names) == len(kept) + 1


def test_indices_that_count_from_one_stay_so():
    config = LlamaConfig(num_hidden_layers=LENGTH, ple_layer_ids=[1, 3])
    assert cut(config, [0, 2, 3]).ple_layer_ids == [1, 2]


def test_an_index_outside_the_stack_is_refused():
    config = Qwen3MoeConfig(num_hidden_layers=LENGTH, mlp_only_layers=[LENGTH])
    with pytest.raises(UnsupportedModelError, match=r"mlp_only_layers=\[4\] is no list of indices of 4 blocks"):
        cut(config, [0])


def test_a_list_of_the_encoder_is_left_alone_when_the_decoder_is_cut():
    config = LEDConfig(encoder_layers=LENGTH, decoder_layers=LENGTH, attention_window=[2, 4, 6, 8])
    assert cut(copy.deepcopy(config), [1], ("decoder_layers",)).attention_window == [2, 4, 6, 8]
    assert cut(config, [1], ("encoder_layers",)).attention_window == [4]


def test_undo_brings_the_config_back():
    config = Qwen3MoeConfig(num_hidden_layers=LENGTH, decoder_sparse_step=2, mlp_only_layers=[1])
    before = copy.deepcopy(config.to_dict())
    with Undo() as undo:
        cut_config(config, ("num_hidden_layers",), LENGTH, [0, 3], undo)
        assert config.to_dict() != before
    assert config.to_dict() == before


def test_what_places_blocks_is_named():
    config = DeepseekV3Config(num_hidden_layers=LENGTH, first_k_dense_replace=1)
    assert position_fields(config, LENGTH)["first_k_dense_replace"] == 1
    assert "mlp_only_layers" not in position_fields(Qwen3MoeConfig(mlp_only_layers=[]), LENGTH)
