"""Experts taken apart, against their family's own module and against loops over tokens, choices and experts."""

import copy
import io

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy, Block
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.routing import watch_routes
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.modules.experts import Expert, SeparateExperts
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import narrow_experts, replace_activation, split_experts
from hf_compress.rewrite.edits import plan_from_json
from hf_compress.rewrite.edits.experts import NarrowExperts, SplitExperts
from hf_compress.rewrite.edits.packed import PackLinear
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward
from tests.helpers.models import refusing
from tests.helpers.stock import stock_outcomes
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model

TOKENS, CHOICES = 9, 2
GATED = ("mixtral", "qwen3_moe", "aria_text", "gpt_oss", "openai_privacy_filter")
# The last of these has no gate. Transposed are aria_text and those with biases, of which gpt_oss alone is interleaved.
FAMILIES = (*GATED, "nemotron_h")
TRANSPOSED = ("aria_text", "gpt_oss", "openai_privacy_filter")
BIASED = ("gpt_oss", "openai_privacy_filter")
MODELS = ("mixtral", "qwen3_moe", "aria_text", "gpt_oss", "nemotron_h")  # that write text
WAYS = ("eager", "batched_mm", "grouped_mm")  # in which Transformers computes them


def model_of(name):
    return tiny_base_model(name) if name == "openai_privacy_filter" else tiny_model(name)


def paths_of(model):
    """Where the tensors of all experts are."""
    return [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]


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


def entries(own, number):
    """The maps of one expert, entry by entry of its family's tensors: weights (outputs, inputs), and biases."""
    name = "gate_up_proj" if hasattr(own, "gate_up_proj") else "up_proj"
    tables = {"up": getattr(own, name), "down": own.down_proj}
    turned = type(own).__name__.startswith(("Aria", "GptOss", "OpenAI"))
    found = {}
    for map_, table in tables.items():
        rows, columns = reversed(table.shape[1:]) if turned else table.shape[1:]
        found[f"{map_}.weight"] = torch.stack(
            [
                torch.stack([table[number, i, o] if turned else table[number, o, i] for i in range(columns)])
                for o in range(rows)
            ]
        )
    if hasattr(own, "down_proj_bias"):
        found |= {"up.bias": own.gate_up_proj_bias[number], "down.bias": own.down_proj_bias[number]}
    return found


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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_stands_where_it_belongs(name):
    own, apart = own_and_split(name)
    for number in (0, 3):
        expected = entries(own, number)
        found = apart.get_submodule(str(number)).state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weighted_sum_of_what_the_chosen_experts_write(name, scale):
    """Large states reach the limits that some families cut gates and ups at."""
    own, apart = own_and_split(name)
    states, (index, weights) = scale * noise(TOKENS, 64), routing()
    with torch.no_grad():
        expected = by_hand(name, own, states, index, weights)
        found = apart(states, index, weights)
        if scale > 1 and name in BIASED:
            free = copy.copy(own)
            free.limit = 1e9
            assert not torch.allclose(by_hand(name, free, states, index, weights), expected)
        of_family = own(states, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    single = name == "openai_privacy_filter"  # computes in float32, whatever it is given
    torch.testing.assert_close(of_family, found, **({"rtol": 1e-4, "atol": 1e-4} if single else {}))


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
    """Of states, of the router's weights, and of every expert's maps; none comes to an expert that nobody chose."""
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64).requires_grad_(), routing(experts=3)
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


def test_gradients_are_slopes():
    """By differences, with every expert, one that is chosen twice, and one that is left out."""
    _, apart = own_and_split("mixtral")
    index = torch.tensor([[0, 1], [2, 2], [3, 4]])
    weights = noise(3, 2, seed=4).requires_grad_()
    directions, offsets = noise(5, 64, seed=6), noise(3, 64, seed=7)
    pull = noise(64, 3, seed=8)
    assert torch.autograd.gradcheck(
        lambda given, weights: apart(given @ directions + offsets, index, weights) @ pull,
        (noise(3, 5, seed=5).requires_grad_(), weights),
    )


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_behind_the_last_expert_are_left_out(name):
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64), routing()
    index[1, 0] = index[4, 1] = index[6, 0] = index[6, 1] = 4
    with torch.no_grad():
        found = apart(states, index, weights)
        torch.testing.assert_close(found, by_hand(name, own, states, index, weights), rtol=1e-10, atol=1e-10)
        if name not in (*BIASED, "nemotron_h"):  # which know no such mark when they run one by one
            torch.testing.assert_close(found, own(states, index, weights))
        assert not found[6].any()
        assert bool(found[1].any())
        assert not apart(states, torch.full_like(index, 4), weights).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_all_experts_are_picked_by_the_choices(name):
    own, apart = own_and_split(name)
    states, (index, _) = noise(TOKENS, 64), routing()
    table = noise(TOKENS, 4, seed=5)
    chosen = torch.stack([torch.stack([table[t, int(e)] for e in index[t]]) for t in range(TOKENS)])
    with torch.no_grad():
        found = apart(states, index, table)
        torch.testing.assert_close(found, by_hand(name, own, states, index, chosen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_where_all_experts_are_chosen_weights_go_with_the_choices(name):
    """Their shape would do for either; what Transformers gives are those of the choices, in their order."""
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64), routing(choices=4)
    assert not torch.equal(index, index.sort(dim=1).values)
    with torch.no_grad():
        found = apart(states, index, weights)
        torch.testing.assert_close(found, by_hand(name, own, states, index, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_chosen_twice_writes_twice(name):
    own, apart = own_and_split(name)
    states, (index, weights) = noise(TOKENS, 64), routing()
    index[3] = 2
    with torch.no_grad():
        found = apart(states, index, weights)
        torch.testing.assert_close(found, by_hand(name, own, states, index, weights), rtol=1e-10, atol=1e-10)


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
    states, (index, weights) = noise(TOKENS, 64), routing()
    with torch.no_grad():
        found = apart.double()(states, index, weights)
        torch.testing.assert_close(found, by_hand(name, own.double(), states, index, weights), rtol=1e-10, atol=1e-10)
    assert {p.dtype for p in apart.parameters()} == {torch.float64}


# --- the draft and the edit -------------------------------------------------------------------------------------------


def draft_of_all(model):
    return sum((split_experts(model, path) for path in paths_of(model)), start=Plan())


@pytest.mark.parametrize("name", [*MODELS, "olmoe", "deepseek_v3", "openai_privacy_filter"])
def test_a_model_gives_what_it_gave(name):
    model = model_of(name)
    inputs, paths = tiny_inputs(model), paths_of(model)
    before, count = forward(model, inputs), model.num_parameters()
    carry_out(draft_of_all(model), model, Undo())
    assert all(isinstance(model.get_submodule(path), SeparateExperts) for path in paths)
    assert paths
    torch.testing.assert_close(forward(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert model.num_parameters() == count
    stack = Anatomy(model).stack()
    for index in range(len(stack)):
        ffn = Anatomy(model).parts(stack, index).ffn
        path = f"{stack.path}.{index}.{ffn.experts}" if ffn else None
        if path in paths:
            assert (ffn.kind, ffn.width) == ("experts", model.get_submodule(path).get_submodule("0").down.in_features)
            paths.remove(path)
    assert not paths, "the anatomy knows them all"


@pytest.mark.parametrize("name", MODELS)
def test_it_can_be_undone_bit_for_bit(name):
    model = model_of(name)
    inputs, paths = tiny_inputs(model), paths_of(model)
    before, trace = forward(model, inputs), Trace.of(model)
    modules = [model.get_submodule(path) for path in paths]
    tensors = [id(parameter) for parameter in model.parameters()]
    with Undo() as undo:
        carry_out(draft_of_all(model), model, undo)
        assert trace.difference(model) is not None
        for parameter in model.parameters():
            if parameter.ndim == 2 and id(parameter) not in tensors:
                parameter.data.zero_()  # no memory is shared
    assert trace.difference(model) is None
    assert [model.get_submodule(path) for path in paths] == modules
    assert [id(parameter) for parameter in model.parameters()] == tensors
    assert torch.equal(forward(model, inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_to_the_same(name, tmp_path):
    model = model_of(name)
    inputs = tiny_inputs(model)
    apply(draft_of_all(model), model)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(forward(again, inputs), forward(model, inputs))
    assert Trace.of(again).tensors.keys() == Trace.of(model).tensors.keys()


def test_without_the_plugin_loading_stops(tmp_path):
    """No shape is another: stock Transformers would go on with experts made up at random, were it not for a seal."""
    folders = []
    for name in ("mixtral", "gpt_oss", "qwen3_moe"):
        model = model_of(name)
        apply(split_experts(model, paths_of(model)[-1]), model)
        folders.append(str(save(model, tmp_path / name)))
    found = stock_outcomes(folders, tmp_path)
    assert found == dict.fromkeys(folders, 2 * ["size mismatch"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_stay(dtype):
    model = model_of("gpt_oss").to(dtype).train()
    carry_out(draft_of_all(model), model, Undo())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(module.training for module in model.modules())


def test_what_was_frozen_stays_frozen():
    model = model_of("gpt_oss")
    paths = paths_of(model)
    model.get_submodule(paths[0]).requires_grad_(False)
    carry_out(draft_of_all(model), model, Undo())
    assert not any(p.requires_grad for p in model.get_submodule(paths[0]).parameters())
    assert all(p.requires_grad for p in model.get_submodule(paths[1]).parameters())


def test_an_activation_that_is_replaced_later_is_the_one_that_runs():
    """The anatomy finds it in the mixture, before and after."""
    results = []
    for apart in (False, True):
        model = model_of("mixtral")
        if apart:
            apply(draft_of_all(model), model)
        before = forward(model, tiny_inputs(model))
        apply(replace_activation(Anatomy(model).block(0), "identity", 0.5), model)
        results.append(forward(model, tiny_inputs(model)))
        assert not torch.allclose(results[-1], before)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_an_activation_that_was_replaced_before_goes_with_it(tmp_path):
    model = model_of("mixtral")
    apply(replace_activation(Anatomy(model).block(1), "identity", 0.5), model)
    inputs = tiny_inputs(model)
    before = forward(model, inputs)
    apply(split_experts(model, "model.layers.1.mlp.experts"), model)
    torch.testing.assert_close(forward(model, inputs), before, rtol=1e-4, atol=1e-5)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(forward(again, inputs), forward(model, inputs))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_narrowed_before(name, tmp_path):
    model = model_of(name)
    inputs = tiny_inputs(model)
    units = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i))[:32] for i in range(4)])
    apply(narrow_experts(Anatomy(model).block(1), units), model)
    before = forward(model, inputs)
    apply(draft_of_all(model), model)
    assert [model.model.layers[i].mlp.experts.width for i in range(4)] == [96, 32, 96, 96]
    torch.testing.assert_close(forward(model, inputs), before, rtol=1e-4, atol=1e-5)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(forward(again, inputs), forward(model, inputs))


def test_blocks_that_go_afterwards(tmp_path):
    model, other = model_of("mixtral"), model_of("mixtral")
    inputs = tiny_inputs(model)
    apply(split_experts(model, "model.layers.1.mlp.experts"), model)
    apply(split_experts(model, "model.layers.3.mlp.experts"), model)
    for one in (model, other):
        apply(Plan((RemoveBlocks("model.layers", (0, 3)),)), one)
    torch.testing.assert_close(forward(model, inputs), forward(other, inputs), rtol=1e-4, atol=1e-5)
    again = type(model).from_pretrained(save(model, tmp_path / "out"))
    assert torch.equal(forward(again, inputs), forward(model, inputs))
    assert isinstance(again.model.layers[0].mlp.experts, SeparateExperts)


def test_the_edit_is_plain_data():
    plan = Plan((SplitExperts("model.layers.0.mlp.experts"),))
    assert plan_from_json(plan.to_json()).edits == plan.edits
    assert plan.edits[0].paths == ("model.layers.0.mlp.experts",)
    for bad in ("", "a..b", 3, None, "a b"):
        with pytest.raises(PlanError, match="experts must be the path of a module"):
            SplitExperts(bad)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model, error, message, act):
    with refusing(model, error, message):
        act(model)


def test_what_is_apart_is_not_taken_apart_again():
    model = model_of("mixtral")
    path = paths_of(model)[0]
    apply(split_experts(model, path), model)
    refused(model, UnsupportedModelError, path, lambda model: split_experts(model, path))
    refused(model, PlanError, path, lambda model: apply(Plan((SplitExperts(path),)), model))


def test_nor_twice_in_one_plan():
    model = model_of("mixtral")
    path = paths_of(model)[0]
    plan = split_experts(model, path)
    refused(model, PlanError, path, lambda model: apply(Plan(plan.edits * 2, plan.tensors), model))


@pytest.mark.parametrize("path", ["model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "model.layers", "lm_head"])
def test_a_module_that_is_no_experts(path):
    model = model_of("mixtral")
    refused(model, UnsupportedModelError, path, lambda model: split_experts(model, path))
    refused(model, PlanError, path, lambda model: apply(Plan((SplitExperts(path),)), model))


def test_a_module_that_there_is_not():
    model = model_of("mixtral")
    path = "model.layers.9.mlp.experts"
    refused(model, PlanError, path, lambda model: apply(Plan((SplitExperts(path),)), model))


def test_experts_that_do_not_say_how_they_compute():
    model = model_of("llama4_text")
    path = paths_of(model)[0]
    refused(model, UnsupportedModelError, "does not tell has_gate", lambda model: split_experts(model, path))
    refused(model, PlanError, "does not tell has_gate", lambda model: apply(Plan((SplitExperts(path),)), model))


@pytest.mark.parametrize("what", ["parameter", "buffer", "missing", "norm"])
def test_experts_that_hold_something_else(what):
    model, path = model_of("mixtral"), "model.layers.1.mlp.experts"
    experts = model.get_submodule(path)
    if what == "parameter":
        experts.scale = torch.nn.Parameter(torch.ones(4))
    elif what == "buffer":
        experts.register_buffer("scale", torch.ones(4))
    elif what == "missing":
        experts.has_bias = True
    else:
        experts.has_post_expert_norm = True
    refused(model, UnsupportedModelError, "Experts", lambda model: split_experts(model, path))
    refused(model, PlanError, "Experts", lambda model: carry_out(Plan((SplitExperts(path),)), model, Undo()))


def test_without_values_nothing_is_changed():
    model = model_of("mixtral")
    path = paths_of(model)[2]
    plan = split_experts(model, path)
    few = {name: value for name, value in plan.tensors.items() if not name.endswith("3.down.weight")}
    refused(model, PlanError, "gives no values", lambda model: apply(Plan(plan.edits, few), model))
    wrong = plan.tensors | {f"{path}.0.up.weight": torch.zeros(64, 192)}
    refused(model, PlanError, "0.up.weight is", lambda model: apply(Plan(plan.edits, wrong), model))


def test_units_of_experts_that_are_apart_stay():
    model = model_of("mixtral")
    stack, path = Anatomy(model).stack(), paths_of(model)[0]
    apply(split_experts(model, path), model)
    units = torch.arange(8).expand(4, -1)
    refused(model, UnsupportedModelError, "Experts", lambda model: narrow_experts(Block(model, stack, 0), units))
    refused(model, PlanError, path, lambda model: apply(Plan((NarrowExperts(path, 8),)), model))


def test_an_expert_that_there_is_not():
    model = model_of("mixtral")
    path = paths_of(model)[0]
    apply(split_experts(model, path), model)
    edit = PackLinear(f"{path}.4.up", 16, (768,) * 4)
    refused(model, PlanError, r"experts\.4\.up", lambda model: apply(Plan((edit,)), model))
