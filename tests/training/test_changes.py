"""The list of edits of a run that changes the structure more than once, and the blocks that correspond."""

import copy

import pytest
import torch
from transformers import Trainer

from hf_compress import CompressionCallback, DropBlocksConfig, ILLCConfig, MKAConfig, compress
from hf_compress.training.distillation import corresponding_blocks
from tests.helpers.language import tiny_llama
from tests.helpers.runs import arguments, ids_of, token_rows

STACK = "model.layers"


def numbered(layers=6):
    """A model whose blocks can be told apart: norms of 1, 2, 3, …"""
    model = tiny_llama(layers)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(1 + number)
    return model


def numbers(model):
    return [round(layer.input_layernorm.weight.mean().item()) - 1 for layer in model.model.layers]


@pytest.mark.parametrize("criterion", ["last", "block_influence", "random"])
def test_blocks_are_numbered_as_at_the_beginning(criterion, tmp_path):
    model, config = numbered(), DropBlocksConfig(num_blocks=3, criterion=criterion, seed=2)
    callback = CompressionCallback(config, ids_of(token_rows(32)), every=1)
    args = arguments(tmp_path, learning_rate=1e-6)
    Trainer(model, args, train_dataset=token_rows(), callbacks=[callback]).train()
    left = numbers(model)
    gone = [block for edit in model.compression_report.edits for block in edit["blocks"]]
    assert len(model.compression_report.edits) == 3
    assert sorted(gone + left) == list(range(6))
    assert corresponding_blocks(model, numbered()) == list(enumerate(left))
    if criterion == "last":
        assert gone == [5, 4, 3]


def test_merges_are_noted_as_one_where_they_chain(tmp_path):
    model = numbered()
    callback = CompressionCallback(MKAConfig(num_merges=4), ids_of(token_rows(32)), every=1)
    args = arguments(tmp_path, learning_rate=1e-6)
    Trainer(model, args, train_dataset=token_rows(), callbacks=[callback]).train()
    edits = [edit for edit in model.compression_report.edits if edit["edit"] == "MergeBlocks"]
    gone = {block for edit in edits for block in edit["absorbed"]}
    kept = [block for block in range(6) if block not in gone]
    assert len(model.model.layers) == len(kept) == 2
    last = [max([b, *(i for e in edits if e["kept"] == b for i in e["absorbed"])]) for b in kept]
    assert corresponding_blocks(model, numbered()) == list(enumerate(last))
    assert last[-1] == 5


@pytest.mark.parametrize("teacher", [6, 5])
def test_blocks_of_the_original_and_of_the_model_between_correspond(teacher):
    model = numbered()
    compress(model, DropBlocksConfig(num_blocks=1, criterion="random", seed=1))
    between = copy.deepcopy(model)
    compress(model, MKAConfig(num_merges=1, variant="paper"), ids_of(token_rows(32)))
    compress(model, ILLCConfig(gamma=0.5), ids_of(token_rows(32)))
    (edit,) = model.compression_report.stages[1].edits
    left = [i for i in range(5) if i not in edit["absorbed"]]
    last = [max(edit["absorbed"]) if i == edit["kept"] else i for i in left]
    expected = [numbers(between)[i] for i in last] if teacher == 6 else last
    assert corresponding_blocks(model, numbered() if teacher == 6 else between) == list(enumerate(expected))
