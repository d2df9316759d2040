"""analyze(): a look at a model that leaves it as it was."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.api.analyze import analyze
from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.errors import CalibrationError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.layer_collapse import LayerCollapseConfig
from hf_compress.methods.layer_collapse.linear import fit_ffns
from hf_compress.methods.mka import MKAConfig
from tests.helpers.language import tiny_llama, word_tokenizer, words
from tests.helpers.models import leftovers
from tests.helpers.plans import Before
from tests.helpers.tiny import tiny_base_model, tiny_kind, tiny_model

TEXTS = [words(20, seed) for seed in range(24)]
TOKENIZER = word_tokenizer(add_special=False)
SIX = DataOptions(batch_size=4)  # batches of TEXTS


@pytest.fixture(scope="module")
def analysis():
    return analyze(tiny_llama(6), TEXTS, TOKENIZER, ratios=(0.5, 0.2), options=SIX)


def _plain(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_it_leaves_the_model_as_it_was():
    model = tiny_llama(6).train()
    before = Before.of(model)
    assert analyze(model, TEXTS, TOKENIZER, options=SIX).blocks[0].linearity is not None
    before.check(model)
    assert model.training
    assert not leftovers(model)


@pytest.mark.parametrize(("batch_size", "passes"), [(4, 2), (24, 1)])
def test_it_takes_a_pass_for_the_streams_and_one_for_the_ffns(batch_size, passes):
    """The second is not begun where it would come to nothing: 24 texts are one batch of 24."""
    model, calls = tiny_llama(6), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    analyze(model, TEXTS, TOKENIZER, options=DataOptions(batch_size))
    assert sum(calls) == 24 * passes


def _ids(samples=96):
    return torch.randint(4, 90, (samples, 12), generator=torch.Generator().manual_seed(7))


def _linearity(model, samples=96):
    return [row.linearity for row in analyze(model, _ids(samples), ratios=(0.5,)).blocks]


def test_a_linear_ffn_has_a_linearity_of_one():
    model = tiny_model("opt")
    model.model.decoder.layers[2].activation_fn = nn.ReLU()
    with torch.no_grad():
        model.model.decoder.layers[2].fc1.bias += 1000  # far above zero, where ReLU is linear
    found = _linearity(model)
    assert found[2] == pytest.approx(1, abs=1e-4)
    assert all(value is not None and value < 0.999 for value in found[:2])


@pytest.mark.parametrize(("build", "name"), [(tiny_base_model, "bert"), (tiny_model, "llama")])
def test_linearity_is_r2_of_the_default_fit(build, name):
    model = build(name)
    found = _linearity(model)
    stack, data = Anatomy(model).stack(), prepare(_ids(), model, None)
    fits = fit_ffns(model, stack, data, range(len(stack)), LayerCollapseConfig(ratio=0.5).penalty)
    assert found == [fits[index].r2 for index in range(len(stack))]


def test_experts_have_no_linearity_and_dense_blocks_beside_them_do():
    found = analyze(tiny_model("qwen3_moe"), _ids(), ratios=(0.5,))
    assert [row.linearity is None for row in found.blocks] == [row.ffn.startswith("experts") for row in found.blocks]
    assert {row.linearity is None for row in found.blocks} == {True, False}
    assert found.note is None
    assert analyze(tiny_model("mixtral"), _ids(24), ratios=(0.5,)).note is None  # no data would be enough


def test_an_ffn_smaller_than_the_map_is_measured_too():
    assert None not in _linearity(tiny_kind(LlamaForCausalLM, "llama", intermediate_size=8))


def test_what_could_not_be_measured_is_said_once():
    found = analyze(tiny_llama(6), TEXTS, TOKENIZER, options=DataOptions(24))  # one batch
    assert [row.linearity for row in found.blocks] == [None] * 6
    text = " ".join(_plain(found.table()).split())
    assert text.count("give at least 2 batches of data (more samples, or a smaller batch_size); got 1") == 1
    assert json.loads(found.to_json())["note"] == found.note
    chunked = tiny_base_model("bert")
    for layer in chunked.encoder.layer:
        layer.chunk_size_feed_forward = 4
    found = analyze(chunked, _ids(), ratios=(0.5,))
    assert found.note.startswith("no FFN R²: the FFN of encoder.layer.0 did not run once for each token")


def test_removals_are_what_compress_would_take_out(analysis):
    for removal in analysis.removals:
        paper = MKAConfig(ratio=removal.ratio, variant="paper", iterative=False)
        edits = make_plan(tiny_llama(6), paper, TEXTS, TOKENIZER).edits
        assert {(edit.kept, *edit.absorbed) for edit in edits} == set(removal.merged)
        small = compress(tiny_llama(6), DropBlocksConfig(ratio=removal.ratio), TEXTS, TOKENIZER)
        assert tuple(small.compression_report.edits[0]["blocks"]) == removal.dropped
        assert small.num_parameters() == removal.parameters


def test_the_rows_are_the_model_s_own(analysis):
    block = tiny_llama(6).model.layers[0]
    assert [row.index for row in analysis.blocks] == list(range(6))
    assert {row.kind for row in analysis.blocks} == {"A"}
    assert analysis.blocks[0].parameters == sum(p.numel() for p in block.parameters())
    assert (analysis.blocks[0].attention, analysis.blocks[0].ffn) == ("self_attn.o_proj", "gated 32")
    assert analysis.blocks[-1].similarity_to_next is None
    assert analysis.blocks[2].similarity_to_next == analysis.similarity[2][3]


def test_blocks_of_different_kinds_have_different_letters_and_are_not_merged():
    model = tiny_llama(4)
    model.model.layers[2].mlp.act_fn = nn.GELU()
    found = analyze(model, TEXTS, TOKENIZER, ratios=(0.75,))
    assert [row.kind for row in found.blocks] == ["A", "A", "B", "A"]
    assert found.removals[0].merged == ((0, 1),)


def test_other_similarities_and_biased_attention_are_read_too():
    found = analyze(tiny_model("qwen2"), _ids(12), config=MKAConfig(ratio=0.5, similarity="cka"), ratios=(0.3,))
    assert (found.measure, len(found.blocks)) == ("cka", 4)


def test_it_prints_saves_and_draws(analysis, tmp_path):
    for part in ("gated 32", "FFN R²", f"{analysis.blocks[3].linearity:.3f}"):
        assert part in _plain(analysis.table())
    assert "block influence" in _plain(analysis.removals_table())
    analysis.to_json(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["stack"], written["note"]) == ("model.layers", None)
    assert [row["linearity"] for row in written["blocks"]] == [row.linearity for row in analysis.blocks]
    assert analysis.plot(tmp_path / "a.png").stat().st_size > 1000


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"ratios must be a number in \(0, 1\); got 1\.5"):
        analyze(tiny_llama(6), TEXTS, TOKENIZER, ratios=(1.5,))
    with pytest.raises(CalibrationError, match="5 calibration samples are too few"):
        analyze(tiny_llama(6), TEXTS[:5], TOKENIZER)
    with pytest.raises(TypeError, match="must be a transformers"):
        analyze(nn.Linear(2, 2), TEXTS, TOKENIZER)
