"""What relevance gives for every kind of model, and that it does not hang on padding, batching or precision."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.anatomy.parts import is_linear
from hf_compress.calibration.data import Batch, Calibration, DataOptions, prepare
from hf_compress.errors import CalibrationError
from tests.helpers.models import in_dtype, leftovers
from tests.helpers.relevance import FLOATS, make, refused
from tests.helpers.round_trip import build

IDS = torch.randint(4, 90, (3, 7), generator=torch.Generator().manual_seed(7))
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
LENGTHS = (7, 4, 2)
ALL = ("Llama", "Qwen3", "Mixtral", "GPT-2", "BERT", "ViT", "Dense")
TEXTS = ("Llama", "Qwen3", "Mixtral", "GPT-2", "BERT")
FIRST = ("BERT", "left")  # it classifies by what stands in the first place, padding or not
RULES = ("attnlrp", "cp")

# what each starts from, beside the tokens
SOURCES = {
    "Llama": {"model.embed_tokens": (3, 7, 32)},
    "Qwen3": {"model.embed_tokens": (3, 7, 32)},
    "Mixtral": {"model.embed_tokens": (3, 7, 32)},
    "GPT-2": {"transformer.wte": (3, 7, 32), "transformer.wpe": (1, 7, 32)},
    "BERT": {
        "bert.embeddings.word_embeddings": (3, 7, 32),
        "bert.embeddings.token_type_embeddings": (3, 7, 32),
        "bert.embeddings.position_embeddings": (1, 7, 32),
    },
    "ViT": {"pixel_values": (3, 3, 16, 16)},
    "Dense": {"input_values": (3, 6)},
}
NEURONS = {
    "Llama": ("model.layers.{}.mlp.down_proj", 64),
    "Qwen3": ("model.layers.{}.mlp.down_proj", 64),
    "GPT-2": ("transformer.h.{}.mlp.c_proj", 128),
    "BERT": ("bert.encoder.layer.{}.output.dense", 64),
    "ViT": ("vit.layers.{}.mlp.fc2", 64),
    "Dense": ("layers.{}.mlp.down_proj", 20),
}
HEADS = {
    "Llama": "model.layers.{}.self_attn.o_proj",
    "Qwen3": "model.layers.{}.self_attn.o_proj",
    "Mixtral": "model.layers.{}.self_attn.o_proj",
    "GPT-2": "transformer.h.{}.attn.c_proj",
    "BERT": "bert.encoder.layer.{}.attention.output.dense",
    "ViT": "vit.layers.{}.attention.o_proj",
}


def data_of(model):
    return {"pixel_values": PIXELS, "input_values": FLOATS, "input_ids": IDS}[model.main_input_name]


def near(found, expected, share=1e-4):
    torch.testing.assert_close(found, expected, rtol=10 * share, atol=share * float(expected.abs().max()))


def parts_of(result):
    """All that is found of single samples, by name."""
    tokens = {} if result.tokens is None else {"tokens": result.tokens}
    own = {name: values for name, values in result.inputs.items() if len(values) == len(result.explained)}
    return {"explained": result.explained, **tokens, **own, **result.neurons, **result.heads}


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", RULES)
@pytest.mark.parametrize("family", ALL)
def test_shapes_and_names(family, attention):
    model = make(family)
    result = hfc.relevance(model, data_of(model), composite=attention)
    assert result.explained.shape == (3,)
    assert {name: tuple(values.shape) for name, values in result.inputs.items()} == SOURCES[family]
    width = NEURONS.get(family)
    expected = {} if width is None else {width[0].format(i): (3, width[1]) for i in range(4)}
    assert {name: tuple(units.shape) for name, units in result.neurons.items()} == expected
    expected = {HEADS[family].format(i): (3, 4) for i in range(4)} if family in HEADS else {}
    assert {name: tuple(heads.shape) for name, heads in result.heads.items()} == expected
    assert result.weights == {}
    assert list(result.words) == []
    found = [result.explained, *result.inputs.values(), *result.neurons.values(), *result.heads.values()]
    assert all(torch.isfinite(values).all() and values.abs().max() > 0 for values in found)
    assert not any(values.requires_grad for values in found)


@pytest.mark.parametrize("family", ALL)
def test_tokens_are_the_embedded_words(family):
    """Summed over their width; pictures and vectors have none."""
    model = make(family)
    result = hfc.relevance(model, data_of(model))
    if family not in TEXTS:
        assert result.tokens is None
        return
    words = next(iter(SOURCES[family]))
    assert result.tokens.shape == (3, 7)
    torch.testing.assert_close(result.tokens, result.inputs[words].sum(dim=-1))


@pytest.mark.parametrize("family", ALL)
def test_weights_of_every_linear_map(family):
    model = make(family)
    without, result = (hfc.relevance(model, data_of(model), weights=weights) for weights in (False, True))
    expected = {path: module for path, module in model.named_modules() if is_linear(module)}
    assert result.weights.keys() == expected.keys()
    for path, module in expected.items():
        shape = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.T.shape
        assert result.weights[path].shape == shape
        assert torch.isfinite(result.weights[path]).all()
    for name, values in parts_of(without).items():
        assert torch.equal(parts_of(result)[name], values)


@pytest.mark.parametrize("family", [family for family in ALL if family in NEURONS])
def test_units_and_weights_agree(family):
    """Each hidden unit gets what the weights that read it pass on, without ε or with it."""
    model = make(family)
    for epsilon in (0.0, 0.1):
        result = hfc.relevance(model, data_of(model), weights=True, epsilon=epsilon)
        for path, units in result.neurons.items():
            near(units.sum(dim=0), result.weights[path].sum(dim=0))
        for path, heads in result.heads.items():
            near(heads.sum(dim=0), result.weights[path].sum(dim=0).unflatten(0, (4, -1)).sum(dim=1))


def test_blocks_that_share_their_ffn():
    """What it is relevant for in either place counts, as it does for its weights."""
    model = make("Dense")
    model.layers[2].mlp = model.layers[1].mlp
    result = hfc.relevance(model, FLOATS, weights=True)
    path = "layers.1.mlp.down_proj"
    near(result.neurons[path].sum(dim=0), result.weights[path].sum(dim=0))


@pytest.mark.parametrize("family", [family for family in ALL if family in NEURONS])
def test_neurons_and_heads_come_in_the_order_of_the_blocks(family):
    """Not in that of a set, which is another one in every process."""
    result = hfc.relevance(make(family), data_of(make(family)))
    assert list(result.neurons) == [NEURONS[family][0].format(i) for i in range(4)]
    assert list(result.heads) == ([HEADS[family].format(i) for i in range(4)] if family in HEADS else [])


def test_words_of_texts(model, tokenizer, texts):
    """Each token's own, padding included, so that they stand beside the relevances."""
    result = hfc.relevance(model, texts[:3], tokenizer)
    ids = prepare(texts[:3], model, tokenizer, DataOptions(batch_size=3)).batches[0].inputs["input_ids"]
    assert [list(row) for row in result.words] == [[tokenizer.decode([int(i)]) for i in row] for row in ids]
    assert result.tokens.shape == ids.shape
    for row, text in enumerate(texts[:3]):
        count = len(text.split())
        assert list(result.words[row])[:count] == text.split()
        assert float(result.tokens[row, count:].abs().sum()) == 0


# --- what it must not hang on -----------------------------------------------------------------------------------------


def padded(side, family):
    """Texts of seven, four and two tokens; positions count from the first real token where a model takes them."""
    mask = torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    mask = mask if side == "right" else mask.flip(1)
    inputs = {"input_ids": IDS * mask, "attention_mask": mask}
    if family != "BERT":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(inputs, mask.bool())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "side"), [(family, side) for family in TEXTS for side in ("right", "left") if (family, side) != FIRST]
)
def test_padding_is_irrelevant(family, side, implementation):
    """It gets nothing, and takes nothing from the rest."""
    model, batch = make(family), padded(side, family)
    model.set_attn_implementation(implementation)
    for target in ("predicted", 1):
        result = hfc.relevance(model, Calibration([batch]), target=target)
        assert float(result.tokens[~batch.real].abs().max()) == 0
        assert float(result.tokens[batch.real].abs().min()) > 0
        for row, length in enumerate(LENGTHS):
            ids = IDS[row, :length] if side == "right" else IDS[row, 7 - length :]
            alone = hfc.relevance(model, ids[None], target=target)
            near(result.tokens[row][batch.real[row]], alone.tokens[0])
            for path, units in alone.neurons.items():
                near(result.neurons[path][row], units[0])
            for path, heads in alone.heads.items():
                near(result.heads[path][row], heads[0])


@pytest.mark.parametrize("attention", RULES)
@pytest.mark.parametrize("family", ALL)
def test_other_samples_in_the_batch_make_no_difference(family, attention):
    model = make(family)
    data = data_of(model)
    together = parts_of(hfc.relevance(model, data, composite=attention))
    for row in range(3):
        alone = parts_of(hfc.relevance(model, data[row : row + 1], composite=attention))
        assert together.keys() >= alone.keys() - {
            name for name in alone if name.endswith(("wpe", "position_embeddings"))
        }
        for name, values in alone.items():
            if name in together:
                near(together[name][row], values[0])


@pytest.mark.parametrize("family", ALL)
def test_weights_are_summed_over_samples(family):
    model = make(family)
    data = data_of(model)
    together = hfc.relevance(model, data, weights=True).weights
    alone = [hfc.relevance(model, data[row : row + 1], weights=True).weights for row in range(3)]
    for path, weights in together.items():
        near(weights, sum(each[path] for each in alone))


@pytest.mark.parametrize("family", ALL)
def test_bfloat16(family):
    """Close to float32 as a whole, number by number only as close as three digits let it be."""
    model = make(family)
    half = in_dtype(model, torch.bfloat16)
    full = hfc.relevance(in_dtype(half, torch.float32), data_of(model), target=1, weights=True)
    found = hfc.relevance(half, data_of(model), target=1, weights=True)
    for one, other in ((found.inputs, full.inputs), (found.neurons, full.neurons), (found.heads, full.heads)):
        assert one.keys() == other.keys()
        for name in one:
            alike = torch.cosine_similarity(one[name].float().flatten(), other[name].flatten(), dim=0)
            assert float(alike) > 0.95, name
    torch.testing.assert_close(found.explained.float(), full.explained, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["Llama", "BERT", "GPT-2"])
def test_a_model_in_training_mode_is_explained_as_in_evaluation(family):
    """Dropout is off."""
    model = make(family)
    expected = hfc.relevance(model, IDS).tokens
    model.train()
    assert torch.equal(hfc.relevance(model, IDS).tokens, expected)
    assert model.training


def test_it_works_where_gradients_are_off():
    """Callers evaluate under no_grad, or with a frozen model."""
    model = make("Llama")
    expected = hfc.relevance(model, IDS, weights=True)
    model.requires_grad_(False)
    with torch.no_grad():
        found = hfc.relevance(model, IDS, weights=True)
    assert torch.equal(found.tokens, expected.tokens)
    assert all(torch.equal(found.weights[path], expected.weights[path]) for path in expected.weights)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"composite": "magic"}, "unknown composite 'magic'"),
        ({"composite": None}, "unknown composite None"),
        ({"composite": ["attnlrp"]}, "unknown composite"),
        ({"epsilon": -0.1}, r"epsilon must not be negative; got -0\.1"),
        ({"epsilon": float("nan")}, "epsilon must not be negative; got nan"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings, message):
    refused(make("Llama"), IDS, ValueError, message, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPT-2", "BERT", "ViT", "Dense"])
@pytest.mark.parametrize("where", ["in the middle", "at the end"])
def test_weights_that_are_not_finite(family, where, value):
    """Whatever stands between them and the outputs, the data and the weights are named, not a norm."""
    model = make(family)
    if where == "at the end":
        parameter = list(model.parameters())[-1] if family != "GPT-2" else model.transformer.ln_f.bias
        broken = parameter.detach()
    else:
        names = ("down_proj", "mlp.c_proj.weight", "output.dense.weight", "fc2.weight", "down_proj.weight")
        broken = next(p.detach() for n, p in model.named_parameters() if ".1." in n and n.endswith(names))
    broken.view(-1)[0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        hfc.relevance(model, data_of(model), target=0)
    assert leftovers(model) == []
    assert all(torch.equal(t.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "data", "message"),
    [
        ("Dense", torch.where(FLOATS[0, 0] == FLOATS, torch.nan, FLOATS), "NaN or infinite"),
        ("Llama", None, "no calibration data"),
        ("Llama", IDS[:0], "empty"),
        ("Llama", [IDS, IDS], "got 2 batches: call it for each"),
    ],
)
def test_data_that_makes_no_sense(family, data, message):
    refused(make(family), data, ValueError if isinstance(data, list) else CalibrationError, message)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, lambda model: model.compile() or model])
def test_models_that_hooks_do_not_reach(wrap):
    with pytest.raises(TypeError, match=r"PreTrainedModel that is not compiled; got .*hooks"):
        hfc.relevance(wrap(build("Llama")), torch.randint(4, 90, (2, 8)))
