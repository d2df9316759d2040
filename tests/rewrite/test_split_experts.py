"""Taking the experts of a model apart: it gives what it gave, in memory and from files, or is left as it was."""

import pytest
import torch

from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.errors import PlanError, UnsupportedModelError
from hf_compress.modules.experts import SeparateExperts
from hf_compress.plan.edits import RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import narrow_experts, replace_activation, split_experts
from hf_compress.rewrite.edits.experts import NarrowExperts, SplitExperts
from hf_compress.rewrite.edits.packed import PackLinear
from hf_compress.storage.save import save
from tests.helpers.changes import Trace, forward
from tests.helpers.experts import model_of, paths_of
from tests.helpers.models import refusing, saved_and_loaded
from tests.helpers.stock import stock_outcomes
from tests.helpers.tiny import tiny_inputs

MODELS = ("mixtral", "qwen3_moe", "aria_text", "gpt_oss", "nemotron_h")  # that write text


@pytest.fixture
def mixtral():
    return model_of("mixtral")


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
    apply(draft_of_all(model), model)
    again = saved_and_loaded(model, tmp_path / "out", tiny_inputs(model))
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
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


def test_an_activation_that_was_replaced_before_goes_with_it(tmp_path, mixtral):
    model = mixtral
    apply(replace_activation(Anatomy(model).block(1), "identity", 0.5), model)
    inputs = tiny_inputs(model)
    before = forward(model, inputs)
    apply(split_experts(model, "model.layers.1.mlp.experts"), model)
    torch.testing.assert_close(forward(model, inputs), before, rtol=1e-4, atol=1e-5)
    saved_and_loaded(model, tmp_path / "out", inputs)


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
    saved_and_loaded(model, tmp_path / "out", inputs)


def test_blocks_that_go_afterwards(tmp_path):
    model, other = model_of("mixtral"), model_of("mixtral")
    inputs = tiny_inputs(model)
    apply(split_experts(model, "model.layers.1.mlp.experts"), model)
    apply(split_experts(model, "model.layers.3.mlp.experts"), model)
    for one in (model, other):
        apply(Plan((RemoveBlocks("model.layers", (0, 3)),)), one)
    torch.testing.assert_close(forward(model, inputs), forward(other, inputs), rtol=1e-4, atol=1e-5)
    again = saved_and_loaded(model, tmp_path / "out", inputs)
    assert isinstance(again.model.layers[0].mlp.experts, SeparateExperts)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model, path, message):
    """Neither the draft nor the edit can take the module at this path apart."""
    with refusing(model, UnsupportedModelError, message):
        split_experts(model, path)
    with refusing(model, PlanError, message):
        apply(Plan((SplitExperts(path),)), model)


def test_what_is_apart_is_not_taken_apart_again(mixtral):
    path = paths_of(mixtral)[0]
    plan = split_experts(mixtral, path)
    with refusing(mixtral, PlanError, path):
        apply(Plan(plan.edits * 2, plan.tensors), mixtral)
    apply(plan, mixtral)
    refused(mixtral, path, path)


@pytest.mark.parametrize("path", ["model.layers.0.mlp", "model.layers.0.self_attn.q_proj", "model.layers", "lm_head"])
def test_a_module_that_is_no_experts(mixtral, path):
    refused(mixtral, path, path)


def test_a_module_that_there_is_not(mixtral):
    path = "model.layers.9.mlp.experts"
    with refusing(mixtral, PlanError, path):
        apply(Plan((SplitExperts(path),)), mixtral)


def test_experts_that_do_not_say_how_they_compute():
    model = model_of("llama4_text")
    refused(model, paths_of(model)[0], "does not tell has_gate")


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: experts.register_parameter("scale", torch.nn.Parameter(torch.ones(4))),
        lambda experts: experts.register_buffer("scale", torch.ones(4)),
        lambda experts: setattr(experts, "has_bias", True),
        lambda experts: setattr(experts, "has_post_expert_norm", True),
    ],
    ids=["parameter", "buffer", "missing", "norm"],
)
def test_experts_that_hold_something_else(mixtral, change):
    path = "model.layers.1.mlp.experts"
    change(mixtral.get_submodule(path))
    with refusing(mixtral, UnsupportedModelError, "Experts"):
        split_experts(mixtral, path)
    with refusing(mixtral, PlanError, "Experts"):  # some of these run no more
        carry_out(Plan((SplitExperts(path),)), mixtral, Undo())


def test_without_values_nothing_is_changed(mixtral):
    path = paths_of(mixtral)[2]
    plan = split_experts(mixtral, path)
    few = {name: value for name, value in plan.tensors.items() if not name.endswith("3.down.weight")}
    wrong = plan.tensors | {f"{path}.0.up.weight": torch.zeros(64, 192)}
    for tensors, message in ((few, "gives no values"), (wrong, "0.up.weight is")):
        with refusing(mixtral, PlanError, message):
            apply(Plan(plan.edits, tensors), mixtral)


def test_experts_that_are_apart_are_neither_narrowed_nor_more(mixtral):
    path = paths_of(mixtral)[0]
    block = Anatomy(mixtral).block(0)
    apply(split_experts(mixtral, path), mixtral)
    with refusing(mixtral, UnsupportedModelError, "Experts"):
        narrow_experts(block, torch.arange(8).expand(4, -1))
    fifth = PackLinear(f"{path}.4.up", 16, (768,) * 4)
    for edit, message in ((NarrowExperts(path, 8), path), (fifth, r"experts\.4\.up")):
        with refusing(mixtral, PlanError, message):
            apply(Plan((edit,)), mixtral)
