"""analyze(): a look at a model that leaves it as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_compress.analysis import Analysis, analyze
from hf_compress.errors import CalibrationError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.pipeline import compress, make_plan
from tests.evaluation.conftest import tiny_llama, word_tokenizer, words

TEXTS = [words(20, seed) for seed in range(24)]
TOKENIZER = word_tokenizer(add_special=False)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(tiny_llama(6), TEXTS, TOKENIZER, ratios=(0.5, 0.2))


def _plain(table: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_it_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(6).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    analyze(model, TEXTS, TOKENIZER)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training
    assert model.config.to_json_string() == config
    assert not any(module._forward_hooks for module in model.modules())


def test_it_takes_one_pass_over_the_data() -> None:
    model, calls = tiny_llama(6), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    analyze(model, TEXTS, TOKENIZER)
    assert sum(calls) == 24


def test_removals_are_what_compress_would_take_out(analysis: Analysis) -> None:
    for removal in analysis.removals:
        paper = MKAConfig(ratio=removal.ratio, variant="paper", iterative=False)
        edits = make_plan(tiny_llama(6), paper, TEXTS, TOKENIZER).edits
        assert {(edit.kept, *edit.absorbed) for edit in edits} == set(removal.merged)  # type: ignore[attr-defined]
        small = compress(tiny_llama(6), DropBlocksConfig(ratio=removal.ratio), TEXTS, TOKENIZER)
        assert tuple(small.compression_report.edits[0]["blocks"]) == removal.dropped
        assert small.num_parameters() == removal.parameters


def test_the_rows_are_the_model_s_own(analysis: Analysis) -> None:
    block = tiny_llama(6).model.layers[0]
    assert [row.index for row in analysis.blocks] == list(range(6))
    assert {row.kind for row in analysis.blocks} == {"A"}
    assert analysis.blocks[0].parameters == sum(p.numel() for p in block.parameters())
    assert (analysis.blocks[0].attention, analysis.blocks[0].ffn) == ("self_attn.o_proj", "gated 32")
    assert analysis.blocks[-1].similarity_to_next is None
    assert analysis.blocks[2].similarity_to_next == analysis.similarity[2][3]


def test_blocks_of_different_kinds_have_different_letters_and_are_not_merged() -> None:
    model = tiny_llama(4)
    model.model.layers[2].mlp.act_fn = nn.GELU()
    found = analyze(model, TEXTS, TOKENIZER, ratios=(0.75,))
    assert [row.kind for row in found.blocks] == ["A", "A", "B", "A"]
    assert found.removals[0].merged == ((0, 1),)


def test_other_similarities_and_biased_attention_are_read_too() -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ids = torch.randint(4, 64, (12, 10), generator=torch.Generator().manual_seed(0))
    found = analyze(Qwen2ForCausalLM(config), ids, config=MKAConfig(ratio=0.5, similarity="cka"), ratios=(0.3,))
    assert found.measure == "cka"
    assert len(found.blocks) == 3


def test_it_prints_saves_and_draws(analysis: Analysis, tmp_path: Path) -> None:
    assert "gated 32" in _plain(analysis.table())
    assert "block influence" in _plain(analysis.removals_table())
    analysis.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["stack"] == "model.layers"
    assert analysis.plot(tmp_path / "a.png").stat().st_size > 1000


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"ratios must lie strictly between 0 and 1.*got 1\.5"):
        analyze(tiny_llama(6), TEXTS, TOKENIZER, ratios=(1.5,))
    with pytest.raises(CalibrationError, match="5 calibration samples are too few"):
        analyze(tiny_llama(6), TEXTS[:5], TOKENIZER)
    with pytest.raises(TypeError, match="must be a transformers"):
        analyze(nn.Linear(2, 2), TEXTS, TOKENIZER)  # type: ignore[arg-type]
