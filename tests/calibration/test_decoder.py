"""What an encoder-decoder is to say: labels and what its decoder reads, against Transformers' own loss and by hand."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForSeq2Seq, EncoderDecoderConfig, EncoderDecoderModel

import hf_compress as hfc
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.api.compress import make_plan
from hf_compress.attribution.targets import explained_classes
from hf_compress.calibration.capture import forward, inference, stream_tokens, watch_blocks, with_stream
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.losses import losses_without
from hf_compress.calibration.objective import batch_loss, first_tensor, output_tokens
from hf_compress.errors import CalibrationError
from hf_compress.methods.lrp.scores import watch_rows
from tests.helpers.language import POSITIONS
from tests.helpers.tiny import tiny_base_model, tiny_config, tiny_inputs, tiny_model, tiny_seq2seq_model

TYPES = [
    *("t5", "t5gemma", "bart", "pegasus", "mbart", "plbart", "marian"),
    *("blenderbot", "m2m_100", "whisper", "bert2bert"),
]
NAMES = ("input_ids", "attention_mask", "labels")
STACKS = {"t5": ("encoder.block", "decoder.block"), "bart": ("model.encoder.layers", "model.decoder.layers")}


def make(model_type):
    if model_type != "bert2bert":
        return tiny_seq2seq_model(model_type)
    encoder, decoder = copy.deepcopy(tiny_config("bert")), copy.deepcopy(tiny_config("bert"))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 0, 4
    torch.manual_seed(0)
    return EncoderDecoderModel(config).eval()


def inputs_of(model, samples=3):
    """Texts of 9, 9 and 5 tokens, or sounds."""
    if model.main_input_name != "input_ids":
        generator = torch.Generator().manual_seed(0)
        shape = (samples, *tiny_inputs(model)[model.main_input_name].shape[1:])
        return {model.main_input_name: torch.randn(shape, generator=generator)}
    ids = torch.randint(6, 50, (samples, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(length=6, samples=3):
    labels = torch.randint(6, 50, (samples, length), generator=torch.Generator().manual_seed(1))
    labels[1, 4:] = labels[2, 2:] = -100
    return labels


def loss_of(model, batch):
    with inference(model):
        loss, weight = batch_loss(model, forward(model, batch), batch, None)
    return loss / weight


@torch.no_grad()
def own_loss(model, **inputs):
    """Transformers' own."""
    return pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def batch_of(model, **more):
    (batch,) = prepare([{**inputs_of(model), **more}], model, None).batches
    return batch


def decoder_of(model):
    return next(stack for stack in Anatomy(model).stacks if "decoder" in stack.path)


@pytest.mark.parametrize("length", [6, 9], ids=["of another length", "as long as the text"])
@pytest.mark.parametrize("given", ["labels", "labels and ids"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_that_of_transformers(model_type, given, length):
    model, labels = make(model_type), labels_of(length)
    more = {}
    if given == "labels and ids" and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    assert loss_of(model, batch_of(model, labels=labels, **more)) == own_loss(model, **inputs_of(model), labels=labels)


@pytest.mark.parametrize("model_type", ["t5", "bart", "pegasus"])
def test_the_ids_of_a_decoder_alone_say_what_follows_them(model_type):
    model = make(model_type)
    ids = torch.randint(6, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(**inputs_of(model), decoder_input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss_of(model, batch_of(model, decoder_input_ids=ids)) == pytest.approx(expected, rel=1e-5)


def test_labels_from_a_collator(tokenizer, texts):
    """Rows of a tokenized dataset, text and labels each of their own lengths, padded by Transformers or by us."""
    model, pairs = make("bart"), zip(texts, texts[::-1], strict=True)
    rows = [dict(tokenizer(one), labels=tokenizer(two)["input_ids"]) for one, two in pairs]
    ours = prepare(rows, model, tokenizer, DataOptions(batch_size=4)).batches
    collator = DataCollatorForSeq2Seq(tokenizer)
    for start, batch in zip((0, 4, 8), ours, strict=True):
        theirs = collator([{n: row[n] for n in NAMES} for row in rows[start : start + 4]])
        (other,) = prepare([dict(theirs)], model, tokenizer).batches
        expected = own_loss(model, **theirs)
        assert loss_of(model, batch) == expected
        assert loss_of(model, other) == expected


def test_padding_among_labels_is_not_learned():
    """Of whom did not put -100 in its place."""
    model, labels = make("t5"), labels_of()
    padded = labels.masked_fill(labels == -100, model.config.pad_token_id)
    assert torch.equal(batch_of(model, labels=padded).targets, batch_of(model, labels=labels).targets)


def test_what_is_longer_than_the_decoders_positions_is_cut_with_a_note(caplog):
    model = make("whisper")
    most = model.config.max_target_positions
    calibration = prepare([{**inputs_of(model), "labels": torch.randint(6, 50, (3, most + 5))}], model, None)
    (batch,) = calibration.batches
    assert calibration.truncated == 3
    assert batch.targets.shape == batch.inputs["decoder_input_ids"].shape == (3, most)
    loss_of(model, batch)


# --- causal language models -------------------------------------------------------------------------------------------


def test_a_prompt_that_is_not_learned(model, ids):
    labels = ids.clone()
    labels[:, :3] = -100
    (batch,) = prepare({"input_ids": ids, "labels": labels}, model, None, DataOptions(batch_size=12)).batches
    assert loss_of(model, batch) == own_loss(model, input_ids=ids, labels=labels)
    assert batch.real.all(), "statistics are of the prompt too"


def test_padding_is_never_learned(model, ids):
    """Labels that are a copy of the ids, padding and all."""
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    (batch,) = prepare({"input_ids": ids, "attention_mask": mask, "labels": ids}, model, None, DataOptions(12)).batches
    assert loss_of(model, batch) == own_loss(model, input_ids=ids[:, :5], labels=ids[:, :5])


def test_long_texts_are_cut_with_their_labels(model):
    ids = torch.randint(4, 60, (2, POSITIONS + 4))
    (batch,) = prepare({"input_ids": ids, "labels": ids}, model, None).batches
    assert torch.equal(batch.targets, ids[:, :POSITIONS])


@pytest.mark.parametrize("model_type", ["t5", "whisper", "llama"])
@pytest.mark.parametrize(
    ("label", "message"),
    [(-100, "labels of all tokens are -100"), (10**6, "to 1000000, but"), (-5, "from -5")],
)
def test_labels_that_cannot_be_learned(label, message, model_type):
    model = tiny_model("llama") if model_type == "llama" else make(model_type)
    with pytest.raises(CalibrationError, match=message):
        batch_of(model, labels=torch.full((3, 9), label))


def test_labels_and_ids_that_do_not_fit(model, ids):
    t5 = make("t5")
    with pytest.raises(CalibrationError, match=r"\(3, 5\).*\(3, 6\)"):
        batch_of(t5, labels=labels_of(), decoder_input_ids=labels_of(5).clamp(min=6))
    with pytest.raises(CalibrationError, match="token ids run from 1000000"):
        batch_of(t5, decoder_input_ids=torch.full((3, 5), 10**6))
    with pytest.raises(CalibrationError, match=r"of the shape of the token ids, \(12, 8\); got \(12, 7\)"):
        prepare([{"input_ids": ids, "labels": ids[:, :7]}], model, None)


# --- which tokens count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["t5", "bart", "bert2bert", "whisper"])
def test_streams_are_masked_by_what_their_stack_reads(model_type):
    model, labels = make(model_type), labels_of(9)
    batch = batch_of(model, labels=labels)
    expected = F.pad(labels != -100, (1, -1), value=False)  # it reads the labels, one place to the right
    for stack in Anatomy(model).stacks:
        seen = []
        with inference(model), watch_blocks(stack, lambda index, before, after, seen=seen: seen.append(after)):
            forward(model, batch)
        real = stream_tokens(stack, batch, seen[0])
        if "decoder" in stack.path:
            assert torch.equal(real, expected)
        elif batch.real is not None:
            assert torch.equal(real, batch.inputs["attention_mask"].bool())


@pytest.mark.parametrize("model_type", ["t5", "bert2bert"])
def test_without_labels_a_decoder_reads_the_text(model_type):
    model = make(model_type)
    batch = batch_of(model)
    real = stream_tokens(decoder_of(model), batch, torch.zeros(3, 9, 1))
    assert torch.equal(real, F.pad(batch.real, (1, -1), value=False))


@pytest.mark.parametrize("model_type", ["t5", "bart", "pegasus"])
def test_cross_attention_reads_the_encoders_tokens(model_type):
    """Keys and values of it, also where both streams are as long."""
    model = make(model_type)
    stack = decoder_of(model)
    maps = {n: m for n, m in stack.blocks[0].named_modules() if isinstance(m, torch.nn.Linear)}
    batch, counts = batch_of(model, labels=labels_of(9)), {}
    with inference(model), watch_rows(stack, batch, maps, lambda path, rows: counts.update({path: len(rows)})):
        forward(model, batch)
    encoded = [n for n in maps if ("encoder_attn" in n and n.endswith(("k_proj", "v_proj"))) or "EncDec" in n]
    encoded = [n for n in encoded if not n.endswith((".q", ".o"))]
    assert len(encoded) == 2
    assert {counts[n] for n in encoded} == {int(batch.inputs["attention_mask"].sum())}
    assert {counts[n] for n in maps if n not in encoded} == {int(batch.decoded.sum())}
    assert int(batch.decoded.sum()) != int(batch.inputs["attention_mask"].sum()), "or the test could not tell"


def test_outputs_count_where_there_is_something_to_say(model, ids):
    t5, labels = make("t5"), labels_of()
    batch = batch_of(t5, labels=labels)
    with inference(t5):
        value = first_tensor(forward(t5, batch))
    assert torch.equal(output_tokens(t5, batch, value), labels != -100)
    base = tiny_base_model("t5")
    batch = batch_of(base)
    assert torch.equal(output_tokens(base, batch, value.new_zeros(3, 9, 1)), F.pad(batch.real, (1, -1), value=False))


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_losses_without_blocks_are_of_the_labels(model_type):
    model, labels = make(model_type), labels_of()
    stack = decoder_of(model)
    (found,) = losses_without(model, stack, [batch_of(model, labels=labels)], [1]).values()
    block, own = stack.blocks[1], stack.blocks[1].forward
    block.forward = lambda hidden, *args, **kwargs: with_stream(own(hidden, *args, **kwargs), hidden)
    assert found == own_loss(model, **inputs_of(model), labels=labels)


CONFIGS = {
    "perplexity": hfc.DropBlocksConfig(num_blocks=1, criterion="perplexity"),
    "mka": hfc.MKAConfig(num_merges=1),
    "layer collapse": hfc.LayerCollapseConfig(num_layers=1),
    "lrp": hfc.LRPConfig(sparsity=0.25),
    "fisher": hfc.LRPConfig(bits=5, group_size=16),
    "illc": hfc.ILLCConfig(gamma=0.5),
}


@pytest.mark.parametrize("side", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_methods_on_labels_of_another_length(model_type, method, side):
    model = make(model_type)
    config = replace(CONFIGS[method], stack=STACKS[model_type][side])
    batches = [{**inputs_of(model), "labels": labels_of()} for _ in range(6)]
    make_plan(model, config, batches)
    if model_type == "bart":  # T5 keeps all its blocks: its cache counts those of both sides
        hfc.compress(model, config, batches)


@pytest.mark.parametrize("target", ["label", "predicted"])
def test_relevance_explains_the_labels_or_the_word_after_the_decoders_last_token(target):
    model, labels = make("t5"), labels_of()
    batch = {**inputs_of(model), "labels": labels}
    result = hfc.relevance(model, [batch], target=target)
    with torch.no_grad():
        logits = model(**batch).logits
    counts = labels != -100
    if target == "label":
        expected = (logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counts).sum(dim=1)
    else:
        expected = logits[range(3), counts.sum(dim=1).clamp(max=labels.shape[1] - 1)].amax(-1)
    torch.testing.assert_close(result.explained, expected, rtol=1e-4, atol=1e-4)


def test_sounds_without_labels_are_explained_by_what_is_predicted():
    model = make("whisper")
    batch = batch_of(model)
    with inference(model):
        logits = first_tensor(forward(model, batch))
    with pytest.raises(CalibrationError, match="give labels"):
        explained_classes(model, logits, batch, "label")
    assert torch.equal(explained_classes(model, logits, batch, "predicted")[0], logits[:, 0].amax(-1))


def test_a_causal_model_explains_the_labelled_words_alone(model, ids):
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {"input_ids": ids, "labels": labels}
    result = hfc.relevance(model, [batch], target="label")
    with torch.no_grad():
        logits = model(ids).logits
    expected = logits[:, 4:-1].gather(-1, ids[:, 5:, None])[..., 0].sum(dim=1)
    torch.testing.assert_close(result.explained, expected, rtol=1e-4, atol=1e-4)
