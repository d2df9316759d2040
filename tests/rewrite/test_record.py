"""What a config says of a changed model: by its own fields where they can, by a record where not, and nothing stale."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Dinov2Config, Dinov2Model, T5Config, T5ForConditionalGeneration

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.api.compress import compress
from hf_compress.errors import ParityError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.methods.mka import MKAConfig
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite import builders
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.record import record, recorded
from hf_compress.storage.save import save
from tests.helpers.models import refusing, saved_and_loaded
from tests.helpers.round_trip import build, change, logits
from tests.helpers.tiny import tiny_model

TOKENS = {"input_ids": torch.arange(4, 12)[None]}


def remove(model, *blocks):
    apply(Plan((RemoveBlocks(Anatomy(model).stack().path, blocks),)), model)


def names(model):
    return [type(edit).__name__ for edit in recorded(model.config)]


def is_plain(model):
    return not hasattr(model.config, "quantization_config")


def reloads(model, tmp_path):
    loaded = type(model).from_pretrained(save(model, tmp_path / "out", overwrite=True))
    return recorded(loaded.config) == recorded(model.config) and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("Llama", "intermediate_size"),
        ("Mixtral", "intermediate_size"),
        ("GPT-2", "n_inner"),  # None until now, for four times the stream
        ("BERT", "intermediate_size"),
    ],
)
def test_one_width_for_all_is_a_field_of_the_config(family, field):
    model = build(family)
    old = Anatomy(model).parts(Anatomy(model).stack(), 0).ffn.width
    change(model, "narrow every FFN")
    assert is_plain(model)
    assert getattr(model.config, field) == old * 3 // 4


def test_a_ratio_can_say_it_too():
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28)).eval()
    stack = Anatomy(model).stack()
    apply(sum((builders.narrow_ffn(Block(model, stack, i), range(96)) for i in range(2)), start=Plan()), model)
    assert is_plain(model)
    assert model.config.mlp_ratio == 3


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_a_field_of_both_sides_speaks_for_both():
    model, half = t5(), t5()
    sides = [Anatomy(model).stack(side) for side in ("encoder", "decoder")]
    every = [builders.narrow_ffn(Block(model, stack, i), range(48)) for stack in sides for i in range(2)]
    apply(sum(every, start=Plan()), model)
    assert is_plain(model)
    assert model.config.d_ff == 48
    apply(sum(every[2:], start=Plan()), half)
    assert names(half) == ["NarrowFFN", "NarrowFFN"]
    assert half.config.d_ff == 64
    apply(sum(every[:2], start=Plan()), half)  # and the other side later
    assert is_plain(half)
    assert half.config.d_ff == 48


def test_block_after_block_until_the_config_can_say_it(tmp_path):
    model = build("Llama")
    for block in range(4):
        assert is_plain(model) == (block == 0)
        apply(builders.narrow_ffn(Anatomy(model).block(block), range(40)), model)
    assert is_plain(model)
    assert model.config.intermediate_size == 40
    assert reloads(model, tmp_path)


def test_a_second_change_of_a_loaded_model_is_added(tmp_path):
    model = change(build("Llama"), "narrow one FFN", 1)
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "first"))
    change(loaded, "bottleneck", 3)
    assert names(loaded) == ["NarrowFFN", "InsertBottleneck"]
    assert reloads(loaded, tmp_path)


def test_edits_move_with_their_blocks(tmp_path):
    model = change(change(build("Llama"), "narrow one FFN", 1), "bottleneck", 3)
    remove(model, 0, 2)
    first, second = recorded(model.config)
    assert first.output == "model.layers.0.mlp.down_proj"
    assert second.block == "model.layers.1"
    assert reloads(model, tmp_path)


def test_edits_go_with_their_blocks(tmp_path):
    model = change(build("Llama"), "narrow one FFN", 1)
    remove(model, 1)
    assert is_plain(model)
    assert reloads(model, tmp_path)


def test_a_seal_that_went_with_its_block_is_set_anew(tmp_path):
    model = change(change(build("Llama"), "bottleneck", 1), "bottleneck", 3)
    (seal,) = [edit for edit in recorded(model.config) if isinstance(edit, Seal)]
    assert seal.module.startswith("model.layers.1.")
    remove(model, 1)
    (seal,) = [edit for edit in recorded(model.config) if isinstance(edit, Seal)]
    assert seal.module.startswith("model.layers.2.")
    assert reloads(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "edit", "edits"),
    [
        ("Llama", "narrow one FFN", ["NarrowFFN"]),
        ("Mixtral", "narrow one FFN", ["NarrowExperts"]),
        ("Llama", "packed linear", ["PackLinear"]),
        ("Llama", "bottleneck", ["InsertBottleneck", "Seal"]),
    ],
)
def test_a_seal_where_no_shape_changes(family, edit, edits):
    assert names(change(build(family), edit)) == edits


def test_a_linear_ffn_as_wide_as_the_stream_is_sealed(tmp_path):
    """Its matrix has the shape of the projection whose name it has."""
    model = tiny_model("llama", seed=0)
    apply(
        sum((builders.narrow_ffn(Anatomy(model).block(i), range(model.config.hidden_size)) for i in range(4)), Plan()),
        model,
    )
    assert model.config.intermediate_size == model.config.hidden_size
    change(model, "linear FFN")
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "layers.1.mlp" in n}
    assert (model.config.hidden_size, model.config.hidden_size) in shapes
    assert names(model) == ["LinearFFN", "Seal"]


@pytest.mark.parametrize("config", [DropBlocksConfig(num_blocks=1, criterion="last"), MKAConfig(num_merges=1)])
def test_a_method_on_a_model_with_a_record(config, tmp_path, calibration, model):
    apply(builders.narrow_ffn(Anatomy(model).block(0), range(8)), model)
    change(model, "bottleneck", 2)
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "first"))
    compress(loaded, config, torch.randint(4, 20, (12, 8), generator=torch.Generator().manual_seed(5)))
    assert len(loaded.model.layers) == 4
    saved_and_loaded(loaded, tmp_path / "second", TOKENS)


def test_a_failure_leaves_no_record(monkeypatch):
    def fail(*_):
        raise ParityError("made to fail")

    monkeypatch.setattr("hf_compress.rewrite.apply.check_parity", fail)
    model = build("Llama")
    for edit in ("bottleneck", "narrow every FFN", "narrow one FFN", "packed linear", "linear FFN"):
        with refusing(model, ParityError):
            change(model, edit)


def test_a_record_of_another_quantizer_is_none_of_ours():
    model = build("Llama")
    entry = model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    assert recorded(model.config) == ()
    record(model, (), Undo())
    assert model.config.quantization_config is entry


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_blended_activation_can_be_collapsed(kind, tmp_path):
    model = change(change(tiny_model(kind), "blended activation"), "linear FFN")
    assert [name for name in names(model) if name != "Seal"] == ["LinearFFN"]
    saved_and_loaded(model, tmp_path / "out", TOKENS)
