"""Mixtures of experts that are taken apart, and the same by the definition: one token and one choice at a time."""

import copy
from collections import defaultdict

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.attribution.passes import explaining, logits_of
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.modules.experts import Expert
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import split_experts
from tests.helpers.linears import IDS
from tests.helpers.round_trip import LLAMA
from tests.helpers.tiny import randomise

HIDDEN, WIDTH, BLOCKS, SPECIAL = 32, 48, 2, 1
LENGTHS = (9, 3, 7, 1, 5, 8)  # none as long as the batch of another
UNREAD = (4, 5)  # of `lopsided`


def mixtral(experts=4, dtype=torch.float32, seed=3):
    """Two blocks in which every parameter matters."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": WIDTH, "num_hidden_layers": BLOCKS, "num_local_experts": experts}
    model = MixtralForCausalLM(MixtralConfig(**LLAMA | sizes)).eval()
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
    stack = Anatomy(model).stack()
    ffns = [Anatomy(model).parts(stack, index).ffn for index in range(len(stack))]
    paths = [f"{stack.path}.{index}.{ffn.experts}" for index, ffn in enumerate(ffns) if ffn and ffn.experts]
    assert paths
    for path in paths:
        carry_out(split_experts(model, path), model, Undo())
    return model


def maps_of(model):
    """The linear maps of all experts, by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Expert)}
    return {f"{path}.{name}": getattr(module, name) for path, module in found.items() for name in ("up", "down")}


def path_of(layer, expert, name):
    return f"model.layers.{layer}.mlp.experts.{expert}.{name}"


def is_unread(path):
    """Whether this is a map of an expert of `lopsided` that reads nothing."""
    return int(path.split(".")[5]) in UNREAD


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


# --- the oracle -------------------------------------------------------------------------------------------------------


class ByToken(nn.Module):
    """A Mixtral's experts by the definition, which keep all that is read and written.

    Attributes:
        seen: of each token and choice: the expert, the token, x, W x, h, V h.
        rules: whether gradients go by the rules of relevance: silu(g) = g · σ(g) with σ held fast, half of the product
            to each factor, and none to the router's weights.
    """

    has_gate = False  # the rules of the library are not to halve anything here

    def __init__(self, tables, rules):
        super().__init__()
        self.first, self.second = nn.Parameter(tables.gate_up_proj.detach()), nn.Parameter(tables.down_proj.detach())
        self.seen, self.rules = [], rules

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
        layer.mlp.experts = ByToken(layer.mlp.experts, rules)
    return model


def seen_by(model):
    """All that the experts have kept: (layer, expert, token, x, W x, h, V h); and forget it."""
    found = []
    for number, layer in enumerate(model.model.layers):
        found += [(number, *entry) for entry in layer.mlp.experts.seen]
        layer.mlp.experts.seen = []
    return found


def explained_by_token(slow, texts):
    """What the experts of a `by_token` model have kept of each text, when every real word was explained.

    That is the logit of each at the real word before it.
    """
    for inputs in texts:
        (batch,) = batches_of(slow, inputs)
        ids, real = inputs["input_ids"][0], batch.real[0]
        with explaining(slow) as sources:
            logits = logits_of(slow, batch, sources)[0]
            pairs = [(t, int(ids[t + 1])) for t in range(len(ids) - 1) if real[t] and real[t + 1]]
            sum((logits[t, word] for t, word in pairs), start=0 * logits.sum()).backward()
        yield seen_by(slow)


def relevances_by_token(model, texts):
    """Σ R, Σ |R| over texts, and Σ |R| over single tokens, of every weight of every expert; one text at a time."""
    slow = by_token(model, rules=True)
    signed, absolute, by_tokens = defaultdict(float), defaultdict(float), defaultdict(float)
    for kept in explained_by_token(slow, texts):
        of_text = defaultdict(float)
        for layer, expert, _, x, up, hidden, down in kept:
            tables = slow.model.layers[layer].mlp.experts
            for name, table, given, wrote in (("up", tables.first, x, up), ("down", tables.second, hidden, down)):
                relevance = table[expert].detach() * (wrote.grad[:, None] * given.detach()[None, :])
                of_text[path_of(layer, expert, name)] += relevance.double()
                by_tokens[path_of(layer, expert, name)] += relevance.double().abs()
        for path, relevance in of_text.items():
            signed[path] += relevance
            absolute[path] += relevance.abs()
    return signed, absolute, by_tokens
