"""heal(): nearer to the teacher, and otherwise the model it was."""

import copy
import itertools

import datasets
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM, ViTConfig, ViTForImageClassification

from hf_compress import (
    DataOptions,
    DistillationConfig,
    DropBlocksConfig,
    LayerCollapseConfig,
    LRPConfig,
    MKAConfig,
    compress,
    heal,
)
from hf_compress.calibration import reading
from hf_compress.calibration.capture import hooked
from hf_compress.calibration.padding import padded
from hf_compress.training.heal import _training_data
from tests.helpers.language import tiny_llama
from tests.helpers.models import assert_reloads, leftovers
from tests.helpers.runs import Snapshot, arguments, ids_of, same, state_of, tiny_dense, token_rows
from tests.helpers.tiny import tiny_seq2seq_model

IDS = ids_of(token_rows(128))
TEACHING, HELD_OUT = IDS[:96], IDS[96:]
CONFIGS = {
    "dropped": DropBlocksConfig(num_blocks=1),
    "merged": MKAConfig(num_merges=1),
    "collapsed": LayerCollapseConfig(num_layers=1),
}


def compressed(kind="dropped"):
    return compress(tiny_llama(4), CONFIGS[kind], TEACHING[:48], options=DataOptions(batch_size=8))


def distance(model, teacher, inputs=HELD_OUT):
    """The mean divergence of what the teacher predicts from what the model does, where labels do not say otherwise."""
    inputs = inputs if isinstance(inputs, dict) else {model.main_input_name: inputs}
    with torch.no_grad():
        own, other = (one(**inputs).logits.log_softmax(-1) for one in (model, teacher))
    gaps = (other.exp() * (other - own)).sum(-1)
    return (gaps[inputs["labels"] != -100] if "labels" in inputs else gaps).mean().item()


def heals(model, teacher, data, *tokenizer, inputs=HELD_OUT, **settings):
    before = distance(model, teacher, inputs)
    heal(model, teacher, data, *tokenizer, **settings)
    return distance(model, teacher, inputs) < before


@pytest.mark.parametrize("lora", ["default", None])
@pytest.mark.parametrize("kind", CONFIGS)
def test_nearer_to_the_teacher_and_else_as_it_was(kind, lora, tmp_path):
    teacher, model = tiny_llama(4), compressed(kind)
    frozen = next(model.parameters()).requires_grad_(False)
    teacher.train()
    teacher.lm_head.weight.requires_grad_(False)
    own, other, before = Snapshot(model), Snapshot(teacher), distance(model, copy.deepcopy(teacher).eval())
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3)
    assert heal(model, teacher, TEACHING, lora=lora, args=args) is model
    assert teacher.training
    assert other.matches(teacher)
    assert leftovers(model) == leftovers(teacher) == []
    assert distance(model, teacher.eval()) < 0.97 * before
    assert own.facts == own._facts(model)
    assert not model.training
    assert not frozen.requires_grad
    assert not hasattr(model, "peft_config")
    stages = model.compression_report.stages
    assert [stage.method for stage in stages] == [CONFIGS[kind].method, "heal"]
    assert (stages[1].notes["adapters"], stages[1].notes["steps"]) == (lora is not None, 60)
    assert stages[1].before == stages[1].after == stages[0].after
    assert_reloads(model, tmp_path / "out", lambda one: one(HELD_OUT).logits)


@pytest.mark.parametrize(
    "config", [LRPConfig(bits=4, group_size=16), LRPConfig(sparsity=0.7)], ids=["packed", "sparse"]
)
def test_packed_and_sparse_maps_learn_without_adapters(config, tmp_path):
    teacher = tiny_llama(4)
    model = compress(copy.deepcopy(teacher), config, TEACHING)
    before, fixed = distance(model, teacher), {name: buffer.clone() for name, buffer in model.named_buffers()}
    args = arguments(tmp_path, max_steps=30, per_device_train_batch_size=16, learning_rate=5e-3)
    heal(model, teacher, TEACHING, args=args)
    assert distance(model, teacher) < 0.97 * before
    assert all(torch.equal(buffer, fixed[name]) for name, buffer in model.named_buffers())
    assert model.compression_report.notes["adapters"] is False
    assert_reloads(model, tmp_path / "out", lambda one: one(HELD_OUT).logits)


def test_adapters_that_could_not_be_merged_are_refused_before_training():
    teacher = tiny_llama(4)
    model = compress(copy.deepcopy(teacher), LRPConfig(bits=7, group_size=8), TEACHING)
    before = Snapshot(model)
    for targets in (["q_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is packed or sparse"):
            heal(model, teacher, TEACHING, lora=LoraConfig(target_modules=targets))
    assert before.matches(model)
    assert not hasattr(model, "peft_config")
    heal(model, teacher, TEACHING, lora=LoraConfig(target_modules=["lm_head"]))
    assert model.compression_report.notes["adapters"] is True


def test_twice(tmp_path):
    teacher, model = tiny_llama(4), compressed()
    heal(model, teacher, TEACHING)
    once = distance(model, teacher)
    heal(model.train(), teacher, TEACHING)
    assert model.training
    assert distance(model.eval(), teacher) < once


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("place", ["forward", "optimizer"])
def test_stopped_in_the_middle(error, place):
    teacher, model = tiny_llama(4), compressed()
    before, passes = Snapshot(model), []

    def fail(*_, **__):
        passes.append(1)
        if len(passes) == 3:
            raise error

    forward = place == "forward"
    handle = (model.model.layers[1].register_forward_pre_hook if forward else register_optimizer_step_pre_hook)(fail)
    with hooked([handle]), pytest.raises(type(error)):
        heal(model, teacher, TEACHING)
    assert before.matches(model)
    assert not model.training
    assert not hasattr(model, "peft_config")
    assert leftovers(model) == leftovers(teacher) == []


def test_a_frozen_model_learns_by_adapters_alone():
    teacher, model = tiny_llama(4), compressed().requires_grad_(False)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"no parameter of LlamaForCausalLM requires a gradient.*requires_grad_"):
        heal(model, teacher, TEACHING, lora=None)
    assert before.matches(model)
    heal(model, teacher, TEACHING)
    assert not same(before.weights, state_of(model))
    assert before.facts == before._facts(model)


def test_adapters_that_fit_nothing():
    model = compressed()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="nothing_like_it"):
        heal(model, tiny_llama(4), TEACHING, lora=LoraConfig(target_modules=["nothing_like_it"]))
    assert before.matches(model)
    assert not hasattr(model, "peft_config")


def test_texts(tokenizer, texts):
    assert heals(compressed(), tiny_llama(4), texts * 8, tokenizer)


def test_a_dataset_with_labels():
    teacher = tiny_dense(num_hidden_layers=4, num_labels=3)
    values = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    model = compress(copy.deepcopy(teacher), LayerCollapseConfig(num_layers=2), values)
    rows = datasets.Dataset.from_dict({"input_values": values.tolist(), "label": [i % 3 for i in range(96)]})
    assert heals(model, teacher, rows, inputs=values, distillation=DistillationConfig(label_share=0.1))


def test_images():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5, initializer_range=0.4)
    teacher = ViTForImageClassification(config).eval()
    model = compress(copy.deepcopy(teacher), DropBlocksConfig(num_blocks=1, criterion="last"))
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert heals(model, teacher, images, inputs=images)


def seq2seq():
    """A T5, and what is left of it without the last block of its decoder."""
    teacher, last = tiny_seq2seq_model("t5"), DropBlocksConfig(num_blocks=1, criterion="last", stack="decoder.block")
    return teacher, compress(copy.deepcopy(teacher), last)


def test_an_encoder_decoder():
    teacher, model = seq2seq()
    ids = torch.randint(4, 60, (64, 6), generator=torch.Generator().manual_seed(0))
    assert heals(model, teacher, ids, inputs={"input_ids": ids, "labels": ids})


LENGTHS = (3, 7, 5, 6) * 8
ROWS = [
    {"input_ids": row[:length].tolist(), "labels": [-100, *row[1:length].tolist()]}
    for row, length in zip(IDS[:32], LENGTHS, strict=True)
]


def test_blocks_that_layerdrop_skips():
    """They give no stream in that step, and there is nothing to compare."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    teacher = OPTForCausalLM(OPTConfig(vocab_size=64, num_hidden_layers=3, layerdrop=0.7, **sizes)).eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    assert heals(model, teacher, TEACHING % 60, inputs=HELD_OUT % 60, lora=None)


def forms_of(rows):
    """Rows in every container that heal takes; endless ones are bounded."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "rows": lambda: rows,
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "frame": lambda: pd.DataFrame(columns),
        "lists by name": lambda: columns,
        "stream": lambda: datasets.IterableDataset.from_generator(lambda: itertools.cycle(rows)),
        "generator": lambda: itertools.cycle(rows),
        "loader": lambda: DataLoader(rows, batch_size=5, collate_fn=lambda some: padded(some, 0)),
    }


@pytest.mark.parametrize("form", forms_of(ROWS))
def test_labels_of_tokens_of_unequal_lengths(form, monkeypatch):
    """Every container gives the Trainer the same samples, and padding is not learned."""
    monkeypatch.setattr(reading, "BOUND", len(ROWS))
    rows, collator = _training_data(forms_of(ROWS)[form](), tiny_llama(2), None, DataOptions(seed=None), True)
    batch = collator([rows[index] for index in range(len(rows))])
    expected = padded(ROWS, 0)
    assert (batch["labels"] == expected["labels"]).all()
    assert (batch["input_ids"] == expected["input_ids"]).all()
    assert (batch["attention_mask"] == expected["attention_mask"]).all()
    assert (expected["labels"][0, 3:] == -100).all()
    assert (expected["attention_mask"].sum(1) == torch.tensor(LENGTHS)).all()


@pytest.mark.parametrize("form", ["rows", "dataset", "loader"])
def test_healing_on_labels_of_tokens(form):
    labels = DistillationConfig(label_share=0.2)
    assert heals(compressed(), tiny_llama(4), forms_of(ROWS)[form](), distillation=labels)


def test_healing_on_a_stream_without_an_end(monkeypatch, caplog):
    monkeypatch.setattr(reading, "BOUND", 16)
    heal(compressed(), tiny_llama(4), itertools.cycle(ROWS))
    assert "read, but 16 of the first 10,000 samples, drawn with seed 0" in caplog.text


def test_a_trainer_with_steps_has_its_stream(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: itertools.cycle(ROWS))
    stream = stream.cast(datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ROWS[0]}))
    assert _training_data(stream, tiny_llama(2), None, None, bounded=False)[0] is stream
    heal(compressed(), tiny_llama(4), stream, args=arguments(tmp_path, max_steps=2, per_device_train_batch_size=4))


def test_classes_in_a_loader_come_along():
    teacher = tiny_dense(num_hidden_layers=4, num_labels=3)
    values, classes = torch.randn(6, 8), torch.arange(6) % 3
    rows, _ = _training_data([(values, classes)], teacher, None, None, bounded=True)
    assert [int(row["labels"]) for row in rows] == classes.tolist()


@pytest.mark.parametrize("form", ["rows", "loader"])
def test_labels_of_an_encoder_decoder(form):
    """Of lengths that have nothing to do with the texts'."""
    teacher, model = seq2seq()
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"][1:]} for row in ROWS] * 4
    seen, _ = _training_data(forms_of(rows)[form](), teacher, None, None, bounded=True)
    assert [len(row["labels"]) for row in seen][:4] == ([2, 6, 4, 5] if form == "rows" else [6] * 4)
    batch = {name: value.long() for name, value in padded(rows, 0).items()}
    assert heals(model, teacher, forms_of(rows)[form](), inputs=batch)


def test_a_padding_token_without_an_embedding(tokenizer, texts):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    teacher, model = tiny_llama(4), compressed()
    heal(model, teacher, texts, tokenizer)
    heal(model, teacher, [dict(tokenizer(text), labels=tokenizer(text)["input_ids"]) for text in texts], tokenizer)


def test_arguments_that_do_not_fit():
    model = compressed()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="very model"):
        heal(model, model, TEACHING)
    with pytest.raises(ValueError, match="empty"):
        heal(model, tiny_llama(4), TEACHING[:0])
    with pytest.raises(TypeError, match="lora must be"):
        heal(model, tiny_llama(4), TEACHING, lora="all")
    assert before.matches(model)
