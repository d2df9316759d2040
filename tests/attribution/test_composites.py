"""Rules and composites of one's own: asked for by name, held against oracles, refused where they make no sense."""

import pytest
import torch

import hf_compress as hfc
from hf_compress.attribution.composites import COMPOSITES, Composite, register_composite
from hf_compress.attribution.gradients import as_if
from hf_compress.attribution.rules import Held, Rule, ThroughOrigin
from hf_compress.errors import UnsupportedModelError
from tests.helpers.models import watching
from tests.helpers.relevance import FLOATS, OddNorm, dense, make, refused

IDS = torch.randint(4, 90, (1, 5), generator=torch.Generator().manual_seed(3))
GRADIENT = Composite(conserves=False)


class Gamma(Rule):
    """Weights above 0 count for more."""

    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, module, given, gave):
        favoured = given @ (module.weight + self.gamma * module.weight.clamp(min=0)).T
        return as_if(gave, favoured * (gave / favoured).detach())


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(COMPOSITES, "_entries", dict(COMPOSITES))


def slopes(f, x, step=3e-3):
    """∂f/∂x by central differences, one number after another; norms compute in float32, so the step is long."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        moved = [x.clone(), x.clone()]
        for sign, y in zip((1, -1), moved, strict=True):
            y.view(-1)[i] += sign * step
        found.view(-1)[i] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return found


def near(found, expected):
    torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=3e-4)


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPT-2"])
def test_gradient_times_input(family):
    """No rule at all: what attention and routers do has its gradient too."""
    model = make(family).double()
    model.config._experts_implementation = "eager"  # the others know no double
    register_composite("gradient", GRADIENT)
    result = hfc.relevance(model, IDS, weights=True, composite="gradient")
    with torch.no_grad():
        read = model.get_input_embeddings()(IDS)
        word = int(model(IDS).logits[0, -1].argmax())

        def explained(embedded):
            return model(inputs_embeds=embedded).logits[0, -1, word]

        torch.testing.assert_close(result.explained[0], explained(read))
        near(result.tokens[0], (read * slopes(explained, read))[0].sum(dim=-1))
        name = next(path for path in result.weights if path.endswith(("o_proj", "attn.c_proj")))
        weight, kept = model.get_submodule(name).weight, model.get_submodule(name).weight.clone()

        def with_row(row):
            weight[0] = row
            value = explained(read)
            weight.copy_(kept)
            return value

        row = kept[0] * slopes(with_row, kept[0].clone())
        found = result.weights[name][:, 0] if family == "GPT-2" else result.weights[name][0]
        near(found, row)


def test_a_rule_for_linear_maps():
    """The γ-rule as it is written down: R_i = Σ_j x_i (w_ij + γ w⁺_ij) / Σ_i' x_i' (w_i'j + γ w⁺_i'j) · R_j."""
    model = dense().double()
    register_composite("gamma", Composite(activation=ThroughOrigin(), linear=Gamma(0.25)))
    result = hfc.relevance(model, FLOATS.double(), target=1, composite="gamma")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad(), watching(linears) as seen:
        logits = model(FLOATS.double()).logits
    assert len(seen) == 8
    for sample in range(len(FLOATS)):
        relevance = torch.zeros(4).double()
        relevance[1] = logits[sample, 1]
        for path, linear in reversed(linears.items()):  # activations hand on what they get
            x, weight = seen[path][0].reshape(len(FLOATS), -1)[sample], linear.weight.detach()
            counts = x * (weight + 0.25 * weight.clamp(min=0))
            relevance = (counts / counts.sum(dim=1, keepdim=True) * relevance[:, None]).sum(dim=0)
        torch.testing.assert_close(result.inputs["input_values"][sample], relevance)


def test_compression_by_name():
    register_composite("gradient", GRADIENT)
    kept = {}
    for name in ("gradient", "attnlrp"):
        config = hfc.CompressionConfig.from_dict({"method": "lrp", "sparsity": 0.5, "composite": name})
        small = hfc.compress(make("Llama"), config, IDS)
        assert small.compression_report.config["composite"] == name
        kept[name] = torch.cat([p.detach().flatten() for p in small.parameters()])
    assert kept["gradient"].shape == kept["attnlrp"].shape
    assert not torch.equal(kept["gradient"], kept["attnlrp"])


class Halved(Rule):
    """As ThroughOrigin, of f(x) = x / (1 + |x|)."""

    def __call__(self, module, given, gave):
        assert self.part == "model.norm (OddNorm)"
        return as_if(gave, given / (1 + given.abs()).detach())


def test_a_rule_for_modules_of_a_class():
    """What has no rule is refused by name, until it is given one; classes go before kinds."""
    model = make("Llama")
    model.model.norm = OddNorm()
    refused(model, IDS, UnsupportedModelError, r"model\.norm \(OddNorm\) is no normalisation")
    own = Composite(**{**vars(COMPOSITES["cp"]), "modules": {OddNorm: Halved()}})
    result = hfc.relevance(model, IDS, composite=own)
    torch.testing.assert_close(result.tokens.sum(dim=-1), result.explained, rtol=1e-3, atol=1e-3)


def test_what_does_not_conserve_has_to_say_so():
    register_composite("leaks", Composite())
    refused(make("Llama"), IDS, UnsupportedModelError, "relevance is lost or made up", composite="leaks")


def test_names_that_are_taken():
    with pytest.raises(ValueError, match="composite 'attnlrp' is already registered"):
        register_composite("attnlrp", GRADIENT)
    register_composite("mine", GRADIENT)
    with pytest.raises(ValueError, match="composite 'mine' is already registered"):
        register_composite("mine", GRADIENT)
    with pytest.raises(ValueError, match="unknown composite 'yours'; expected one of 'attnlrp', 'cp', 'mine'"):
        hfc.LRPConfig(sparsity=0.5, composite="yours")


@pytest.mark.parametrize(
    "arguments", [("mine", Held()), (3, GRADIENT), ("mine", Composite)], ids=["a rule", "no name", "a class"]
)
def test_what_is_no_composite(arguments):
    with pytest.raises(TypeError, match="takes a name and a Composite"):
        register_composite(*arguments)


@pytest.mark.parametrize("fields", [{"value": Held}, {"norm": 0.5}, {"modules": {OddNorm: "held"}}], ids=str)
def test_what_is_no_rule(fields):
    with pytest.raises(TypeError, match=r"must be a Rule, such as Share\(0\.5\), or None; got"):
        Composite(**fields)


def test_epsilon_and_a_rule_for_linear_maps():
    own = Composite(linear=Gamma(0.25))
    refused(make("Dense"), FLOATS, ValueError, "have the rule Gamma already: leave out", composite=own, epsilon=0.1)
