"""Experts taken apart, against their family's own module and against loops over tokens, choices and experts."""

import copy
import io

import pytest
import torch

from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.routing import watch_routes
from hf_compress.modules.experts import Expert, SeparateExperts
from hf_compress.rewrite.apply import carry_out
from hf_compress.rewrite.builders import split_experts
from tests.helpers.experts import model_of, paths_of

TOKENS, CHOICES = 9, 2
GATED = ("mixtral", "qwen3_moe", "aria_text", "gpt_oss", "openai_privacy_filter")
# The last of these has no gate. Transposed are aria_text and those with biases, of which gpt_oss alone is interleaved.
FAMILIES = (*GATED, "nemotron_h")
TRANSPOSED = ("aria_text", "gpt_oss", "openai_privacy_filter")
BIASED = ("gpt_oss", "openai_privacy_filter")
WAYS = ("eager", "batched_mm", "grouped_mm")  # in which Transformers computes them


def own_and_split(name, dtype=torch.float64):
    """The first mixture of a tiny model as its family has it, and taken apart."""
    model, changed = model_of(name).to(dtype), model_of(name).to(dtype)
    path = paths_of(model)[0]
    carry_out(split_experts(changed, path), changed, Undo())
    own, apart = model.get_submodule(path), changed.get_submodule(path)
    assert isinstance(apart, SeparateExperts)
    own.config._experts_implementation = "eager"
    return own, apart


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routing(tokens=TOKENS, choices=CHOICES, experts=4, seed=1):
    """Different experts for each token, and their weights, which are no probabilities."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    return index, noise(tokens, choices, seed=seed + 1).abs() + 0.1


def hidden_by_hand(name, read, limit, alpha):
    """The activations of hidden units, of what the first map gives for one token."""
    half = len(read) // 2
    if name == "nemotron_h":
        return torch.stack([z * z if float(z.detach()) > 0 else 0 * z for z in read])
    gates, ups = (read[0::2], read[1::2]) if name == "gpt_oss" else (read[:half], read[half:])
    if name in BIASED:
        gates, ups = gates.clamp(max=limit), ups.clamp(-limit, limit)
        return gates / (1 + (-alpha * gates).exp()) * (ups + 1)
    return gates / (1 + (-gates).exp()) * ups


def by_hand(name, own, states, index, weights):
    """Token by token and choice by choice, from the family's tensors; what names no expert is left out."""
    limit, alpha = getattr(own, "limit", 0.0), getattr(own, "alpha", 0.0)
    up, down = (own.gate_up_proj if name in GATED else own.up_proj), own.down_proj
    written = []
    for t in range(len(states)):
        total = torch.zeros_like(states[t])
        for c in range(index.shape[1]):
            e = int(index[t, c])
            if e == len(down):
                continue
            read = states[t] @ up[e] if name in TRANSPOSED else up[e] @ states[t]
            read = read + own.gate_up_proj_bias[e] if name in BIASED else read
            hidden = hidden_by_hand(name, read, limit, alpha)
            out = hidden @ down[e] if name in TRANSPOSED else down[e] @ hidden
            out = out + own.down_proj_bias[e] if name in BIASED else out
            total = total + weights[t, c] * out
        written.append(total)
    return torch.stack(written) if written else torch.zeros_like(states)


# --- what is computed -------------------------------------------------------------------------------------------------


def check_sum(name, own, apart, states, index, weights, chosen=None):
    """Taken apart, the experts write what the loop gives, where `weights` mean those `chosen`."""
    with torch.no_grad():
        found = apart(states, index, weights)
        expected = by_hand(name, own, states, index, weights if chosen is None else chosen)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return found


def twice(index, weights):
    """One token chooses one expert twice."""
    index[3] = 2
    return index, weights


# Where all are chosen, weights could also be those of all experts; Transformers gives those of the choices, in order.
CHOSEN = {"two": routing, "all, in no order": lambda: routing(choices=4), "one twice": lambda: twice(*routing())}


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weighted_sum_of_what_the_chosen_experts_write(name, chosen):
    index, weights = CHOSEN[chosen]()
    assert not torch.equal(index, index.sort(dim=1).values)
    check_sum(name, *own_and_split(name), noise(TOKENS, 64), index, weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_large_states_reach_the_limits_that_some_families_cut_gates_and_ups_at(name):
    own, apart = own_and_split(name)
    states, (index, weights) = 8 * noise(TOKENS, 64), routing()
    found = check_sum(name, own, apart, states, index, weights)
    if name in BIASED:
        own.limit = 1e9
        with torch.no_grad():
            assert not torch.allclose(by_hand(name, own, states, index, weights), found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_as_transformers_computes_it_in_each_of_its_ways(name, way):
    own, apart = own_and_split(name, torch.float32)
    states, (index, weights) = noise(TOKENS, 64, dtype=torch.float32), routing()
    own.config._experts_implementation = way
    with torch.no_grad():
        expected = own(states, index, weights.float())
        torch.testing.assert_close(apart(states, index, weights.float()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_loop(name):
    """Of states, of the router's weights and of every expert's maps, which are none where nobody chose the expert."""
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64).requires_grad_(), twice(*routing(experts=3))
    index[5, 0] = 4  # left out
    weights.requires_grad_()
    pull = noise(TOKENS, 64, seed=9)
    tables = dict(own.named_parameters())
    (by_hand(name, own, states, index, weights) * pull).sum().backward()
    of_states, of_weights = states.grad, weights.grad
    states.grad = weights.grad = None
    (apart(states, index, weights) * pull).sum().backward()
    torch.testing.assert_close(states.grad, of_states, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weights.grad, of_weights, rtol=1e-9, atol=1e-10)
    first = "gate_up_proj" if name in GATED else "up_proj"
    for number in range(4):
        expert = apart.get_submodule(str(number))
        for key, parameter in expert.named_parameters():
            table = tables[(first if key.startswith("up") else "down_proj") + ("_bias" if key.endswith("bias") else "")]
            expected = table.grad[number]
            expected = expected.T if name in TRANSPOSED and key.endswith("weight") else expected
            if number == 3:
                assert parameter.grad is None
                assert not expected.any()
            else:
                assert parameter.grad.any()
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10)


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_behind_the_last_expert_are_left_out(name):
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64), routing()
    index[1, 0] = index[4, 1] = index[6, 0] = index[6, 1] = 4
    found = check_sum(name, own, apart, states, index, weights)
    with torch.no_grad():
        if name not in (*BIASED, "nemotron_h"):  # which know no such mark when they run one by one
            torch.testing.assert_close(found, own(states, index, weights))
        assert not found[6].any()
        assert bool(found[1].any())
        assert not apart(states, torch.full_like(index, 4), weights).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_all_experts_are_picked_by_the_choices(name):
    (index, _), table = routing(), noise(TOKENS, 4, seed=5)
    chosen = torch.stack([torch.stack([table[t, int(e)] for e in index[t]]) for t in range(TOKENS)])
    check_sum(name, *own_and_split(name), noise(TOKENS, 64), index, table, chosen)


def test_experts_without_tokens_do_not_run():
    _, apart = own_and_split("mixtral")
    ran = []
    for number in range(4):
        apart.get_submodule(str(number)).register_forward_hook(lambda *_, number=number: ran.append(number))
    states, (index, weights) = noise(TOKENS, 64), routing(choices=1)
    index[:], index[5:] = 3, 1
    with torch.no_grad():
        assert apart(states, index, weights).shape == (TOKENS, 64)
    assert sorted(ran) == [1, 3]


def test_no_tokens_at_all():
    _, apart = own_and_split("gpt_oss")
    nothing = torch.zeros(0, 64, dtype=torch.float64)
    index = torch.zeros(0, 2, dtype=torch.long)
    assert apart(nothing, index, torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 64)


def test_routes_tell_which_tokens_an_expert_read():
    _, apart = own_and_split("mixtral")
    states, (index, weights) = noise(TOKENS, 64), routing(experts=3)
    read = {}
    for number in range(4):
        expert = apart.get_submodule(str(number))
        expert.up.register_forward_pre_hook(lambda module, args: read.__setitem__(module, args[0]))
    with watch_routes([apart]) as routes, torch.no_grad():
        apart(states, index, weights)
    for number in range(4):
        expert = apart.get_submodule(str(number))
        expected = [t for t in range(TOKENS) if number in index[t].tolist()]
        assert (expert.up in routes) == (expert.down in routes) == bool(expected)
        if expected:
            assert routes[expert.up].tokens.tolist() == routes[expert.down].tokens.tolist() == expected
            assert routes[expert.up].everywhere == TOKENS
            assert routes[expert.up].samples(3).tolist() == [t // 3 for t in expected]
            assert torch.equal(read[expert.up], states[expected])
    assert not any(m._forward_pre_hooks for m in apart.modules() if isinstance(m, Expert))


# --- a module like any other ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_names_in_the_state(name):
    """Those of linear maps, by the experts' numbers; nothing of what the family held."""
    own, apart = own_and_split(name)
    kinds = ("weight", "bias") if name in BIASED else ("weight",)
    names = [f"{number}.{map_}.{kind}" for number in range(4) for map_ in ("up", "down") for kind in kinds]
    assert list(apart.state_dict()) == names
    assert [n for n, _ in apart.named_parameters()] == names
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in own.parameters())
    assert apart.gated == (name in GATED)
    width = own.down_proj.shape[1 if name in TRANSPOSED else 2]
    assert (apart.count, apart.width) == (4, width)
    assert apart.get_submodule("3").down.weight.shape == (64, width)


def _pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_stands_on_its_own(name, duplicate):
    _, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64), routing()
    with torch.no_grad():
        before = apart(states, index, weights)
        other = duplicate(apart)
        assert torch.equal(other(states, index, weights), before)
        for parameter in other.parameters():
            parameter.mul_(2)
        assert torch.equal(apart(states, index, weights), before)
        assert not torch.allclose(other(states, index, weights), before)
    assert not {*map(id, apart.modules())} & {*map(id, other.modules())}
    if hasattr(apart, "act_fn"):
        handle = other.act_fn.register_forward_hook(lambda module, args, output: 0 * output)
        assert not other(states, index, weights).any(), "a copy computes with its own activation"
        assert bool(apart(states, index, weights).any())
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name, dtype):
    """As near to what double precision gives as the family's own; with weights in single, as routers give them."""
    own, apart = own_and_split(name, dtype)
    exact, _ = own_and_split(name)
    exact.load_state_dict(own.state_dict())
    states, (index, weights) = noise(64, 64, dtype=dtype), routing(tokens=64)
    with torch.no_grad():
        expected = by_hand(name, exact, states.double(), index, weights.to(dtype).double())
        of_family = own(states, index, weights.to(dtype))
        for given in (weights.to(dtype), weights.to(dtype).float()):
            found = apart(states, index, given)
            assert found.dtype == dtype
            gaps = [(value.double() - expected).norm() / expected.norm() for value in (found, of_family)]
            assert float(gaps[0]) < 0.02
            if name != "openai_privacy_filter":  # which computes in float32
                assert float(gaps[0]) < 1.5 * float(gaps[1]) + 1e-4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_cast_reaches_all_of_it(name):
    own, apart = own_and_split(name, torch.float32)
    check_sum(name, own.double(), apart.double(), noise(TOKENS, 64), *routing())
    assert {p.dtype for p in apart.parameters()} == {torch.float64}
