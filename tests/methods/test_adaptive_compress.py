"""AdaptiveCompress through compress(): what is saved, loaded, reported and refused."""

import json

import pytest
import torch
from transformers import Trainer

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.capture import stream_tokens
from hf_compress.calibration.vocabulary import special_ids
from hf_compress.methods.adaptive_compress.training import Joint, _keeper
from tests.helpers.fitting import VARIANTS
from tests.helpers.models import leftovers
from tests.helpers.plans import Before
from tests.helpers.runs import arguments, token_rows
from tests.helpers.tiny import tiny_seq2seq_model


def config(**settings):
    return hfc.AdaptiveCompressConfig(**{"layers": [1, 3], "retention_final": 0.5, "expansion": 2} | settings)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_spliced(variant, model, ids):
    width = model.config.hidden_size
    hfc.compress(model, config(variant=variant), ids)
    edits = [edit for edit in model.config.quantization_config["plan"] if edit["edit"] == "InsertBottleneck"]
    assert [edit["block"] for edit in edits] == ["model.layers.1", "model.layers.3"]
    assert {edit["width"] for edit in edits} == {2 * width if "topk" in variant else width // 2}
    assert not any(edit["gated"] for edit in edits)
    assert leftovers(model) == ["hooks of model.layers.1", "hooks of model.layers.3"]  # their own


def test_all_features_change_next_to_nothing(model, ids):
    before = logits(model, ids)
    hfc.compress(model, config(retention_init=1.0, retention_final=1.0), ids)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-3, rtol=1e-3)


def test_the_report_says_what_is_kept(model, ids):
    hfc.compress(model, config(), ids)
    notes = json.loads(json.dumps(model.compression_report.notes))
    assert notes["tokens"] == ids.numel()
    for block in ("1", "3"):
        place = notes["bottlenecks"][block]
        assert (place["features"], place["of"], place["retention"]) == (8, 16, 0.5)
        assert 0 < place["error"] < 1


def test_observing_is_for_fit(model, ids):
    with pytest.raises(ValueError, match=r"mode='observe' leaves the model as it is: hf_compress.fit"):
        hfc.compress(model, config(mode="observe"), ids)
    found = hfc.fit(model, config(mode="observe"), ids)
    assert found.layers == [1, 3]


def test_a_second_bottleneck_behind_a_block_is_refused_and_nothing_changed(model, ids):
    hfc.compress(model, config(), ids)
    before = Before.of(model)
    with pytest.raises(ValueError, match=r"model.layers.1 has a bottleneck already"):
        hfc.compress(model, config(layers=[1]), ids)
    before.check(model)
    hfc.compress(model, config(layers=[2]), ids)


def test_a_gradient_checkpointed_model_cannot_be_trained_with_them(model, ids, tmp_path):
    callback = hfc.CompressionCallback(config(), ids)
    trainer = Trainer(
        model, arguments(tmp_path, gradient_checkpointing=True), train_dataset=token_rows(), callbacks=[callback]
    )
    with pytest.raises(ValueError, match="gradient checkpointing throws away"):
        trainer.train()


def test_tied_weights_inside_a_model_are_refused(model, ids, tmp_path):
    with pytest.raises(ValueError, match="tied weights cannot be trained inside a model"):
        Trainer(model, arguments(tmp_path), callbacks=[hfc.CompressionCallback(config(tie_weights=True), ids)])


def test_training_leaves_padding_and_special_tokens_out(model, tmp_path, monkeypatch):
    seen = []
    own = Joint.learn

    def learn(joint, layer, stack, stream):
        before = joint.tokens
        own(joint, layer, stack, stream)
        seen.append(joint.tokens - before)

    monkeypatch.setattr(Joint, "learn", learn)
    bos = model.config.bos_token_id
    rows = []
    for length in (5, 8):
        mask = (torch.arange(8) < length).long()
        ids = torch.where(mask.bool(), torch.arange(4, 12), model.config.pad_token_id)
        ids[0] = bos
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    calibration = torch.randint(4, 20, (8, 8), generator=torch.Generator().manual_seed(0))
    callback = hfc.CompressionCallback(config(layers=[1]), calibration)
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows, callbacks=[callback]).train()
    assert seen == [4 + 7]


def test_in_training_a_decoders_real_tokens_are_those_of_its_labels():
    model = tiny_seq2seq_model("t5")
    joint = Joint(hfc.AdaptiveCompressConfig(mode="observe", variant="linear", layers=(1,), stack="decoder.block"))
    model.register_forward_pre_hook(_keeper(joint, special_ids(model.config, None)), with_kwargs=True)
    ids, labels = torch.full((2, 9), 7), torch.tensor([[9, 9, 9, 9, 9], [9, 9, -100, -100, -100]])
    model.train()(input_ids=ids, labels=labels)
    stack = Anatomy(model).stack("decoder.block")
    real = stream_tokens(stack, joint._real, torch.zeros(2, 5, 1))
    assert real.tolist() == [[False, True, True, True, True], [False, True, True, False, False]]
