"""What bottlenecks keep of streams and of predictions, against sums over single tokens."""

import math

import pytest
import torch
from transformers import BertForMaskedLM

from hf_compress.calibration.capture import hooked
from hf_compress.calibration.data import DataOptions
from hf_compress.features.reconstruction import (
    ReconstructionSums,
    SpliceQuality,
    reconstruction,
    splice_qualities,
    splice_quality,
)
from hf_compress.modules.bottleneck import Bottleneck, Form
from hf_compress.rewrite.bottlenecks import Bottlenecks, FittedBottleneck
from tests.helpers.language import tiny_llama, words
from tests.helpers.models import in_dtype, leftovers, refusing, watching
from tests.helpers.plans import Before
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model, tiny_seq2seq_model

HIDDEN, SPECIAL = 16, 4  # ids below are special
OPTIONS = DataOptions(batch_size=3)


@pytest.fixture
def model():
    return tiny_llama(layers=3)


@pytest.fixture
def texts():
    return [words(count, seed=count) for count in (9, 1, 14, 2, 7)]


def place(module):
    width = module.encoder.shape[1]
    return FittedBottleneck(module.requires_grad_(False), torch.ones(width), torch.arange(width))


def bottlenecks(**modules):
    """By the block: `one=` behind block 1."""
    indices = {"none": 0, "one": 1, "two": 2}
    return Bottlenecks("model.layers", {indices[name]: place(module) for name, module in modules.items()}, {})


@torch.no_grad()
def some(form=None, width=5, seed=0):
    """A bottleneck with random tensors."""
    module, generator = Bottleneck(HIDDEN, width, form or Form()), torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module


@torch.no_grad()
def identity(hidden=HIDDEN):
    module = Bottleneck(hidden, hidden, Form(0.0, "none"))
    module.encoder.copy_(torch.eye(hidden))
    module.decoder.copy_(torch.eye(hidden))
    return module


def zero(hidden=HIDDEN):
    return Bottleneck(hidden, 1, Form(0.0, "none"))


# --- sums of tokens ---------------------------------------------------------------------------------------------------


def draw(*shape, seed=0, offset=0.0):
    return offset + torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(stream, rebuilt, code, sizes=None):
    found, start = ReconstructionSums(), 0
    for size in sizes or [len(stream)]:
        part = slice(start, start + size)
        found.update(stream[part], rebuilt[part], code[part])
        start += size
    return found.result()


def test_figures_by_hand():
    stream = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 1.0]])  # mean 3, 1
    rebuilt = torch.tensor([[1.0, 1.0], [3.0, 0.5], [4.0, 3.0]])
    code = torch.tensor([[0.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, -0.25]])
    found = sums(stream, rebuilt, code)
    missed = 1 + 0.25 + 1 + 4
    assert found.tokens == 3
    assert found.l0 == pytest.approx(4 / 3)
    assert found.l1 == pytest.approx((2 + 1 + 0.5 + 0.25) / 3)
    assert found.token_error == pytest.approx(missed / 3)
    assert found.element_error == pytest.approx(missed / 6)
    assert found.explained_variance == pytest.approx(1 - missed / (4 + 1 + 0 + 1 + 4 + 0))


@pytest.mark.parametrize("sizes", [None, [1, 39], [0, 39, 1], [3, 0, 30, 7], [1] * 40])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_mean_for_every_token_explains_exactly_nothing(offset, sizes):
    stream = draw(40, 6, offset=offset)
    mean = torch.tensor([math.fsum(column) / 40 for column in stream.T.tolist()], dtype=torch.float64)
    found = sums(stream, mean.expand(40, 6), torch.ones(40, 2), sizes)
    assert found.explained_variance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_stream_itself_explains_all(offset):
    stream = draw(40, 6, offset=offset)
    assert sums(stream, stream, stream, [13, 27]).explained_variance == 1


@pytest.mark.parametrize("sizes", [[1, 39], [0, 39, 1], [3, 0, 30, 7], [1] * 40])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_how_tokens_are_batched_changes_nothing(offset, sizes):
    stream, code = draw(40, 6, offset=offset), draw(40, 3, seed=1)
    stream[20:] *= 5  # so that means of batches' ratios would be another number
    rebuilt = stream + 0.3 * draw(40, 6, seed=2)
    whole, parts = sums(stream, rebuilt, code), sums(stream, rebuilt, code, sizes)
    for name in ("l0", "l1", "element_error", "token_error", "explained_variance"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    assert parts.tokens == whole.tokens == 40


def test_what_is_worse_than_the_mean_explains_less_than_nothing():
    assert sums(draw(40, 6), -draw(40, 6), draw(40, 6)).explained_variance == pytest.approx(-3, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_of_float64_whatever_comes(dtype):
    stream = draw(2000, 2).to(dtype)
    rebuilt = (stream.float() + 0.01).to(dtype)
    expected = (stream.double() - rebuilt.double()).square().sum().item() / 2000
    assert sums(stream, rebuilt, stream, [1] * 2000).token_error == pytest.approx(expected, rel=1e-12)


def test_no_tokens_or_tokens_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        ReconstructionSums().result()
    with pytest.raises(ValueError, match="same stream"):
        sums(torch.ones(4, 3), torch.zeros(4, 3), torch.zeros(4, 3), [2, 2])


# --- of a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def streams_by_hand(model, tokenizer, texts, layer):
    """Of each text by itself: what comes out of a block at tokens that are not special."""
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with watching({layer: model.model.layers[layer]}) as seen:
            model(input_ids=ids[None])
        found.append(seen[layer][1][0][ids >= SPECIAL].double())
    return torch.cat(found)


FORMS = {
    "kept": Form(),
    "lost": Form(0.1, "lost"),
    "none": Form(0.0, "none"),
    "top": Form(0.0, "kept", "top", 2),
    "above": Form(0.0, "kept", "above"),
}


@pytest.mark.parametrize("form", FORMS)
def test_reconstruction_of_a_model_is_that_of_its_real_tokens(model, framing_tokenizer, texts, form):
    found = bottlenecks(none=some(FORMS[form]), two=some(FORMS[form], 7, seed=1))
    measured = reconstruction(model, found, texts, framing_tokenizer, OPTIONS)
    assert list(measured) == [0, 2]
    for layer, got in measured.items():
        rows = streams_by_hand(model, framing_tokenizer, texts, layer)
        module = found.places[layer].module.double()
        with torch.no_grad():
            code, context = module.encode(rows)
            missed = (rows - module.decode(code, context)).square().sum().item()
        spread = sum((row - rows.mean(0)).square().sum().item() for row in rows)
        assert got.tokens == len(rows) == 9 + 1 + 14 + 2 + 7
        assert got.token_error == pytest.approx(missed / len(rows), rel=1e-4)
        assert got.element_error == pytest.approx(missed / len(rows) / HIDDEN, rel=1e-4)
        assert got.explained_variance == pytest.approx(1 - missed / spread, abs=1e-4 * missed / spread)
        assert got.l0 == pytest.approx((code != 0).sum().item() / len(rows))
        assert got.l1 == pytest.approx(code.abs().sum().item() / len(rows), rel=1e-4)
    assert {"top": got.l0 <= 2, "above": got.l0 < 7}.get(form, got.l0 == 7)


def test_a_bottleneck_that_knows_only_the_mean_explains_nothing(model, framing_tokenizer, texts):
    only = zero()
    with torch.no_grad():
        only.center.copy_(streams_by_hand(model, framing_tokenizer, texts, 1).mean(0))
    measured = reconstruction(model, bottlenecks(one=only), texts, framing_tokenizer, OPTIONS)[1]
    assert measured.explained_variance == pytest.approx(0, abs=1e-6)
    assert (measured.l0, measured.l1) == (0, 0)


def test_each_is_measured_on_the_stream_of_the_model_as_it_is(model, framing_tokenizer, texts):
    """The one behind the last block would read something else behind another bottleneck."""
    alone = reconstruction(model, bottlenecks(two=some()), texts, framing_tokenizer, OPTIONS)[2]
    behind = reconstruction(model, bottlenecks(none=zero(), two=some()), texts, framing_tokenizer, OPTIONS)[2]
    assert behind == alone


def test_measuring_leaves_the_model_as_it_was(model, framing_tokenizer, texts):
    model.train()
    before, found = Before.of(model), bottlenecks(none=some(), one=some())
    reconstruction(model, found, texts, framing_tokenizer, OPTIONS)
    splice_quality(model, found, texts, framing_tokenizer, OPTIONS)
    before.check(model)
    assert all(module.training for module in model.modules())
    assert not leftovers(model)


# --- predictions ------------------------------------------------------------------------------------------------------


def through(module):
    return lambda block, args, stream: torch.zeros_like(stream) if module is None else module(stream)


@torch.no_grad()
def log_probabilities(model, ids, modules):
    """Of one text, in float64, with hooks of our own."""
    with hooked(model.model.layers[i].register_forward_hook(through(module)) for i, module in modules.items()):
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def quality_by_hand(model, tokenizer, texts, modules):
    """Divergence, the three losses, and how many predictions: of tokens that are real, from tokens that are."""
    found, count = [0.0] * 4, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        clean = log_probabilities(model, ids, {}).tolist()
        spliced = log_probabilities(model, ids, modules).tolist()
        zeroed = log_probabilities(model, ids, dict.fromkeys(modules)).tolist()
        for t in range(len(ids) - 1):
            if ids[t] < SPECIAL or ids[t + 1] < SPECIAL:
                continue
            count += 1
            found[0] += sum(math.exp(p) * (p - q) for p, q in zip(clean[t], spliced[t], strict=True))
            for number, one in enumerate((clean, spliced, zeroed), start=1):
                found[number] -= one[t][ids[t + 1]]
    return [total / count for total in found], count


@pytest.mark.parametrize("layers", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_quality_by_hand(model, framing_tokenizer, texts, batch_size, layers):
    chosen = {index: some(width=12, seed=index) for index in layers}
    found = Bottlenecks("model.layers", {index: place(module) for index, module in chosen.items()}, {})
    got = splice_quality(model, found, texts, framing_tokenizer, DataOptions(batch_size=batch_size))
    (divergence, clean, spliced, zeroed), count = quality_by_hand(model, framing_tokenizer, texts, chosen)
    assert got.tokens == count == 8 + 0 + 13 + 1 + 6
    assert got.divergence == pytest.approx(divergence, rel=1e-4)
    assert (got.clean, got.spliced, got.zeroed) == pytest.approx((clean, spliced, zeroed), rel=1e-4)
    assert got.recovered == pytest.approx((zeroed - spliced) / (zeroed - clean), rel=1e-3)
    assert got.perplexities == pytest.approx((math.exp(clean), math.exp(spliced)), rel=1e-3)
    assert divergence > 0.05


def test_the_identity_diverges_nowhere_and_recovers_all(model, framing_tokenizer, texts):
    got = splice_quality(model, bottlenecks(none=identity(), two=identity()), texts, framing_tokenizer, OPTIONS)
    assert got.divergence == pytest.approx(0, abs=1e-6)
    assert got.recovered == pytest.approx(1, abs=1e-6)
    assert abs(got.zeroed - got.clean) > 0.1


def test_zeros_recover_nothing(model, framing_tokenizer, texts):
    got = splice_quality(model, bottlenecks(none=zero(), two=zero()), texts, framing_tokenizer, OPTIONS)
    assert got.recovered == pytest.approx(0, abs=1e-6)
    assert got.spliced == got.zeroed
    assert got.divergence > 0.05


def test_several_are_measured_as_each_alone():
    model = tiny_model("gpt2")
    ids = torch.randint(4, 64, (5, 8), generator=torch.Generator().manual_seed(0))
    stack, (one, two) = "transformer.h", (zero(64), identity(64))
    sets = [{0: one}, {1: two}, {0: two}, {0: two, 1: one}]
    sets = [Bottlenecks(stack, {layer: place(module) for layer, module in own.items()}, {}) for own in sets]
    together = splice_qualities(model, sets, ids, options=OPTIONS)
    assert together == [splice_quality(model, one, ids, options=OPTIONS) for one in sets]
    assert together[0].zeroed == together[2].zeroed == together[0].spliced
    assert len({quality.zeroed for quality in together}) > 1


def test_recovered_is_the_share_of_the_way_back():
    assert SpliceQuality(0.1, 2.0, 3.0, 6.0, 7).recovered == 0.75
    assert SpliceQuality(0.1, 2.0, 1.0, 6.0, 7).recovered == 1.25
    assert SpliceQuality(0.1, 2.0, 3.0, 6.0, 7).perplexities == (math.exp(2), math.exp(3))


def test_predictions_of_a_bfloat16_model_are_compared_in_float32(model, ids):
    model = in_dtype(model, torch.bfloat16)
    got = splice_quality(model, bottlenecks(one=identity()), ids, options=DataOptions(batch_size=12))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert got.clean == pytest.approx(expected, rel=1e-5)
    assert got.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("add_special", [False, True])
def test_a_text_of_one_word_predicts_nothing(model, tokenizer, framing_tokenizer, add_special):
    with pytest.raises(ValueError, match="two tokens in a row"):
        splice_quality(model, bottlenecks(one=identity()), ["w1"], framing_tokenizer if add_special else tokenizer)


def test_tokens_behind_a_special_one_in_the_middle_are_not_counted(model):
    data = torch.tensor([[5, 6, 2, 7, 8, 9]])  # 2 ends a text
    got = splice_quality(model, bottlenecks(one=some()), data)
    assert got.tokens == 3
    assert reconstruction(model, bottlenecks(one=some()), data)[1].tokens == 5


def test_a_prompt_that_is_not_learned_is_no_prediction(model, ids):
    labels = ids.clone()
    labels[:, :4] = -100
    data = {"input_ids": ids, "labels": labels}
    found = splice_quality(model, bottlenecks(one=identity(HIDDEN)), data)
    with torch.no_grad():
        assert found.clean == pytest.approx(model(**data).loss.item(), rel=1e-5)
    assert found.tokens == labels.ne(-100).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_base_model("bert"),
        lambda: BertForMaskedLM(tiny_base_model("bert").config),  # which fills gaps
        lambda: tiny_seq2seq_model("t5"),
    ],
)
def test_models_that_predict_no_next_token_are_refused(make):
    model = make()
    with refusing(model, ValueError, "predict"):
        splice_quality(model, bottlenecks(one=identity(64)), tiny_inputs(model)["input_ids"])


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_other_causal_models_are_measured(model_type):
    model = tiny_model(model_type)
    stack = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}[model_type]
    found = Bottlenecks(stack, {0: place(identity(64))}, {})
    got = splice_quality(model, found, tiny_inputs(model)["input_ids"])
    assert got.divergence == pytest.approx(0, abs=1e-5)
    assert got.zeroed != got.clean


@pytest.mark.parametrize("measure", [reconstruction, splice_quality])
def test_special_tokens_alone_are_refused(model, measure):
    with pytest.raises(ValueError, match="no token"):
        measure(model, bottlenecks(one=identity()), torch.tensor([[1, 2, 0], [1, 1, 2]]))
