"""Feature reports: every figure against one made by hand, and pages that nothing in a text can break."""

import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.calibration.data import DataOptions
from hf_compress.errors import CalibrationError
from hf_compress.features import charts
from hf_compress.features.logits import _gain
from hf_compress.features.report import feature_report
from hf_compress.features.tallies import Largest
from hf_compress.features.words import _pieces
from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.fit import fit
from hf_compress.modules.bottleneck import BOTTLENECK, Form
from hf_compress.report.history import model_size
from hf_compress.report.report import CompressionReport
from hf_compress.report.stages import Stage
from hf_compress.rewrite.apply import apply
from hf_compress.rewrite.bottlenecks import Bottlenecks
from tests.helpers.bottlenecks import CURVE, LINEAR, TOP, fitted
from tests.helpers.models import leftovers
from tests.helpers.tiny import tiny_base_model, tiny_model, tiny_seq2seq_model


def report(tmp_path, model, texts, tokenizer, found=None, **more) -> str:
    more = {"options": DataOptions(batch_size=3)} | more
    path = feature_report(model, texts, tokenizer, tmp_path / "new" / "page.html", bottlenecks=found, **more)
    assert path == tmp_path / "new" / "page.html"
    return path.read_text(encoding="utf-8")


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


def cards(page: str) -> list[SimpleNamespace]:
    """The cards of a page, in their order."""
    return [card(text) for text in re.findall(r"<article>(.*?)</article>", page, re.S)]


def card(text: str) -> SimpleNamespace:
    head = re.search(r"<h3>#(\d+) .*? · (\S+)% of the energy", text)
    figures = re.search(r"active on (\S+)% .*mean \|z\| (\S+) · largest \|z\| (\S+)</p>", text)
    examples = re.findall(
        r'<li title="text (\d+), token (\d+)"><b class="(\w+)">(\S+)</b><span class="text">(.*?)</span></li>', text
    )
    places = {
        style: [(int(t), int(p), float(v)) for t, p, s, v, _ in examples if s == style] for style in ("pos", "neg")
    }
    words = [
        [(html.unescape(w), float(v)) for w, v in re.findall(r"<span>(.*?) <small>(.*?)</small></span>", part)]
        for part in re.findall(r'<div class="words">(.*?)</div>', text)
    ]
    return SimpleNamespace(
        index=int(head[1]),
        energy=float(head[2]) / 100,
        figures=tuple(map(float, figures.groups())),
        places=places,
        contexts=[context for *_, context in examples],
        words=words,
    )


@torch.no_grad()
def streams(model, tokenizer, texts, layer) -> list[torch.Tensor]:
    """What leaves a block, of each text by itself, (tokens, hidden); NaN at special tokens."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        stream = model(ids, output_hidden_states=True).hidden_states[layer + 1][0].clone()
        stream[torch.isin(ids[0], torch.tensor(tokenizer.all_special_ids))] = torch.nan
        found.append(stream)
    return found


def largest(codes: list[torch.Tensor], feature: int, count: int) -> list[tuple[int, int, float]]:
    """By hand: (text, token, value) of the largest codes above 0, at most two a text."""
    every = [(float(v), text, token) for text, code in enumerate(codes) for token, v in enumerate(code[:, feature])]
    chosen: list[tuple[int, int, float]] = []
    for value, text, token in sorted((one for one in every if one[0] > 0), reverse=True):
        if sum(one[0] == text for one in chosen) < 2:
            chosen.append((text, token, value))
    return chosen[:count]


def close(found, expected):
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], rel=6e-3)


@pytest.mark.parametrize("form", [LINEAR, TOP, Form(norm="lost"), Form(norm="none", select="above")])
def test_cards(form, model, framing_tokenizer, texts, tmp_path):
    """Order, figures and examples; special tokens and padding are in none of them."""
    found = fitted(form=form)
    module = found.places[1].module
    page = report(tmp_path, model, texts, framing_tokenizer, found, features=4, examples=5)
    rows = streams(model, framing_tokenizer, texts, 1)
    codes = [torch.where(row.isnan()[:, :1], torch.nan, module.encode(row)[0]) for row in rows]
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
        for (text, token, _), context in zip(one.places["pos"] + one.places["neg"], one.contexts, strict=True):
            tokens = ["<s>", *longer[text].split(), "</s>"]
            before, marked, after = re.fullmatch(r"(.*)<mark>(.*)</mark>(.*)", context).groups()
            assert marked.strip("␣") == html.escape(tokens[token])
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


def test_dead_features(model, tokenizer, texts, tmp_path):
    """Of a linear code, those of no code, or next to none; of others, only the former. They have no cards."""
    for form, expected in ((LINEAR, "#2, #5"), (Form(norm="none", select="above"), "#2")):
        found = fitted(form=form)
        module = found.places[1].module
        if form is LINEAR:
            module.encoder[:, 1] = 0
        else:
            module.bias[1] = -1e9
        module.encoder[:, 4] *= 1e-5
        if form is not LINEAR:
            module.bias[4], module.threshold[4] = 1e-6, 0.0
        page = report(tmp_path, model, texts, tokenizer, found)
        assert f'<p class="long">{expected}</p>' in page
        count = expected.count("#")
        assert f"Dead features: {count} of 6" in page
        assert f"<dt>dead</dt><dd>{count}</dd>" in page
        assert ("below 1e-06 of the mean feature" in page) == (form is LINEAR)
        assert sorted(one.index for one in cards(page)) == [i for i in (0, 2, 3, 4, 5, 6) if f"#{i}" not in expected]


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
    rows = streams(model, framing_tokenizer, texts, 1)
    codes = [torch.where(row.isnan()[:, :1], torch.nan, found.places[1].module.encode(row)[0]) for row in rows]
    for one in shown:
        close(one.places["pos"], largest(codes, found.places[1].kept.tolist().index(one.index), 8))


@pytest.mark.parametrize(("side", "words"), [("encoder", "No linear path"), ("decoder", "the direct path")])
def test_encoder_decoders(side, words, tokenizer, texts, tmp_path):
    """A decoder reads the text one place to the right, so the token at a place is the one before."""
    model = tiny_seq2seq_model("t5")
    page = report(tmp_path, model, texts, tokenizer, fitted(hidden=model.config.d_model, stack=f"{side}.block"))
    assert words in page
    for one in cards(page):
        for (text, token, _), context in zip(one.places["pos"] + one.places["neg"], one.contexts, strict=True):
            marked = re.search(r"<mark>(.*)</mark>", context)[1].strip("␣")
            assert marked == texts[text].split()[token - (side == "decoder")]


def test_decoders_that_are_given_a_text_of_their_own(tmp_path, tokenizer, ids):
    model = tiny_seq2seq_model("t5")
    own = ids.flip(1)
    batches = [{"input_ids": ids[:3], "decoder_input_ids": own[:3]}]
    page = report(tmp_path, model, batches, tokenizer, fitted(hidden=model.config.d_model, stack="decoder.block"))
    for one in cards(page):
        for (text, token, _), context in zip(one.places["pos"] + one.places["neg"], one.contexts, strict=True):
            assert re.search(r"<mark>(.*)</mark>", context)[1].strip("␣") == tokenizer.decode([own[text, token]])


def test_a_head_that_reads_another_stream(tokenizer, texts, tmp_path):
    """OPT's may be narrower than its stream, with a projection between."""
    config = tiny_model("opt").config
    config.word_embed_proj_dim = config.hidden_size // 2
    model = OPTForCausalLM(config).eval()
    page = report(tmp_path, model, texts, tokenizer, fitted(hidden=config.hidden_size, stack="model.decoder.layers"))
    assert "do not read this stream" in page
    assert 'class="words"' not in page


# --- where bottlenecks come from --------------------------------------------------------------------------------------


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
    told = {
        "features": 6,
        "of": 8,
        "curve": CURVE,
        "importance": found.places[1].importance.tolist(),
        "kept": [0, *range(2, 7)],
    }
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
    inputs = []
    handle = (
        model.model.layers[3]
        ._modules[BOTTLENECK]
        .register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    )
    with torch.no_grad():
        model(tokenizer(texts[0], return_tensors="pt")["input_ids"])
    handle.remove()
    part = report(tmp_path, model, texts[:1], tokenizer).split("<h2>")[2]
    codes = [found.places[3].module.encode(inputs[0][0])[0]]
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


# --- pages ------------------------------------------------------------------------------------------------------------

EVIL = ["<script>alert(1)</script>", "</style>", "&amp;", '"><img/src=x>', "\n", "\t", "\u202e", "\x00", "'", "-->"]


def evil_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", *EVIL])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


class Checked(HTMLParser):
    """Raises where tags are not balanced; keeps every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_nothing_in_a_text_breaks_the_page(model, tmp_path):
    """Tokens, words of the vocabulary and the model's name alike; what is unseen is written out."""
    tokenizer = evil_tokenizer()
    ids = torch.arange(2, len(tokenizer)).repeat(2, 3)
    model.name_or_path = "<b>name</b> & co"
    plain = Checked(report(tmp_path, model, torch.full((2, 6), 2), tokenizer, fitted()))
    page = report(tmp_path, model, ids, tokenizer, fitted(), features=6)
    checked = Checked(page)
    assert {tag for tag, _ in checked.tags} <= {tag for tag, _ in plain.tags} | {"mark"}
    for seen in ("<script>alert(1)</script>", "</style>", "&amp;", '"><img/src=x>', "⏎", "⇥", "⟨U+202E⟩", "␀", "-->"):
        assert seen in checked.words
    assert "Features of <b>name</b> & co" in checked.words
    assert not any(character in page for character in ("\u202e", "\x00", "\t"))


def test_pages_are_whole_in_themselves(model, framing_tokenizer, texts, tmp_path):
    """No script, nothing loaded, links that lead within the page alone, and every one of them leads somewhere."""
    found = fitted(0)
    found.places[3] = fitted(3, form=TOP).places[3]
    page = report(tmp_path, model, texts, framing_tokenizer, found)
    checked = Checked(page)
    assert page.startswith("<!doctype html>")
    assert "://" not in page
    assert not re.search(r"url\(|@import", page)
    for tag, attributes in checked.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "srcset", "xlink:href", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    links = [attributes["href"] for tag, attributes in checked.tags if tag == "a"]
    assert links == [f"#{attributes['id']}" for _, attributes in checked.tags if "id" in attributes]
    assert "prefers-color-scheme:dark" in page


def test_pieces_of_characters_that_tokens_share():
    """A byte of a character is a mark until the rest is there; spaces are told by the text before."""

    def decode(ids, **_):
        return b"".join({0: b"a", 1: b" b", 2: b"\xc3", 3: b"\xa9", 4: b"\n"}[i] for i in ids).decode(errors="replace")

    tokenizer = SimpleNamespace(decode=decode)
    assert _pieces(tokenizer, [0, 1, 2, 3, 4]) == ["a", " b", "\ufffd", "é", "\n"]
    assert _pieces(tokenizer, []) == []


# --- charts -----------------------------------------------------------------------------------------------------------


def points(chart: str) -> list[tuple[float, float]]:
    line = re.search(r'<polyline .*?points="(.*?)"', chart)[1]
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_curves_lie_where_their_axes_say():
    """A value on a line of the grid is drawn at its height; x runs over the whole width; both axes have names."""
    retention, error = charts.training_curve(CURVE).split("</figure>")[:2]
    assert "training step" in retention
    assert ">retention</text>" in retention
    assert ">error</text>" in error
    for chart, values in ((retention, CURVE["retention"]), (error, CURVE["error"])):
        levels = {
            float(label): float(y)
            for y, label in re.findall(r'M\d+ ([\d.]+)H\d+"/><text [^>]*text-anchor="end">([^<]*)<', chart)
        }
        assert len(levels) >= 3
        found = points(chart)
        assert [x for x, _ in found] == pytest.approx([66, 257, 448])
        (low, y_low), (high, y_high) = min(levels.items()), max(levels.items())
        for (_, y), value in zip(found, values, strict=True):
            assert y == pytest.approx(y_low + (value - low) / (high - low) * (y_high - y_low), abs=0.2)


def test_curves_of_thousands_of_steps_are_means():
    steps = [float(step) for step in range(5000)]
    curve = {"step": steps, "retention": [1.0] * 5000, "error": [1.0 + step % 2 for step in range(5000)]}
    chart = charts.training_curve(curve)
    found = points(chart.split("</figure>")[1])
    assert 200 <= len(found) <= 400
    assert charts._thinned(list(zip(steps, curve["error"], strict=True)))[0] == (6.0, pytest.approx(1 + 6 / 13))


@pytest.mark.parametrize(
    "curve",
    [
        {"step": [7.0], "retention": [0.95], "error": [0.0]},
        {"step": [0.0, 1.0], "retention": [1.0, 1.0], "error": [1e-13, 0.5]},
        {"step": [0.0, 1.0], "retention": [0.5, 0.5], "error": [math.nan, 0.5]},
        {"step": [0.0, 1e6], "retention": [0.5, 0.5], "error": [1e-9, 1e9]},
        {"step": [0.0, 1.0], "retention": [0.5, 0.4]},
    ],
)
def test_odd_curves(curve):
    """Every number stays within its chart."""
    chart = charts.training_curve(curve)
    assert chart.count("<figure>") == sum(name in curve for name in ("retention", "error"))
    assert "nan" not in chart
    for part in chart.split("</figure>")[:-1]:
        assert all(66 <= x <= 448 and 12 <= y <= 206 for x, y in points(part))
        labels = re.findall(r"<text [^>]*>([^<]*)</text>", part)
        assert len(labels) >= 4
        assert max(len(label) for label in labels[:-2]) <= 7


def test_what_is_not_known_of_the_training_is_said():
    assert "not known" in charts.training_curve({})
    assert "not known" in charts.spectrum([], None)
    assert "none was measured" in charts.spectrum([0.0, 0.0], [0, 1])


def test_spectrum():
    """Dots for what is kept, crosses for what is cut, in falling order, on a log scale; zeros on the lowest line."""
    chart = charts.spectrum([1.0, 100.0, 0.0, 10.0], [1, 3])
    dots = re.search(r'class="dots" d="(.*?)"', chart)[1]
    crosses = re.search(r'class="crosses" d="(.*?)"', chart)[1]
    places = [
        [tuple(map(float, place)) for place in re.findall(r"M([\d.]+) ([\d.]+)m", path)] for path in (dots, crosses)
    ]
    xs = [[x for x, _ in part] for part in places]
    assert xs == [[66.0, pytest.approx(66 + 382 / 3, abs=0.1)], [pytest.approx(66 + 382 * 2 / 3, abs=0.1), 448.0]]
    (_, hundred), (_, ten) = places[0]
    (_, one), (_, zero) = places[1]
    assert one - ten == pytest.approx(ten - hundred, abs=0.2)
    assert zero == pytest.approx(hundred + 5 * (ten - hundred), abs=0.5)
    assert "kept (2)" in chart
    assert "cut (2)" in chart
    assert "1 below 0.001 stand on the lowest line" in chart
    assert "importance (log scale)" in chart
    assert "cut not told apart" in charts.spectrum([1.0, 2.0], None)


def test_spectra_of_thousands_of_features_are_thinned():
    chart = charts.spectrum([float(value) for value in range(1, 10001)], range(5000, 10000))
    assert 600 <= chart.count("m-2.2") + chart.count("m-3.5") <= 800
    assert "kept (5,000)" in chart
