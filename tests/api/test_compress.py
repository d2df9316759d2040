"""compress(): from a model and data to a smaller model, checked, with a report; or an error and the model as it was."""

import json

import pytest
import torch

from hf_compress.api.compress import compress, make_plan
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError, ParityError, UnsupportedModelError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.modules.sparse import SparseLinear
from hf_compress.report.report import CompressionReport
from tests.helpers.models import leftovers, refusing
from tests.helpers.tiny import tiny_model

REFIT = MKAConfig(num_merges=2)
PAPER = MKAConfig(num_merges=2, variant="paper", components=3)
DROP = DropBlocksConfig(num_blocks=2, criterion="perplexity")
METHODS = {"mka": REFIT, "paper": PAPER, "drop_blocks": DROP}
SMALL = DataOptions(batch_size=3)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_itself_is_changed_and_returned(model, framing_tokenizer, texts, method):
    result = compress(model, METHODS[method], texts, framing_tokenizer, SMALL)
    assert result is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert leftovers(model) == []


def test_the_report(model, framing_tokenizer, texts, tmp_path):
    parameters = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    report = compress(model, REFIT, texts, framing_tokenizer, SMALL).compression_report
    assert isinstance(report, CompressionReport)
    assert (report.method, report.config) == ("mka", REFIT.to_dict())
    assert (report.before.blocks, report.before.parameters) == ({"model.layers": 5}, parameters)
    assert (report.after.blocks, report.after.parameters) == ({"model.layers": 3}, parameters - 2 * block)
    assert report.before.bytes - report.after.bytes >= 8 * block
    assert report.calibration == {"samples": 12, "tokens": sum(len(t.split()) for t in texts), "truncated": 0}
    assert report.stages[0].parity is True
    assert {edit["edit"] for edit in report.edits} == {"MergeBlocks"}
    assert sum(len(edit["absorbed"]) for edit in report.edits) == 2
    names = [step.name for step in report.stages[0].steps]
    assert (names[0], names[-1]) == ("prepare calibration data", "apply and check")
    assert all(step.seconds >= 0 for step in report.stages[0].steps)
    assert {"python", "torch", "transformers"} <= set(report.stages[0].environment)
    text = report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(text) == report.to_dict()


def test_truncated_samples_are_in_the_report(model, tokenizer, texts):
    compress(model, DROP, texts, tokenizer, DataOptions(max_length=4))
    assert model.compression_report.calibration["truncated"] == sum(len(text.split()) > 4 for text in texts)


def test_a_method_without_data_needs_none(model):
    report = compress(model, DropBlocksConfig(ratio=0.4, criterion="last")).compression_report
    assert report.calibration == {}
    assert report.after.blocks == {"model.layers": 3}


def test_a_compressed_model_can_be_compressed_again(model, framing_tokenizer, texts):
    compress(model, REFIT, texts, framing_tokenizer, SMALL)
    compress(model, DropBlocksConfig(num_blocks=1, criterion="last"))
    assert len(model.model.layers) == 2
    assert [stage.before.blocks for stage in model.compression_report.stages] == [{"model.layers": n} for n in (5, 3)]


def test_how_many_samples_are_needed_is_said(model, tokenizer, texts):
    config = MKAConfig(num_merges=1, variant="paper", components=11)
    with pytest.raises(CalibrationError, match=r"12 calibration samples are too few.*at least 13 are needed"):
        compress(model, config, texts, tokenizer)
    compress(model, MKAConfig(num_merges=1, variant="paper", components=10), texts, tokenizer)
    with pytest.raises(CalibrationError, match=r"7 calibration samples are too few.*at least 8 are needed"):
        compress(tiny_model("llama"), MKAConfig(num_merges=1), torch.full((7, 5), 9))


def test_weights_that_are_no_numbers_are_named(model):
    model.model.layers[2].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight holds NaN or infinity"):
        compress(model, DROP)


@pytest.mark.parametrize(
    "config",
    [
        DropBlocksConfig(num_blocks=5, criterion="last"),
        DropBlocksConfig(ratio=0.99),
        MKAConfig(num_merges=5),
        MKAConfig(num_merges=9, variant="paper"),
        MKAConfig(ratio=0.95, variant="paper"),
    ],
)
def test_some_block_must_be_left(model, framing_tokenizer, texts, config):
    with refusing(model, ValueError, "of 5 blocks and leaves none; at most 4 can go"):
        compress(model, config, texts, framing_tokenizer)


def test_blocks_of_different_kinds_are_not_averaged(ids):
    model = tiny_model("gemma3_text")  # sliding and full attention in turn
    with refusing(model, ValueError, r"no two neighbouring blocks of the 4 in model\.layers are of one kind"):
        compress(model, PAPER, ids)


def test_what_the_config_cannot_say_is_refused(ids):
    model = tiny_model("diffllama")  # a number of every block depends on its place
    with refusing(model, ParityError, "lambda_init"):
        compress(model, MKAConfig(num_merges=1), ids)


def test_a_model_cast_whole_would_load_with_other_buffers(model):
    """model.to(bfloat16) rounds the rotary frequencies, from_pretrained(dtype=bfloat16) does not."""
    model.to(torch.bfloat16)
    with refusing(model, ParityError, r"the buffer model\.rotary_emb\.inv_freq would have other values"):
        compress(model, DropBlocksConfig(num_blocks=1, criterion="last"))


def test_one_block_on_the_meta_device(model):
    model.model.layers[4].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"such as model\.layers\.4\..*, are on the meta device"):
        compress(model, DROP)


def test_a_quantized_model(model):
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="quantized: compress it first"):
        compress(model, DROP)


@pytest.mark.parametrize("thing", [None, "a name", torch.nn.Linear(2, 2)])
def test_something_that_is_no_model(thing):
    with pytest.raises(TypeError, match=f"must be a transformers.PreTrainedModel; got {type(thing).__name__}"):
        compress(thing, DROP)


@pytest.mark.parametrize("thing", [None, 3, MKAConfig, {"ratio": 0.5}])
@pytest.mark.parametrize("function", [compress, make_plan])
def test_something_that_is_no_config(model, function, thing):
    with pytest.raises(TypeError, match=r"config must be a method's settings, such as MKAConfig\(ratio=0.25\), or its"):
        function(model, thing)


@pytest.mark.parametrize("config", [REFIT, "mka"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch_size", r"batch_size belongs inside options=, as options=DataOptions\(batch_size=…\)"),
        ("max_memory", r"max_memory belongs inside compute=, as compute=Compute\(max_memory=…\)"),
        ("calibraton", r"no argument 'calibraton' \(did you mean 'calibration'\?\)"),
    ],
)
def test_what_is_nearly_an_argument(model, config, name, message):
    with pytest.raises(TypeError, match=message):
        compress(model, config, **{name: 3})


def test_packed_weights_are_unpacked_once_for_all_batches(make_llama, monkeypatch):
    made = []
    dense = SparseLinear._dense
    monkeypatch.setattr(SparseLinear, "_dense", lambda own, dtype: made.append(own) or dense(own, dtype))
    ids, counts = torch.randint(4, 60, (24, 12), generator=torch.Generator().manual_seed(0)), []
    for size in (6, 2):
        made.clear()
        compress(make_llama(layers=3), "lrp", ids, options=DataOptions(batch_size=size), sparsity=0.5)
        counts.append(len(made))
    assert counts[0] == counts[1]
    assert len({id(one) for one in made}) >= 2 * 3 * 7, "those of the rebuilt model too"


def test_a_method_by_its_name(make_llama, framing_tokenizer, texts):
    given = {"calibration": texts, "tokenizer": framing_tokenizer, "options": SMALL}
    named, config = make_llama(layers=5), make_llama(layers=5)
    compress(named, "MKA", num_merges=2, **given)
    compress(config, REFIT, **given)
    state = config.state_dict()
    assert state.keys() == named.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in named.state_dict().items())
    assert named.compression_report.config == config.compression_report.config
    plan = make_plan(make_llama(layers=5), "drop-blocks", num_blocks=2, criterion="last")
    assert plan.to_list() == make_plan(make_llama(layers=5), DropBlocksConfig(num_blocks=2, criterion="last")).to_list()
