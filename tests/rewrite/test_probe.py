"""Inputs that tell two models apart: whole samples, few of them, and none that change the model."""

import logging

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BigBirdConfig,
    BigBirdForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_compress as hfc
from hf_compress.anatomy import state
from hf_compress.calibration.data import Batch
from hf_compress.errors import UnsupportedModelError
from hf_compress.rewrite.probe import Probe
from tests.helpers.changes import Trace
from tests.helpers.tiny import tiny_base_model, tiny_model

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def text(rows: int, positions: int) -> Batch:
    ids = torch.randint(10, 99, (rows, positions))
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones(rows, positions).bool())


def shapes(probe: Probe) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in probe.batch.inputs.items()}


def test_inputs_are_made_up_for_text_and_pictures():
    assert Probe.of(tiny_model("llama")).generates
    probe = Probe.of(tiny_base_model("vit"))
    assert set(probe.batch.inputs) == {"pixel_values"}
    assert not probe.generates


def test_inputs_that_cannot_be_made_up_are_asked_for():
    with pytest.raises(UnsupportedModelError, match="takes input_values: pass calibration data"):
        Probe.of(tiny_base_model("wav2vec2"))


@pytest.mark.parametrize(("rows", "positions", "taken"), [(20, 8, 8), (20, 50, 5), (20, 200, 2), (1, 200, 1)])
def test_few_samples_are_taken_and_whole(llama, rows, positions, taken):
    probe = Probe.of(llama, text(rows, positions))
    assert shapes(probe) == {"input_ids": (taken, positions), "attention_mask": (taken, positions)}
    assert tuple(probe.batch.real.shape) == (taken, positions)


def test_patches_in_one_row_belong_to_nobody_so_all_are_taken(llama):
    batch = text(20, 16)
    batch.inputs["position_ids"] = torch.arange(16)[None]  # no entry for each sample, as packed patches have none
    assert shapes(Probe.of(llama, batch))["input_ids"] == (20, 16)


def test_where_few_samples_do_not_run_all_are_taken(llama):
    own = llama.forward

    def choosy(input_ids, **kwargs):
        assert len(input_ids) == 20, "pictures without their texts"
        return own(input_ids=input_ids, **kwargs)

    llama.forward = choosy
    assert shapes(Probe.of(llama, text(20, 16)))["input_ids"] == (20, 16)


def test_a_mapping_is_taken():
    model = BertForMultipleChoice(BertConfig(**SIZES)).eval()
    probe = Probe.of(model, {"input_ids": torch.randint(4, 99, (4, 3, 9)), "labels": torch.zeros(4)})
    assert shapes(probe) == {"input_ids": (4, 3, 9)}


def test_a_model_is_saved_with_the_inputs_it_was_compressed_with(tmp_path):
    model = BertForMultipleChoice(BertConfig(**SIZES)).eval()
    batch = {"input_ids": torch.randint(4, 99, (4, 3, 9))}
    with pytest.raises(UnsupportedModelError, match="pass calibration data that it runs on"):
        hfc.save(model, tmp_path / "unknown")
    hfc.save(model, tmp_path / "given", probe=batch)
    hfc.compress(model, hfc.DropBlocksConfig(num_blocks=1), [batch] * 2)
    hfc.save(model, tmp_path / "kept")
    assert {path.name for path in tmp_path.iterdir()} == {"given", "kept"}


def test_inputs_kept_that_no_longer_fit_give_place_to_new_ones(llama):
    Probe.of(llama, text(4, 16)).keep(llama)
    assert shapes(Probe.of(llama))["input_ids"] == (4, 16)
    llama.resize_token_embeddings(10)  # the ids that were kept are outside
    assert shapes(Probe.of(llama))["input_ids"] == (2, 8)


@pytest.fixture
def bigbird():
    """Sparse attention in blocks of 4, which a short input turns off for good."""
    return BigBirdForMaskedLM(BigBirdConfig(**SIZES, block_size=4, num_random_blocks=1)).eval()


def test_long_inputs_are_checked_as_long_ones(bigbird):
    ids = torch.randint(5, 99, (4, 96))
    hfc.compress(bigbird, hfc.DropBlocksConfig(num_blocks=1), ids)
    assert bigbird.bert.attention_type == "block_sparse"
    assert len(bigbird.bert.encoder.layer) == 2


@pytest.mark.parametrize("calibration", [None, torch.randint(5, 99, (4, 16))])
def test_what_short_inputs_change_is_put_back_and_told(bigbird, calibration, caplog):
    state._tell.cache_clear()
    criterion = "last" if calibration is None else "angular"
    ids = torch.randint(5, 99, (4, 96))
    with caplog.at_level(logging.WARNING):
        hfc.compress(bigbird, hfc.DropBlocksConfig(num_blocks=1, criterion=criterion), calibration)
    assert bigbird.bert.attention_type == "block_sparse"
    assert "attention_type was 'block_sparse', then 'original_full'" in caplog.text
    sparse = bigbird(ids).logits
    bigbird.bert.set_attention_type("original_full")
    assert not torch.equal(sparse, bigbird(ids).logits)


def test_a_refusal_leaves_such_a_model_as_it_was(bigbird):
    ids = torch.randint(5, 99, (4, 96))
    before, logits = Trace.of(bigbird), bigbird(ids).logits
    with pytest.raises(ValueError, match="no residual stack"):
        hfc.compress(bigbird, hfc.DropBlocksConfig(num_blocks=1, stack="bert.layers"), ids)
    bigbird.bert.encoder.layer[2].forward = None
    with pytest.raises(UnsupportedModelError):
        hfc.compress(bigbird, hfc.DropBlocksConfig(num_blocks=1, criterion="last"), ids)
    del bigbird.bert.encoder.layer[2].forward
    assert before.difference(bigbird) is None
    assert torch.equal(logits, bigbird(ids).logits)
