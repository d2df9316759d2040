"""LRP on mixtures of experts taken apart: rows, energies and relevances by loops, and what becomes of whole models."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.api.compress import compress, make_plan
from hf_compress.attribution.composites import COMPOSITES
from hf_compress.attribution.passes import check_conserved, explain, explaining, logits_of
from hf_compress.attribution.scores import relevance_sums
from hf_compress.calibration.capture import forward as run_batch
from hf_compress.calibration.capture import inference
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.calibration.streams import advance, start_pairs
from hf_compress.errors import UnsupportedModelError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.lrp import LRPConfig, experts, weights
from hf_compress.methods.lrp.fisher import energies
from hf_compress.methods.lrp.grams import grams_of, linears_of
from hf_compress.methods.lrp.scores import input_norms, watch_rows
from hf_compress.modules.experts import Expert, SeparateExperts
from hf_compress.modules.packed import MixedPrecisionLinear
from hf_compress.modules.sparse import SparseLinear
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import split_experts
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward, generate
from tests.helpers.linears import buffer_bytes, mask_of, masks, stored, weight_of
from tests.helpers.models import in_dtype, leftovers
from tests.helpers.round_trip import train
from tests.helpers.stock import stock_outcomes
from tests.helpers.tiny import randomise, tiny_model

HIDDEN, WIDTH, BLOCKS, SPECIAL = 32, 48, 2, 1
LENGTHS = (9, 3, 7, 1, 5, 8)  # none as long as the batch of another
IDS = torch.randint(8, 90, (32, 12), generator=torch.Generator().manual_seed(7))
UNREAD = (4, 5)  # of `lopsided`


# --- models and data --------------------------------------------------------------------------------------------------


def mixtral(experts=4, dtype=torch.float32, seed=3):
    """Two blocks in which every parameter matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=experts)).eval()
    randomise(model, seed)
    if dtype == torch.float64:  # for which there are no grouped products
        model.set_experts_implementation("eager")
    return model.to(dtype)


def lopsided():
    """The same with six experts, two of which no token is ever given to.

    The logits of the others are a number and its negative, twice; so two of them are above the 0 of the rest.
    """
    model = mixtral(experts=6)
    with torch.no_grad():
        for layer in model.model.layers:
            table = layer.mlp.gate.weight
            table[1], table[3] = -table[0], -table[2]
            table[4:] = 0
    return model


def apart(model):
    """Every mixture taken apart, in place."""
    for index in range(len(model.model.layers)):
        carry_out(split_experts(model, f"model.layers.{index}.mlp.experts"), model, Undo())
    return model


def maps_of(model):
    """The linear maps of all experts, by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Expert)}
    return {f"{path}.{name}": getattr(module, name) for path, module in found.items() for name in ("up", "down")}


def path_of(layer, expert, name):
    return f"model.layers.{layer}.mlp.experts.{expert}.{name}"


def padded(side="right"):
    """Texts of several lengths, with a special token in front of some, in batches of three."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), 7)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        places = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, places] = IDS[row, :length]
        mask[row, places] = 1
        if length > 1 and row % 2:
            ids[row, places.start] = SPECIAL
    return {"input_ids": ids, "attention_mask": mask}


def alone():
    """The same texts, each by itself and without padding."""
    data = padded()
    pairs = zip(data["input_ids"], data["attention_mask"].bool(), strict=True)
    return [{"input_ids": ids[mask][None]} for ids, mask in pairs]


def batches_of(model, data, size=3):
    return prepare(data, model, None, DataOptions(batch_size=size))


# --- the oracle: experts that run one token at a time -----------------------------------------------------------------


class ByToken(nn.Module):
    """A Mixtral's experts by the definition, a token and a choice at a time, which keep all that is read and written.

    Attributes:
        seen: of each token and choice: the expert, the token, x, W x, h, V h.
        rules: whether gradients go by the rules of relevance: silu(g) = g · σ(g) with σ held fast, half of the product
            to each factor, and none to the router's weights.
    """

    has_gate = False  # the rules of the library are not to halve anything here

    def __init__(self, tables):
        super().__init__()
        self.first, self.second = nn.Parameter(tables.gate_up_proj.detach()), nn.Parameter(tables.down_proj.detach())
        self.seen, self.rules = [], False

    def forward(self, states, index, weights):
        written = []
        for t in range(len(states)):
            total = torch.zeros_like(states[t])
            for c in range(index.shape[1]):
                e = int(index[t, c])
                read = self.first[e] @ states[t]
                gate, up = read[: len(read) // 2], read[len(read) // 2 :]
                share = 1 / (1 + (-gate).exp())
                if self.rules:
                    gated = gate * share.detach()
                    hidden = (gated * up.detach() + gated.detach() * up) / 2
                else:
                    hidden = gate * share * up
                out = self.second[e] @ hidden
                for value in (read, out) if read.requires_grad else ():
                    value.retain_grad()
                self.seen.append((e, t, states[t], read, hidden, out))
                total = total + (weights[t, c].detach() if self.rules else weights[t, c]) * out
            written.append(total)
        return torch.stack(written)


def by_token(model, rules=False):
    """A model like this one, in tensors, whose experts are `ByToken`."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.experts = ByToken(layer.mlp.experts)
        layer.mlp.experts.rules = rules
    return model


def seen_by(model):
    """All that the experts have kept: (layer, expert, token, x, W x, h, V h); and forget it."""
    found = []
    for number, layer in enumerate(model.model.layers):
        found += [(number, *entry) for entry in layer.mlp.experts.seen]
        layer.mlp.experts.seen = []
    return found


def test_the_oracle_is_a_mixtral():
    """It gives what Transformers gives, and its rules conserve relevance."""
    model = mixtral(dtype=torch.float64)
    for ruled in (False, True):
        slow = by_token(model, ruled)
        for inputs in alone():
            with torch.no_grad():
                torch.testing.assert_close(slow(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    check_conserved(slow, next(iter(batches_of(slow, padded()))))


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_by_token(model):
    """What each map of each expert reads at real tokens, text by text, (rows, inputs)."""
    slow, rows = by_token(model), {}
    for inputs in alone():
        with torch.no_grad():
            slow(**inputs)
        for layer, expert, token, x, _, hidden, _ in seen_by(slow):
            if int(inputs["input_ids"][0, token]) != SPECIAL:
                rows.setdefault(path_of(layer, expert, "up"), []).append(x)
                rows.setdefault(path_of(layer, expert, "down"), []).append(hidden)
    return {path: torch.stack(found) for path, found in rows.items()}


def near(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected.to(found), rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_real_tokens(side):
    """Neither padding nor special tokens, though all are routed; each row at the expert that it was given to."""
    model = mixtral(dtype=torch.float64)
    expected = rows_by_token(model)
    assert len(expected) == 2 * 4 * BLOCKS, "every expert reads something"
    split, found, everything = apart(copy.deepcopy(model)), {}, []
    stack, maps = Anatomy(split).stack(), maps_of(split)
    split.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: everything.append(len(args[0])))
    with inference(split):
        for batch in batches_of(split, padded(side)):
            with watch_rows(stack, batch, maps, lambda path, rows: found.setdefault(path, []).append(rows)):
                run_batch(split, batch)
    assert sum(everything) == len(LENGTHS) * max(LENGTHS)
    assert found.keys() == expected.keys()
    for path, rows in expected.items():
        near(torch.cat(found[path]), rows)
    for layer in range(BLOCKS):
        count = sum(len(expected[path_of(layer, expert, "up")]) for expert in range(4))
        assert count == 2 * (sum(LENGTHS) - 2), "two choices a token; two texts begin with a special one, one is single"
    assert leftovers(split)[1:] == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 4])
def test_norms_and_gram_matrices_are_those_of_real_tokens(side, size):
    model = mixtral(dtype=torch.float64)
    expected = rows_by_token(model)
    split = apart(copy.deepcopy(model))
    data, stack, maps = batches_of(split, padded(side), size), Anatomy(split).stack(), maps_of(split)
    norms = input_norms(CalibrationContext(split, data), list(data), maps, stack)
    assert norms.keys() == maps.keys()
    with inference(split):
        pairs = start_pairs(split, stack, data, data.tokens)
        assert len(pairs) == len(data)
        for layer in range(BLOCKS):
            grams = grams_of(stack, layer, linears_of(stack, layer, maps), pairs)
            assert grams.keys() == {path for path in expected if path.startswith(f"model.layers.{layer}.")}
            for path, gram in grams.items():
                total = torch.zeros_like(gram)
                for row in expected[path]:
                    total += row[:, None] * row[None, :]
                near(gram, total)
                near(norms[path], (total.diagonal() / len(expected[path])).sqrt())
            advance(pairs, layer)


def test_maps_that_read_nothing_have_norms_of_0():
    split = apart(lopsided())
    data = batches_of(split, padded())
    norms = input_norms(CalibrationContext(split, data), list(data), maps_of(split), Anatomy(split).stack())
    for path, norm in norms.items():
        assert bool(norm.any()) == (int(path.split(".")[5]) not in UNREAD)
        assert len(norm) == (HIDDEN if path.endswith("up") else WIDTH)


# --- energies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", [0, 5])
def test_energies_are_those_of_single_texts_with_the_same_draws(side, seed):
    """Each text alone, token by token; the words are drawn from the batch's logits, in their order."""
    model = mixtral(dtype=torch.float64)
    split, slow = apart(copy.deepcopy(model)), by_token(model)
    data = batches_of(split, padded(side))
    found = energies(split, Anatomy(split).stack(), list(data), maps_of(split), seed)
    generator = torch.Generator().manual_seed(seed)
    read, gradients, rows = {}, {}, {}
    texts = iter(alone())
    for batch in data:
        with torch.no_grad():
            logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
        sums = logits.float().flatten(0, 1).softmax(-1).cumsum(-1)
        drawn = (sums > torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]).int().argmax(-1)
        drawn = drawn.view(logits.shape[:2])
        for sample in range(batch.samples):
            inputs, there = next(texts), batch.inputs["attention_mask"][sample].bool()
            words, real = drawn[sample][there], batch.real[sample][there]
            logs = slow(**inputs).logits[0].log_softmax(dim=-1)
            sum(logs[t, words[t]] for t in range(len(words)) if real[t]).backward()
            for layer, expert, token, x, up, hidden, down in seen_by(slow):
                for name, given, wrote in (("up", x, up), ("down", hidden, down)):
                    path = path_of(layer, expert, name)
                    gradients[path] = gradients.get(path, 0) + wrote.grad.square()
                    if real[token]:
                        read[path] = read.get(path, 0) + given.detach().square()
                        rows[path] = rows.get(path, 0) + 1
    assert found.read.keys() == found.gradients.keys() == read.keys() == maps_of(split).keys()
    assert found.rows == rows
    for path, total in gradients.items():
        assert float(total.max()) > 0
        near(found.read[path], read[path])
        near(found.gradients[path], total, 1e-3)
        near(found.of_outputs(path), total / rows[path], 1e-3)


def test_experts_that_read_nothing_have_no_energies():
    split = apart(lopsided())
    found = energies(split, Anatomy(split).stack(), list(batches_of(split, padded())), maps_of(split), 0)
    read = {path for path in maps_of(split) if int(path.split(".")[5]) not in UNREAD}
    assert found.read.keys() == found.gradients.keys() == found.rows.keys() == read


# --- relevances -------------------------------------------------------------------------------------------------------


def explained_words(logits, ids, real):
    """The logit of every real word at the real word before it."""
    pairs = [(t, int(ids[t + 1])) for t in range(len(ids) - 1) if real[t] and real[t + 1]]
    return sum((logits[t, word] for t, word in pairs), start=0 * logits.sum())


def relevances_by_token(model, ids_of_texts):
    """Σ R, Σ |R| over texts, and Σ |R| over single tokens, of every weight of every expert; one text at a time."""
    slow = by_token(model, rules=True)
    signed, absolute, by_tokens = {}, {}, {}
    for inputs in ids_of_texts:
        (batch,) = batches_of(slow, inputs)
        with explaining(slow) as sources:
            logits = logits_of(slow, batch, sources)[0]
            explained_words(logits, inputs["input_ids"][0], batch.real[0]).backward()
        of_text = {}
        for layer, expert, _, x, up, hidden, down in seen_by(slow):
            tables = slow.model.layers[layer].mlp.experts
            for name, table, given, wrote in (("up", tables.first, x, up), ("down", tables.second, hidden, down)):
                path = path_of(layer, expert, name)
                relevance = table[expert].detach() * (wrote.grad[:, None] * given.detach()[None, :])
                of_text[path] = of_text.get(path, 0) + relevance.double()
                by_tokens[path] = by_tokens.get(path, 0) + relevance.double().abs()
        for path, relevance in of_text.items():
            signed[path] = signed.get(path, 0) + relevance
            absolute[path] = absolute.get(path, 0) + relevance.abs()
    return signed, absolute, by_tokens


@pytest.mark.parametrize(
    ("dtype", "side", "size"),
    [
        (torch.float32, "right", 3),
        (torch.float64, "right", 3),
        (torch.float64, "left", 3),
        (torch.float64, "right", 6),
        (torch.float64, "right", 1),
        (torch.float64, "ragged", 4),  # and then two
    ],
    ids=str,
)
def test_relevances_of_weights_are_those_of_single_texts(dtype, side, size):
    """|R| is taken of a text, after its tokens are summed."""
    model = mixtral(dtype=dtype)
    signed, absolute, by_tokens = relevances_by_token(model, alone())
    split = apart(copy.deepcopy(model))
    data = [inputs["input_ids"][0].tolist() for inputs in alone()] if side == "ragged" else padded(side)
    found = relevance_sums(split, batches_of(split, data, size), maps_of(split))
    assert found.samples == len(LENGTHS)
    assert found.signed.keys() == found.absolute.keys() == signed.keys() == maps_of(split).keys()
    for path, total in signed.items():
        assert found.signed[path].dtype == found.absolute[path].dtype == torch.float32
        near(found.signed[path], total, 1e-3)
        near(found.absolute[path], absolute[path], 1e-3)
        gap = float((by_tokens[path] - absolute[path]).max())
        assert gap > 0.01 * float(absolute[path].max()), "tokens make a difference"
        assert bool((absolute[path] >= total.abs() - 1e-12).all())


def test_relevances_of_experts_that_read_nothing_are_0():
    split = apart(lopsided())
    found = relevance_sums(split, batches_of(split, padded()), maps_of(split))
    for path, module in maps_of(split).items():
        for sums in (found.signed, found.absolute):
            assert sums[path].shape == module.weight.shape
            assert bool(sums[path].any()) == (int(path.split(".")[5]) not in UNREAD)


def test_a_later_batch_does_not_see_the_routes_of_an_earlier_one():
    """An expert that reads tokens in one batch alone; batches add up all the same, in either order."""
    split = apart(mixtral(dtype=torch.float64))
    whole = relevance_sums(split, batches_of(split, padded(), 6), maps_of(split))
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        data = {name: values[order] for name, values in padded().items()}
        found = relevance_sums(split, batches_of(split, data, 1), maps_of(split))
        for path, total in whole.absolute.items():
            near(found.absolute[path], total, 1e-3)
            near(found.signed[path], whole.signed[path], 1e-3)


def test_relevances_of_hidden_units():
    """What an expert's last map reads, times the gradient there; sizes are those of single tokens."""
    model = mixtral(dtype=torch.float64)
    slow, signed, absolute = by_token(model, rules=True), {}, {}
    for inputs in alone():
        (batch,) = batches_of(slow, inputs)
        with explaining(slow) as sources:
            logits = logits_of(slow, batch, sources)[0]
            explained_words(logits, inputs["input_ids"][0], batch.real[0]).backward()
        for layer, expert, _, _, _, hidden, down in seen_by(slow):
            path = path_of(layer, expert, "down")
            table = slow.model.layers[layer].mlp.experts.second[expert].detach()
            units = hidden.detach() * (table.T @ down.grad)
            signed[path] = signed.get(path, 0) + units
            absolute[path] = absolute.get(path, 0) + units.abs()
    split = apart(copy.deepcopy(model))
    writers = {path: module for path, module in maps_of(split).items() if path.endswith("down")}
    found = relevance_sums(split, batches_of(split, padded()), {}, writers)
    assert found.signed_units.keys() == signed.keys()
    for path, total in signed.items():
        near(found.signed_units[path], total, 1e-3)
        near(found.absolute_units[path], absolute[path], 1e-3)


# --- conservation -----------------------------------------------------------------------------------------------------


@use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    """Experts without a gate, as Nemotron's."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(4, WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(4, HIDDEN, WIDTH))
        self.num_experts, self.act_fn = 4, ACT2FN["gelu"]


@use_experts_implementation(is_transposed=True, has_bias=True)
class Biased(nn.Module):
    """Gated experts with biases, transposed."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, HIDDEN, 2 * WIDTH))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(4, 2 * WIDTH))
        self.down_proj = nn.Parameter(torch.empty(4, WIDTH, HIDDEN))
        self.down_proj_bias = nn.Parameter(torch.empty(4, HIDDEN))
        self.num_experts, self.act_fn = 4, ACT2FN["silu"]


def with_experts(kind):
    """A Mixtral in whose mixtures other experts stand."""
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config)
    randomise(model, 3)
    return model.eval()


CONSERVED = {
    "mixtral": mixtral,
    "no gate": lambda: with_experts(Ungated),
    "biases": lambda: with_experts(Biased),
    **{name: (lambda name=name: tiny_model(name)) for name in ("qwen3_moe", "olmoe", "aria_text", "ernie4_5_moe")},
}


def split_all(model):
    stack = Anatomy(model).stack()
    ffns = [Anatomy(model).parts(stack, index).ffn for index in range(len(stack))]
    paths = [f"{stack.path}.{index}.{ffn.experts}" for index, ffn in enumerate(ffns) if ffn and ffn.experts]
    assert paths
    for path in paths:
        carry_out(split_experts(model, path), model, Undo())
    return model


@pytest.mark.parametrize("attention", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", CONSERVED)
def test_relevance_is_what_it_was_before_the_split(name, attention):
    model = CONSERVED[name]()
    split = split_all(copy.deepcopy(model))
    (batch,) = batches_of(split, IDS[:4], 4)
    check_conserved(split, batch)
    if name != "biases":  # those of all experts in one tensor are not counted
        check_conserved(model, batch)
    found = []
    for one in (model, split):
        with explaining(one, attention) as sources:
            found.append(explain(one, batch, sources, "predicted"))
    (explained, before), (again, after) = found
    torch.testing.assert_close(again, explained, rtol=1e-4, atol=1e-4)
    assert after.keys() == before.keys()
    for source, values in before.items():
        assert float(values.abs().max()) > 0
        near(after[source], values, 1e-3)


@pytest.mark.parametrize("part", ["factor", "routing"])
def test_conservation_is_lost_without_the_rules_of_experts(part):
    """Or the test above could not tell."""
    split = apart(mixtral())
    (batch,) = batches_of(split, IDS[:4], 4)
    with pytest.raises(UnsupportedModelError, match="relevance is lost or made up"):
        check_conserved(split, batch, replace(COMPOSITES["attnlrp"], **{part: None}))


def test_relevance_conserves_every_layer_of_weights():
    """What an expert's down weights carry is what comes to its hidden units; up and gate share it half and half."""
    model = mixtral(dtype=torch.float64)
    split = apart(copy.deepcopy(model))
    found = relevance_sums(split, batches_of(split, padded()), maps_of(split))
    for layer in range(BLOCKS):
        for expert in range(4):
            up, down = (found.signed[path_of(layer, expert, name)].double() for name in ("up", "down"))
            gates, ups = up[:WIDTH].sum(), up[WIDTH:].sum()
            near(gates, ups, 1e-4)
            near(gates + ups, down.sum(), 1e-4)


# --- whole models -----------------------------------------------------------------------------------------------------


def run(model, data=None, **settings):
    return compress(model, LRPConfig(**settings), IDS if data is None else data, options=DataOptions(batch_size=8))


def output(model):
    return forward(model, {"input_ids": IDS})


def made(name):
    return tiny_model("gpt_oss") if name == "gpt_oss" else mixtral()


def experts_of(model, kind):
    """The maps of experts that are stored as a kind of module, by path."""
    return {path: module for path, module in stored(model, kind).items() if ".experts." in path}


def file_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


BITS = {"bits": 4.5, "group_size": 16}
HALF = {"sparsity": 0.5}
PAPER = {"variant": "paper"}
WHOLE = {
    "bits": BITS,
    "sparse": HALF,
    "both": HALF | BITS,
    "rows": HALF | {"granularity": "row"},
    "n:m": {"granularity": "n:m"},
    "n:m and bits": {"granularity": "n:m"} | BITS,
    "paper": PAPER,
    "paper, two precisions": PAPER | {"prune": False, "split": (8, 4), "group_size": 16},
    "per module": {"bits": 8.5, "group_size": 32, "per": "module"},
    "heads and bits": HALF | BITS | {"granularity": "head"},
    "by rows": HALF | {"scope": "row"},
    "in the whole model": HALF | {"scope": "model"},
}
CASES = [("mixtral", case) for case in WHOLE]
CASES += [("gpt_oss", case) for case in ("bits", "sparse", "both", "rows", "n:m", "n:m and bits", "by rows")]


def settings_of(name, case):
    """Relevance has no rule for the gate of GPT-OSS, which is a function; norms of inputs do."""
    return WHOLE[case] | ({"score": "wanda"} if name == "gpt_oss" and case != "bits" else {})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Each case once: the model, and where it is saved."""
    folder, done = tmp_path_factory.mktemp("experts"), {}

    def get(name, case):
        if (name, case) not in done:
            model = run(made(name), **settings_of(name, case))
            place = folder / f"{name}-{len(done)}"
            done[name, case] = model, save(model, place)
        return done[name, case]

    get.done = done
    return get


@pytest.mark.parametrize(("name", "case"), CASES)
def test_experts_are_pruned_and_rounded_and_load_as_they_were_saved(name, case, compressed, tmp_path):
    model, folder = compressed(name, case)
    original = made(name)
    shapes = {path: (m.out_features, m.in_features) for path, m in maps_of(split_all(made(name))).items()}
    kind = MixedPrecisionLinear if case in ("bits", "per module", "heads and bits") else SparseLinear
    found = experts_of(model, kind)
    assert {path: (m.out_features, m.in_features) for path, m in found.items()} == shapes
    assert not [p for p, m in model.named_modules() if type(m) is nn.Linear and ".experts." in p]
    assert all(p.ndim < 3 for p in model.parameters()), "the tensors of all experts are gone"
    packs = "bits" in WHOLE[case] or "split" in WHOLE[case]
    assert all((module.weight.dtype == torch.int8) == packs for module in found.values())
    if name == "gpt_oss":
        assert torch.equal(found["model.layers.1.mlp.experts.2.up"].bias, _bias(original, 1, 2))
    assert not torch.equal(output(model), output(original))
    again = type(model).from_pretrained(folder)
    assert torch.equal(output(again), output(model))
    assert isinstance(again.model.layers[0].mlp.experts, SeparateExperts)
    original.save_pretrained(tmp_path / "original")
    assert file_bytes(folder) < 0.95 * file_bytes(tmp_path / "original")


def _bias(model, layer, expert):
    return model.model.layers[layer].mlp.experts.gate_up_proj_bias[expert]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, case in CASES if "sparsity" in WHOLE[case] and "heads" not in case]
)
def test_the_share_of_weights_that_go(name, case, compressed):
    model, _ = compressed(name, case)
    found = {path: mask for path, mask in masks(model).items() if ".experts." in path}
    for path, mask in found.items():
        if case != "in the whole model":
            assert int(mask.sum()) == mask.numel() // 2, path
        if case == "by rows":
            assert set(mask.sum(dim=1).tolist()) == {mask.shape[1] // 2}
        if case == "rows":
            assert set(mask.sum(dim=1).tolist()) == {0, mask.shape[1]}
    joined = torch.cat([mask.flatten() for mask in masks(model).values()])
    assert abs(float(joined.double().mean()) - 0.5) < 1e-3
    if case == "in the whole model":
        assert len({float(mask.double().mean()) for mask in found.values()}) > 4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("case", ["n:m", "n:m and bits"])
def test_two_of_each_four_stay(name, case, compressed):
    model, _ = compressed(name, case)
    for path, mask in masks(model).items():
        if ".experts." in path:
            assert set(mask.view(-1, 4).sum(dim=1).tolist()) == {2}


@pytest.mark.parametrize(
    ("name", "case"), [("mixtral", "bits"), ("mixtral", "both"), ("gpt_oss", "bits"), ("gpt_oss", "n:m and bits")]
)
def test_the_budget_counts_the_weights_of_all_experts(name, case, compressed):
    """All that is stored, beside biases, is within the bits asked for, of the linear maps and those of experts."""
    model, _ = compressed(name, case)
    split = split_all(made(name))
    count = sum(
        m.weight.numel() for p, m in split.named_modules() if isinstance(m, nn.Linear) and ".layers." in p
    )  # the router is no linear map
    aim = WHOLE[case]["bits"] * count / 8
    assert 0.97 * aim <= buffer_bytes(model) <= aim
    found = experts_of(model, (MixedPrecisionLinear, SparseLinear))
    assert len({int(bits) for module in found.values() for bits in module.bits}) > 1


@pytest.mark.parametrize("case", ["sparse", "both"])
def test_scores_decide_which_weights_of_an_expert_stay(case, compressed):
    """|w| · (E |R| / |w|) ** ¼, by the loop over tokens and texts."""
    model, _ = compressed("mixtral", case)
    original = mixtral()
    _, absolute, _ = relevances_by_token(original, [{"input_ids": ids[None]} for ids in IDS])
    for path, module in maps_of(apart(original)).items():
        size = module.weight.detach().double().abs()
        scores = (size * (absolute[path] / len(IDS) / size) ** 0.25).flatten()
        best = set(scores.argsort(descending=True)[: len(scores) // 2].tolist())
        own = set(mask_of(model.get_submodule(path)).flatten().nonzero().flatten().tolist())
        assert len(own) == len(best)
        assert len(own ^ best) <= 4, "but for ties and the rounding of sums"


def test_the_paper_keeps_what_has_a_positive_relevance(compressed):
    model, _ = compressed("mixtral", "paper")
    original = mixtral()
    signed, _, _ = relevances_by_token(original, [{"input_ids": ids[None]} for ids in IDS])
    for path, module in maps_of(apart(original)).items():
        own = model.get_submodule(path)
        mask = mask_of(own)
        sure = signed[path].abs() > 1e-4 * signed[path].abs().max()
        assert torch.equal(mask[sure], (signed[path] > 0)[sure])
        assert torch.equal(own.unpacked(), module.weight * mask), "and leaves it as it is"


def test_the_papers_two_precisions(compressed):
    model, _ = compressed("mixtral", "paper, two precisions")
    original = mixtral()
    signed, _, _ = relevances_by_token(original, [{"input_ids": ids[None]} for ids in IDS])
    for path, module in maps_of(apart(original)).items():
        own = model.get_submodule(path)
        upper = mask_of(own)
        assert abs(float(upper.double().mean()) - 0.5) < 0.02
        gaps = (own.unpacked() - module.weight.detach()).abs()
        assert float(gaps[upper].mean()) < 0.3 * float(gaps[~upper].mean())
        if bool(signed[path].any()):
            assert float(signed[path][upper].min()) >= float(signed[path][~upper].max()) - 1e-4


def test_compensated_weights_of_experts_are_nearer():
    """With what an expert reads, and not what all tokens are; in its own outputs."""
    original = mixtral()
    split, rows = apart(mixtral()), {}
    (batch,) = batches_of(split, IDS, len(IDS))
    with inference(split), watch_rows(Anatomy(split).stack(), batch, maps_of(split), rows.__setitem__):
        run_batch(split, batch)
    assert rows.keys() == maps_of(split).keys()
    for settings, plain in ((HALF, {"compensation": "none"}), (BITS, {"rounding": "nearest"})):
        errors = []
        for more in ({}, plain):
            model = run(copy.deepcopy(original), **settings, **more)
            gaps = [
                float((rows[path] @ (weight_of(model.get_submodule(path)) - weight_of(module)).T).square().mean())
                for path, module in maps_of(split).items()
                if ".layers.0." in path and path.endswith("up")  # which reads the same in all
            ]
            errors.append(gaps)
        better = [first < second for first, second in zip(*errors, strict=True)]
        assert all(better)


@pytest.mark.parametrize("case", ["bits", "both", "rows"])
def test_half_precision(case, tmp_path):
    single, model = mixtral(), in_dtype(mixtral(), torch.bfloat16)
    run(single, **WHOLE[case])
    run(model, **WHOLE[case])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = type(model).from_pretrained(save(model, tmp_path / "out"), dtype=torch.bfloat16)
    assert torch.equal(output(again), output(model))
    for path, mask in masks(model).items():
        least = 0.6 if case == "rows" else 0.9
        assert float((mask == masks(single)[path]).double().mean()) > least, (
            "it decides almost as single precision does"
        )
    for path, module in experts_of(model, (MixedPrecisionLinear, SparseLinear)).items():
        bits = (
            [m.bits.double().mean() for m in (module, single.get_submodule(path))] if "bits" in WHOLE[case] else [0, 0]
        )
        assert abs(float(bits[0] - bits[1])) < 0.5


@pytest.mark.parametrize("settings", [BITS, HALF, HALF | BITS], ids=str)
def test_experts_that_single_batches_do_not_reach(settings, tmp_path):
    """Texts of two tokens, one in a batch, and few of them scored: what is known of an expert differs by the batch."""
    model = run_single(mixtral(), **settings)
    assert len(experts_of(model, (MixedPrecisionLinear, SparseLinear))) == 2 * 4 * BLOCKS
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(output(again), output(model))


def run_single(model, **settings):
    read, handles = {}, []
    split = apart(copy.deepcopy(model))
    for path, module in maps_of(split).items():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: read.setdefault(path, []).append(1)))
    for row in IDS[:12, :2]:
        split(input_ids=row[None])
    assert min(map(len, read.values())) < 12
    config = LRPConfig(tokens=3, **settings)
    return compress(model, config, IDS[:12, :2], options=DataOptions(batch_size=1))


def test_training_goes_on_and_keeps_zeros_zero(tmp_path):
    model = run(mixtral(), **HALF)
    before = {path: module.unpacked().detach() for path, module in experts_of(model, SparseLinear).items()}
    train(model)
    for path, module in experts_of(model, SparseLinear).items():
        after = module.unpacked().detach()
        assert not after[~mask_of(module)].any()
        assert not torch.equal(after, before[path])
    again = type(model).from_pretrained(save(model.eval(), tmp_path / "out"))
    assert torch.equal(output(again), output(model))
    assert torch.equal(generate(again, {"input_ids": IDS[:2]}), generate(model, {"input_ids": IDS[:2]}))


# --- without the plugin -----------------------------------------------------------------------------------------------


def test_stock_transformers_stops(compressed, tmp_path):
    cases = [("mixtral", case) for case in ("bits", "sparse", "both", "rows", "paper", "heads and bits")]
    folders = {str(compressed(*case)[1]): case for case in [*cases, ("gpt_oss", "bits"), ("gpt_oss", "rows")]}
    found = stock_outcomes(folders, tmp_path)
    assert {folders[f]: outcome for f, outcome in found.items()} == dict.fromkeys(
        folders.values(), 2 * ["size mismatch"]
    )


# --- experts that no token is given to --------------------------------------------------------------------------------


def unread(model):
    """The maps, by path, of experts that read nothing."""
    return {path: module for path, module in maps_of(model).items() if int(path.split(".")[5]) in UNREAD}


@pytest.fixture
def weights_before():
    """Of the experts that read nothing."""
    split = apart(lopsided())
    ran = []
    for expert in (m for m in split.modules() if isinstance(m, Expert)):
        expert.register_forward_hook(lambda module, *_: ran.append(module))
    output(split)
    assert {id(m) for m in ran} == {
        id(m) for p, m in split.named_modules() if isinstance(m, Expert) and int(p.rpartition(".")[2]) not in UNREAD
    }
    return {path: module.weight.detach() for path, module in unread(split).items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"score": "wanda"}, {"score": "signed"}, {"scope": "row"}, {"compensation": "none"}, {"temper": 1.0}],
    ids=str,
)
def test_unread_experts_are_pruned_by_size_and_nothing_else(settings, weights_before):
    model = run(lopsided(), **HALF, **settings)
    for path, weight in weights_before.items():
        module = model.get_submodule(path)
        rows = weight if settings.get("scope") == "row" else weight.flatten()[None]
        expected = torch.zeros_like(rows).bool()
        for i, row in enumerate(rows):
            sizes = row.abs().tolist()
            expected[i, sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) - len(sizes) // 2 :]] = True
        mask = mask_of(module)
        assert torch.equal(mask, expected.view(weight.shape))
        assert torch.equal(module.unpacked(), weight * mask), "nothing is known that could be made up for"


def test_rows_and_groups_of_unread_experts_go_by_size(weights_before):
    model = run(lopsided(), granularity="row", **HALF)
    for path, weight in weights_before.items():
        sums = weight.abs().sum(dim=1).tolist()
        kept = sorted(range(len(sums)), key=lambda i: -sums[i])[: len(sums) // 2]
        assert sorted(kept) == mask_of(model.get_submodule(path)).all(dim=1).nonzero().flatten().tolist()
    model = run(lopsided(), granularity="n:m")
    for path, weight in weights_before.items():
        groups = zip(weight.reshape(-1, 4).tolist(), mask_of(model.get_submodule(path)).reshape(-1, 4), strict=True)
        for values, mask in groups:
            assert sorted(sorted(range(4), key=lambda i: -abs(values[i]))[:2]) == mask.nonzero().flatten().tolist()


def test_the_paper_leaves_unread_experts_whole(weights_before):
    """Sizes are above 0, all of them; where two precisions are given, by the median size."""
    model = run(lopsided(), **PAPER)
    for path, weight in weights_before.items():
        assert bool(mask_of(model.get_submodule(path)).all())
        assert torch.equal(model.get_submodule(path).unpacked(), weight)
    model = run(lopsided(), prune=False, split=(8, 4), group_size=16, **PAPER)
    for path, weight in weights_before.items():
        median = sorted(weight.abs().flatten().tolist())[(weight.numel() - 1) // 2]
        assert torch.equal(mask_of(model.get_submodule(path)), weight.abs() > median)


@pytest.mark.parametrize("allocation", ["fisher", "relevance", "error"])
def test_unread_experts_are_rounded_to_nearest(allocation, weights_before):
    """Each weight is the nearest of the values that its group's grid has; in the fewest bits, if nothing feels it."""
    model = run(lopsided(), allocation=allocation, **BITS)
    bits = {path: module.bits.tolist() for path, module in experts_of(model, MixedPrecisionLinear).items()}
    for path, weight in weights_before.items():
        module = model.get_submodule(path)
        steps = module.steps.view(torch.bfloat16).double().tolist()
        grids = [
            [step * (q - zero) for q in range(2**width)]
            for step, width, zero in zip(steps, bits[path], module.zeros.tolist(), strict=True)
        ]
        rounded, groups = module.unpacked().reshape(-1, 16).tolist(), weight.reshape(-1, 16).tolist()
        for grid, values, own in zip(grids, groups, rounded, strict=True):
            for value, got in zip(values, own, strict=True):
                least = min(abs(value - point) for point in grid)
                assert abs(value - got) <= least + 1e-6
        if allocation != "error":
            assert set(bits[path]) == {2}
    read = [width for path, widths in bits.items() if path not in weights_before for width in widths]
    if allocation != "error":
        assert sum(read) / len(read) > 2.3


def test_in_few_bits_and_sparse(weights_before):
    model = run(lopsided(), **HALF, **BITS)
    for path, weight in weights_before.items():
        module = model.get_submodule(path)
        mask = mask_of(module)
        assert float(weight[mask].abs().min()) >= float(weight[~mask].abs().max())
        assert set(module.bits.tolist()) == {2}
        assert not module.unpacked()[~mask].any()


@pytest.mark.parametrize("score", ["relevance", "wanda", "signed"])
def test_compared_across_the_model_unread_experts_would_be_gone(score):
    model = lopsided()
    trace, before = Trace.of(model), output(model)
    with pytest.raises(
        ValueError, match=r"no weight of model\.layers\.\d\.mlp\.experts\.[45]\.(up|down) would be left"
    ):
        run(model, scope="model", score=score, **HALF)
    assert trace.difference(model) is None
    assert leftovers(model) == []
    assert torch.equal(output(model), before)


# --- the same each time, and nothing left behind ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("case", ["bits", "both"])
def test_one_seed_one_result(name, case, compressed):
    first, _ = compressed(name, case)
    torch.manual_seed(99)
    again = run(made(name), **settings_of(name, case))
    found, expected = Trace.of(again).tensors, Trace.of(first).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[path]) for path, value in found.items())


def test_other_seeds_other_results():
    results = [run(mixtral(), score="random", seed=seed, **HALF) for seed in (1, 1, 2)]
    path = path_of(1, 2, "down")
    first, same, other = (masks(model)[path] for model in results)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("case", ["bits", "sparse", "both", "paper", "heads and bits"])
def test_a_plan_is_made_without_a_trace_and_is_what_compress_does(case, compressed):
    model = mixtral()
    trace, before = Trace.of(model), output(model)
    modules = [id(module) for module in model.modules()]
    plan = make_plan(model, LRPConfig(**WHOLE[case]), IDS, options=DataOptions(batch_size=8))
    assert trace.difference(model) is None
    assert leftovers(model) == []
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(output(model), before)
    apply(plan, model)
    assert torch.equal(output(model), output(compressed("mixtral", case)[0]))


@pytest.mark.parametrize("case", ["bits", "sparse"])
def test_what_is_apart_already_gets_the_same(case, compressed, caplog):
    model = mixtral()
    for index in range(BLOCKS):
        apply(split_experts(model, f"model.layers.{index}.mlp.experts"), model)
    run(model, **WHOLE[case])
    assert "stay as they are" not in caplog.text
    expected = compressed("mixtral", case)[0]
    assert torch.equal(output(model), output(expected))
    assert Trace.of(model).tensors.keys() == Trace.of(expected).tensors.keys()


def test_blocks_that_go_afterwards(tmp_path):
    model = run(mixtral(), **BITS)
    apply(Plan((RemoveBlocks("model.layers", (0,)),)), model)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(output(again), output(model))
    assert len(experts_of(again, MixedPrecisionLinear)) == 8


def unchanged(model, error, message, **settings):
    trace, before = Trace.of(model), output(model)
    modules = [id(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        run(model, **settings)
    assert trace.difference(model) is None
    assert leftovers(model) == []
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(output(model), before)
    assert not hasattr(model, "compression_report")


@pytest.mark.parametrize(
    ("name", "message", "settings"),
    [
        ("mixtral", "bits=3 leaves 1.00 bits for each weight", {"bits": 3, "group_size": 16}),
        ("mixtral", "do not come in groups of 5", {"granularity": "n:m", "pattern": (2, 5)}),
        ("mixtral", "have experts|has experts", HALF | {"granularity": "neuron"}),
        ("gpt_oss", "relevance is lost or made up", HALF),
        ("gpt_oss", "relevance is lost or made up", PAPER),
        ("gpt_oss", "relevance is lost or made up", BITS | {"allocation": "relevance"}),
    ],
    ids=str,
)
def test_a_refusal_leaves_the_model_as_it_was(name, message, settings):
    unchanged(made(name), (ValueError, UnsupportedModelError), message, **settings)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["solve", "apply", "split"])
def test_a_failure_leaves_the_model_as_it_was(where, error, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise error

    place = {
        "solve": (weights, "solve_masked"),
        "apply": (sys.modules["hf_compress.rewrite.apply"], "check_parity"),
        "split": (experts, "_check_same"),
    }
    monkeypatch.setattr(*place[where], fail)
    unchanged(mixtral(), type(error), str(error), **HALF)
    assert calls


def test_experts_that_would_not_write_the_same_are_refused(monkeypatch):
    """Before anything is scored, and with the path of the mixture."""
    own = SeparateExperts.forward
    monkeypatch.setattr(SeparateExperts, "forward", lambda *args: 1.01 * own(*args))
    unchanged(
        mixtral(),
        UnsupportedModelError,
        r"the experts of model\.layers\.0\.mlp\.experts write something else .*by 0\.01",
        **HALF,
    )


def test_experts_that_cannot_be_taken_apart_stay_as_they_are(caplog, tmp_path):
    model, original = tiny_model("llama4_text"), tiny_model("llama4_text")
    run(model, score="magnitude", **HALF)
    assert "tensors of three dimensions stay as they are" in caplog.text
    mixtures = [path for path, module in original.named_modules() if type(module).__name__ == "Llama4TextExperts"]
    assert mixtures
    for path in mixtures:
        assert path in caplog.text
        for name, tensor in original.get_submodule(path).named_parameters():
            assert torch.equal(model.get_submodule(path).get_parameter(name), tensor)
    assert stored(model, SparseLinear)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(output(again), output(model))
