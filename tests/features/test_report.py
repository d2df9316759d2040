"""Feature reports: every figure against one made by hand."""

import html
import re
from dataclasses import replace

import pytest
import torch
from transformers import OPTForCausalLM

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError
from hf_compress.features.logits import _gain
from hf_compress.features.report import feature_report
from hf_compress.features.tallies import Largest
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import fit
from hf_compress.modules.bottleneck import BOTTLENECK, Form
from hf_compress.report.history import model_size
from hf_compress.report.report import CompressionReport
from hf_compress.report.stages import Stage
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.bottlenecks import Bottlenecks
from tests.helpers.bottlenecks import CURVE, LINEAR, TOP, fitted
from tests.helpers.models import leftovers, watching
from tests.helpers.pages import cards, close, codes_of, largest, marked, report, streams
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model


@pytest.mark.parametrize("form", [LINEAR, TOP, Form(norm="lost"), Form(norm="none", select="above")])
def test_cards(form, model, framing_tokenizer, texts, tmp_path):
    """Order, figures and examples; special tokens and padding are in none of them."""
    found = fitted(form=form)
    module = found.places[1].module
    page = report(tmp_path, model, texts, framing_tokenizer, found, features=4, examples=5)
    codes = codes_of(found, model, framing_tokenizer, texts)
    flat = torch.cat(codes)
    flat = flat[~flat.isnan().any(1)]
    energy = flat.square().mean(0) * module.decoder.square().sum(1)
    order = energy.argsort(descending=True)[:4].tolist()
    shown = cards(page)
    assert [one.index for one in shown] == found.places[1].kept[order].tolist()
    for one, feature in zip(shown, order, strict=True):
        z = flat[:, feature].abs()
        expected = (100 * float((z > 0).float().mean()), float(z.mean()), float(z.max()))
        assert one.figures == pytest.approx(expected, rel=6e-3)
        assert one.energy == pytest.approx(float(energy[feature] / energy.sum()), rel=6e-3)
        close(one.places["pos"], largest(codes, feature, 5))
        below = largest([-code for code in codes], feature, 5) if form.select == "all" else []
        close(one.places["neg"], [(text, token, -value) for text, token, value in below])


def test_header(model, framing_tokenizer, texts, tmp_path):
    """Explained variance, over all tokens at once; features active; tokens."""
    found = fitted(form=TOP)
    module = found.places[1].module
    page = report(tmp_path, model, texts, framing_tokenizer, found)
    rows = torch.cat(streams(model, framing_tokenizer, texts, 1)).double()
    rows = rows[~rows.isnan().any(1)]
    code, context = module.double().encode(rows)
    error = (rows - module.decode(code, context)).square().sum()
    explained = 1 - float(error / (rows - rows.mean(0)).square().sum())
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert float(figures["explained variance"]) == pytest.approx(explained, abs=1e-4)
    assert float(figures["active a token"]) == pytest.approx(float((code != 0).sum(1).double().mean()), rel=1e-3)
    assert figures["features kept"] == "6 of 8"
    assert figures["tokens seen"] == str(len(rows)) == str(sum(len(text.split()) for text in texts))
    assert "the 3 largest features of each token" in page


def test_examples_stand_in_their_text(model, framing_tokenizer, texts, tmp_path):
    """Ten tokens on either side at most, dots where there is more, and the right token marked."""
    longer = [" ".join(texts)[:150], *texts]
    page = report(tmp_path, model, longer, framing_tokenizer, fitted(), examples=12)
    checked = 0
    for one in cards(page):
        for text, token, before, word, after in marked(one):
            tokens = ["<s>", *longer[text].split(), "</s>"]
            assert word == html.escape(tokens[token])
            left, right = tokens[max(0, token - 10) : token], tokens[token + 1 : token + 11]
            assert html.unescape(before).lstrip("…").split() == left
            assert html.unescape(after).rstrip("…").split() == right
            assert before.startswith("…") == (token > 10)
            assert after.endswith("…") == (token + 11 < len(tokens))
            checked += 1
    assert checked > 50


def test_a_page_does_not_depend_on_batches(model, framing_tokenizer, texts, tmp_path):
    first, *others = (
        cards(report(tmp_path, model, texts, framing_tokenizer, fitted(), options=DataOptions(batch_size=size)))
        for size in (1, 5, 12)
    )
    for shown in others:
        for one, other in zip(first, shown, strict=True):
            assert one.index == other.index
            for style in ("pos", "neg"):  # by value: equals, of words that begin two texts, may change places
                values = [value for *_, value in other.places[style]]
                assert [value for *_, value in one.places[style]] == pytest.approx(values, rel=6e-3)


def test_only_the_largest_are_kept():
    """However many texts go by, what is held has the size of what is shown; equals stay in their order."""
    held = Largest(3, 4, torch.device("cpu"))
    values = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0))
    for first in range(0, 50, 5):
        held.update(values[first : first + 5], first)
    assert held.values.shape == (3, 4)
    assert held.places.shape == (3, 4, 2)
    for feature in range(3):
        expected = largest(list(values), feature, 4)
        assert [tuple(place) for place in held.places[feature].tolist()] == [one[:2] for one in expected]
    held = Largest(1, 3, torch.device("cpu"))
    for first in range(4):
        held.update(torch.ones(1, 1, 1), first)
    assert held.places[0, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("form", "dead"), [(LINEAR, [2, 5]), (Form(norm="none", select="above"), [2])])
def test_dead_features(form, dead, model, tokenizer, texts, tmp_path):
    """Of a linear code, those of no code, or next to none; of others, only the former. They have no cards."""
    found = fitted(form=form)
    module = found.places[1].module
    module.encoder[:, 4] *= 1e-5
    if form is LINEAR:
        module.encoder[:, 1] = 0
    else:
        module.bias[1], module.bias[4], module.threshold[4] = -1e9, 1e-6, 0.0
    page = report(tmp_path, model, texts, tokenizer, found)
    assert f'<p class="long">{", ".join(f"#{i}" for i in dead)}</p>' in page
    assert f"Dead features: {len(dead)} of 6" in page
    assert f"<dt>dead</dt><dd>{len(dead)}</dd>" in page
    assert ("below 1e-06 of the mean feature" in page) == (form is LINEAR)
    assert sorted(one.index for one in cards(page)) == [i for i in (0, 2, 3, 4, 5, 6) if i not in dead]


# --- logits -----------------------------------------------------------------------------------------------------------


def weighted(model):
    """The same model, with a final norm that is not just ones."""
    norm = next(module for path, module in model.named_modules() if path in ("model.norm", "transformer.ln_f"))
    norm.weight.data.copy_(torch.linspace(-1, 2, len(norm.weight)))
    return model, norm.weight.data


@pytest.mark.parametrize(("kind", "stack", "plus"), [("llama", "model.layers", 0), ("gpt2", "transformer.h", 0),
                                                    ("gemma2", "model.layers", 1)])  # fmt: skip
def test_logit_effects(kind, stack, plus, tokenizer, texts, tmp_path):
    """W′_i · diag(g) · Uᵀ; Gemma's norms store their gain less 1."""
    model, gain = weighted(tiny_model(kind))
    found = fitted(hidden=len(gain), stack=stack)
    page = report(tmp_path, model, texts, tokenizer, found)
    embeddings = model.get_output_embeddings().weight.data[: len(tokenizer)]
    module, kept = found.places[1].module, found.places[1].kept.tolist()
    for one in cards(page):
        effects = (module.decoder[kept.index(one.index)] * (gain + plus)) @ embeddings.T
        order = effects.argsort().tolist()
        for shown, expected in zip(one.words, (order[::-1][:8], order[:8]), strict=True):
            assert [word for word, _ in shown] == [tokenizer.decode([token]) for token in expected]
            assert [value for _, value in shown] == pytest.approx(effects[expected].tolist(), rel=6e-3)
    assert "those of the direct path" in page
    assert "times the gain of the final norm (" in page


@pytest.mark.parametrize("hidden", [8, 7])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_the_gain_of_a_norm(hidden, norm):
    module = norm(hidden)
    module.weight.data.copy_(torch.linspace(-1, 2, hidden))
    if norm is torch.nn.LayerNorm:
        module.bias.data.fill_(3.0)
    torch.testing.assert_close(_gain(module, hidden), module.weight.data, atol=1e-4, rtol=1e-4)


def test_a_norm_that_is_not_found_is_left_out(tokenizer, texts, tmp_path):
    """BERT's head has a dense layer before its norm; a model with no norm at all needs none."""
    model = tiny_model("bert")
    page = report(tmp_path, model, texts, tokenizer, fitted(hidden=64, stack="bert.encoder.layer"))
    assert "no single norm, and is left out" in page
    llama = tiny_model("llama")
    llama.model.norm = torch.nn.Identity()
    page = report(tmp_path, llama, texts, tokenizer, fitted(hidden=llama.config.hidden_size))
    assert "has no final norm" in page
    effects = fitted(hidden=llama.config.hidden_size).places[1].module.decoder @ llama.lm_head.weight.data.T
    shown = {round(value, 2) for one in cards(page) for words in one.words for _, value in words}
    assert shown <= {round(float(f"{value:.3g}"), 2) for value in effects.flatten().tolist()}


def test_encoders(framing_tokenizer, texts, tmp_path):
    """Without output embeddings there are no words, and a sentence that says so."""
    model = tiny_base_model("bert")
    found = fitted(hidden=64, stack="encoder.layer")
    page = report(tmp_path, model, texts, framing_tokenizer, found)
    assert "has no output embeddings" in page
    shown = cards(page)
    assert len(shown) == 6
    assert all(one.words == [] for one in shown)
    codes = codes_of(found, model, framing_tokenizer, texts)
    for one in shown:
        close(one.places["pos"], largest(codes, found.places[1].kept.tolist().index(one.index), 8))


@pytest.mark.parametrize(("side", "words"), [("encoder", "No linear path"), ("decoder", "the direct path")])
def test_encoder_decoders(side, words, tokenizer, texts, tmp_path):
    """A decoder reads the text one place to the right, so the token at a place is the one before."""
    model = tiny_seq2seq_model("t5")
    page = report(tmp_path, model, texts, tokenizer, fitted(hidden=model.config.d_model, stack=f"{side}.block"))
    assert words in page
    for one in cards(page):
        for text, token, _, word, _ in marked(one):
            assert word == texts[text].split()[token - (side == "decoder")]


def test_decoders_that_are_given_a_text_of_their_own(tmp_path, tokenizer, ids):
    model = tiny_seq2seq_model("t5")
    own = ids.flip(1)
    batches = [{"input_ids": ids[:3], "decoder_input_ids": own[:3]}]
    page = report(tmp_path, model, batches, tokenizer, fitted(hidden=model.config.d_model, stack="decoder.block"))
    for one in cards(page):
        for text, token, _, word, _ in marked(one):
            assert word == tokenizer.decode([own[text, token]])


def test_a_head_that_reads_another_stream(tokenizer, texts, tmp_path):
    """OPT's may be narrower than its stream, with a projection between."""
    config = tiny_model("opt").config
    config.word_embed_proj_dim = config.hidden_size // 2
    model = OPTForCausalLM(config).eval()
    page = report(tmp_path, model, texts, tokenizer, fitted(hidden=config.hidden_size, stack="model.decoder.layers"))
    assert "do not read this stream" in page
    assert 'class="words"' not in page


# --- where bottlenecks come from --------------------------------------------------------------------------------------


def noted(model, bottlenecks):
    """Have the model's history tell this, then a healing, and of bottleneck "2" that block 0 went since."""
    size = model_size(model)
    blocks = {stack: length + 1 for stack, length in size.blocks.items()}
    stages = [
        Stage("adaptive_compress", {}, size, size, [], {"bottlenecks": bottlenecks}, [], {}, True),
        Stage("heal", {}, size, size, [], {}, [], {}, None),
    ]
    if "2" in bottlenecks:
        gone = [{"edit": "RemoveBlocks", "stack": stack, "blocks": [0]} for stack in blocks]
        stages.append(Stage("drop_blocks", {}, replace(size, blocks=blocks), size, gone, {}, [], {}, True))
    model.compression_report = CompressionReport("", stages)


def test_spliced_bottlenecks_read_what_goes_into_them(model, framing_tokenizer, texts, tmp_path):
    """The same cards as before they were spliced in; what is known of their training comes from the report."""
    found = fitted()
    before = report(tmp_path, model, texts, framing_tokenizer, found)
    apply(found.plan(model), model)
    bare = report(tmp_path, model, texts, framing_tokenizer)
    assert [one.places for one in cards(bare)] == [one.places for one in cards(before)]
    assert "How the training went is not known" in bare
    assert "importance of the features is not known" in bare
    assert "numbered as they stand" in bare
    assert "<dd>6</dd>" in bare
    importance = found.places[1].importance.tolist()
    told = {"features": 6, "of": 8, "curve": CURVE, "importance": importance, "kept": [0, *range(2, 7)]}
    for number in ("1", "2"):
        noted(model, {number: told})
        assert report(tmp_path, model, texts, framing_tokenizer) == before


@pytest.mark.parametrize(
    ("entry", "numbers", "sentence"),
    [
        ({"features": 6, "of": 6}, [0, 1, 2, 3, 4, 5], None),
        ({"features": 6, "of": 8, "importance": [1.0, 9, 2, 3, 9, 4, 5, 0.5]}, [1, 2, 3, 4, 5, 6], None),
        ({"features": 6, "of": 8}, [0, 1, 2, 3, 4, 5], "numbered as they stand"),
        ({"features": 6, "of": 8, "stopped": "it <diverged>"}, [0, 1, 2, 3, 4, 5], "early: it &lt;diverged&gt;"),
        ({"features": 5, "of": 99, "curve": CURVE}, [0, 1, 2, 3, 4, 5], "numbered as they stand"),
    ],
)
def test_notes(entry, numbers, sentence, model, tokenizer, texts, tmp_path):
    """Importance tells which features were kept; notes of a bottleneck of another width are of another one."""
    apply(fitted().plan(model), model)
    noted(model, {"1": entry})
    page = report(tmp_path, model, texts, tokenizer)
    assert sorted(one.index for one in cards(page)) == numbers
    assert sentence is None or sentence in page
    assert (sentence is None) == ("numbered as they stand" not in page)
    assert "of 99" not in page


def test_several_blocks(model, tokenizer, texts, tmp_path):
    """A section for each, and nothing of the model is changed; what comes later reads what the first has changed."""
    found = fitted(0)
    found.places[3] = fitted(3, width=4).places[3]
    page = report(tmp_path, model, texts, tokenizer, found)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Behind block 0", "Behind block 3"]
    assert [len(cards(part)) for part in page.split("<h2>")[1:]] == [6, 4]
    assert leftovers(model) == []
    apply(found.plan(model), model)
    with torch.no_grad(), watching({3: model.model.layers[3]._modules[BOTTLENECK]}) as seen:
        model(tokenizer(texts[0], return_tensors="pt")["input_ids"])
    part = report(tmp_path, model, texts[:1], tokenizer).split("<h2>")[2]
    codes = [found.places[3].module.encode(seen[3][0][0])[0]]
    for one in cards(part):
        close(one.places["pos"], largest(codes, one.index, 8))


def test_bottlenecks_in_training_count_their_open_features(model, tokenizer, texts, tmp_path):
    found = fitted(width=8, form=Form(gated=True))
    module = found.places[1].module
    module.gate[torch.tensor([1, 6])] = 0
    apply(found.plan(model), model)
    page = report(tmp_path, model, texts, tokenizer)
    assert "Dead features: 0 of 6" in page
    assert "<dd>6 of 8</dd>" in page
    assert sorted(one.index for one in cards(page)) == [0, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("variant", ["default", "topk"])
def test_what_fit_gives(variant, model, tokenizer, texts, tmp_path):
    """In bfloat16 too, and with the model in training mode, which stays."""
    more = {"expansion": 2, "retention_final": 0.2} if variant == "topk" else {"retention_final": 0.5}
    found = fit(model, AdaptiveCompressConfig(variant=variant, layers=(1,), epochs=2, **more), texts, tokenizer)
    module = found.places[1].module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    page = report(tmp_path, model.to(torch.bfloat16).train(), texts, tokenizer, found, features=3, examples=2)
    assert len(cards(page)) == 3
    assert page.count("<polyline") == 2
    assert model.training
    assert leftovers(model) == []
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert ('<b class="neg">' in page) == (variant == "default")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "more", "message"),
    [
        (None, {}, r"no bottlenecks in its blocks: pass bottlenecks="),
        (fitted(9), {}, r"behind block 9, but model.layers has the blocks 0 to 4"),
        (fitted(hidden=12), {}, r"a stream 12 wide; that of model.layers is 16"),
        (fitted(stack="encoder.layer"), {}, r"no residual stack 'encoder.layer'"),
        (Bottlenecks("model.layers", {}, {}), {}, r"has no places"),
        (fitted(), {"features": 0}, r"features must be a whole number of at least 1; got 0"),
        (fitted(), {"examples": True}, r"examples must be a whole number"),
        (fitted(), {"examples": 2.0}, r"examples must be a whole number"),
        (fitted(), {"path": "page.pdf"}, r"must end in .html; got 'page.pdf'"),
        (fitted(), {"tokenizer": None}, r"tokenizer is None"),
        (fitted(), {"texts": [""]}, r"data is empty"),
        (fitted(), {"texts": None}, r"no calibration data"),
        (fitted(), {"texts": torch.randn(2, 3, 16)}, r"takes none of|no token ids"),
    ],
)
def test_refusals(found, more, message, model, tokenizer, texts, tmp_path, monkeypatch):
    """Nothing is written, and no hook is left on the model."""
    monkeypatch.chdir(tmp_path)
    arguments = {"texts": texts, "tokenizer": tokenizer, "path": "page.html"} | more
    with pytest.raises(ValueError, match=message):
        feature_report(model, bottlenecks=found, **arguments)
    assert list(tmp_path.iterdir()) == []
    assert leftovers(model) == []


def test_pictures_have_no_tokens(tokenizer, tmp_path):
    model = tiny_base_model("vit")
    size, channels = model.config.image_size, model.config.num_channels
    found = fitted(hidden=model.config.hidden_size, stack=Anatomy(model).stack().path)
    with pytest.raises(ValueError, match=r"the data no token ids: features are shown on text"):
        report(tmp_path, model, torch.randn(2, channels, size, size), tokenizer, found)
    assert leftovers(model) == []


def test_a_batch_without_real_tokens_counts_for_nothing(model, framing_tokenizer, texts, tmp_path):
    """A text that is empty between its special tokens has its number all the same."""
    page = report(tmp_path, model, ["", *texts[:3]], framing_tokenizer, fitted(), options=DataOptions(batch_size=1))
    assert f"<dd>{sum(len(text.split()) for text in texts[:3])}</dd>" in page
    assert {text for one in cards(page) for text, *_ in one.places["pos"]} == {1, 2, 3}


def test_activations_that_are_not_finite(model, tokenizer, texts, tmp_path):
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"block model.layers.1 gives NaN"):
        report(tmp_path, model, texts, tokenizer, fitted())
    assert leftovers(model) == []
