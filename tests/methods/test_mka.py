"""MKA's default: one block solved to do the work of two, against least squares by numpy."""

import copy

import numpy as np
import pytest
import torch

import hf_compress.methods.mka.refit as refit_module
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.api.compress import compress
from hf_compress.calibration.capture import hooked
from hf_compress.calibration.data import Batch, DataOptions, prepare
from hf_compress.calibration.runner import BlockRunner
from hf_compress.calibration.sweep import Streams
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for
from hf_compress.methods.mka import MKAConfig
from hf_compress.methods.mka.choice import Chooser
from hf_compress.methods.mka.writers import Writers
from hf_compress.plan.edits import MergeBlocks, RemoveBlocks
from hf_compress.plan.plan import Plan
from hf_compress.rewrite.apply import apply
from tests.helpers.changes import Trace
from tests.helpers.models import leftovers, watching
from tests.helpers.streams import recorded
from tests.helpers.tiny import tiny_base_model, tiny_inputs, tiny_model

LAYERS = "model.layers"


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def runners_of(model, samples=24, length=8, masked=True, batch_size=6):
    """Runners of several batches, with some masked positions, that have seen every block."""
    stack = Anatomy(model).stack()
    generator = torch.Generator().manual_seed(3)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(4, size - 1, (samples, length), generator=generator)
    runners = []
    for part in ids.split(batch_size):
        real = torch.rand(part.shape, generator=generator) < 0.8 if masked else torch.ones_like(part, dtype=torch.bool)
        runners.append(BlockRunner(model, stack, Batch({"input_ids": part}, real)))
    streams = [recorded(runner)[1] for runner in runners]
    return stack, runners, streams


def inputs_of(stack, index, names, runner, stream):
    """What the projections of a block are given, flat over the real tokens, and what the block makes of `stream`."""
    with watching({name: stack.blocks[index].get_submodule(name) for name in names}) as seen:
        output = runner.run(index, stream)
    real = runner.batch.real
    rows = torch.cat([seen[name][0].reshape(*stream.shape[:2], -1)[real] for name in names], dim=-1)
    return rows.double().numpy(), output[real].double().numpy()


def fitting_of(model, **data):
    """Runners that have seen every block, what goes into block 1, and what it and the next make of that."""
    stack, runners, streams = runners_of(model, **data)
    starts = [stream[1] for stream in streams]
    return stack, runners, starts, [runner.run(2, runner.run(1, x)) for runner, x in zip(runners, starts, strict=True)]


WRITERS = {  # (projections, whether they have biases)
    "llama": (("self_attn.o_proj", "mlp.down_proj"), False),
    "gpt2": (("attn.c_proj", "mlp.c_proj"), True),
    "phi": (("self_attn.dense", "mlp.fc2"), True),
    "granite": (("self_attn.o_proj", "mlp.down_proj"), False),
    "gptj": (("attn.out_proj", "mlp.fc_out"), True),
}


def solved_by_numpy(x, y, widths, penalty):
    """Ridge with every projection's inputs divided by their root mean square, as a stacked least-squares problem."""
    parts = np.split(x, np.cumsum(widths)[:-1], axis=1)
    scales = np.concatenate([np.full(part.shape[1], np.sqrt((part**2).mean())) for part in parts])
    scaled = x / scales
    weight = np.sqrt(penalty * (scaled**2).sum(axis=0).mean())
    rows = np.vstack([scaled, weight * np.eye(x.shape[1])])
    solution, *_ = np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    return solution / scales[:, None]


@pytest.mark.parametrize("model_type", WRITERS)
@pytest.mark.parametrize("penalty", [0.03, 1.0])
def test_the_change_is_the_ridge_solution(model_type, penalty):
    """Of (the two blocks' output - the first block's) / multiplier on [attention, FFN, 1], over real tokens alone."""
    names, biased = WRITERS[model_type]
    model = tiny_model(model_type)
    if model_type == "granite":
        assert model.config.residual_multiplier == 1.0
        model = with_multiplier(model, 0.4)
    stack, runners, starts, targets = fitting_of(model, samples=160, batch_size=40)
    fit = Writers(model, stack, 1).fit(runners, starts, targets, [penalty])
    assert fit is not None
    assert fit.penalty == penalty
    xs, ys = [], []
    for runner, start, target in zip(runners, starts, targets, strict=True):
        x, output = inputs_of(stack, 1, names, runner, start)
        xs.append(np.hstack([x, np.ones((len(x), 1))]) if biased else x)
        ys.append((target[runner.batch.real].double().numpy() - output) / (0.4 if model_type == "granite" else 1.0))
    modules = [stack.blocks[1].get_submodule(name) for name in names]
    widths = [x.weight.shape[0] if type(x).__name__ == "Conv1D" else x.weight.shape[1] for x in modules] + [1] * biased
    expected = solved_by_numpy(np.vstack(xs), np.vstack(ys), widths, penalty)
    # Sums are of float32: their rounding over the penalty is what weights can be off by.
    np.testing.assert_allclose(fit.weight.numpy(), expected, rtol=0, atol=5e-4 * np.abs(expected).max())
    # Held out is the fourth batch, and the error is what is left of the distance there.
    part = solved_by_numpy(np.vstack(xs[:3]), np.vstack(ys[:3]), widths, penalty)
    left = ((ys[3] - xs[3] @ part) ** 2).sum() / (ys[3] ** 2).sum()
    assert fit.error == pytest.approx(left, rel=1e-3)
    assert fit.error < 1
    assert leftovers(model) == []


def with_multiplier(model, value):
    model.config.residual_multiplier = value
    for layer in model.model.layers:
        layer.residual_multiplier = value
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "granite"])
def test_a_reachable_target_is_reached(model_type):
    """What another set of output projections would give is given, once they are solved for."""
    names, _ = WRITERS[model_type]
    model = tiny_model(model_type)
    model = with_multiplier(model, 0.3) if model_type == "granite" else model
    wanted = copy.deepcopy(model)
    name = names[-1]  # the FFN's: attention's would change what the FFN is given
    module = Anatomy(wanted).stack().blocks[1].get_submodule(name)
    module.weight += 0.3 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1))
    if module.bias is not None:
        module.bias += 0.5
    stack, runners, starts, _ = fitting_of(model, samples=120)
    other, others, _ = runners_of(wanted, samples=120)
    targets = [runner.run(1, start) for runner, start in zip(others, starts, strict=True)]
    writers = Writers(model, stack, 1)
    fit = writers.fit(runners, starts, targets, [1e-5])
    assert fit.error < 1e-4
    before = Trace.of(model)
    with Undo() as undo:
        writers.apply(fit.weight, undo)
        for runner, start, target in zip(runners, starts, targets, strict=True):
            torch.testing.assert_close(runner.run(1, start), target, atol=1e-2, rtol=1e-2)
        new = stack.blocks[1].get_submodule(name).weight
        torch.testing.assert_close(new, other.blocks[1].get_submodule(name).weight, atol=2e-2, rtol=2e-2)
    assert before.difference(model) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_fewer_tokens_than_inputs_give_the_same_by_rows_as_by_sums(model_type, monkeypatch):
    model = tiny_model(model_type)
    stack, runners, starts, targets = fitting_of(model, samples=12, length=5, batch_size=2)
    writers = Writers(model, stack, 1)
    by_rows = writers.fit(runners, starts, targets)
    assert writers._tokens(runners, starts) < writers.inputs
    monkeypatch.setattr(Writers, "_tokens", lambda *_: 10**9)
    by_sums = writers.fit(runners, starts, targets)
    assert by_rows.penalty == by_sums.penalty
    assert by_rows.error == pytest.approx(by_sums.error, rel=1e-3)
    torch.testing.assert_close(by_rows.weight, by_sums.weight, rtol=1e-2, atol=1e-4)


def test_masked_tokens_have_no_say():
    model = tiny_model("llama")
    stack, runners, starts, targets = fitting_of(model)
    first = Writers(model, stack, 1).fit(runners, starts, targets)
    for runner, target in zip(runners, targets, strict=True):
        target[~runner.batch.real] = 1e4
    second = Writers(model, stack, 1).fit(runners, starts, targets)
    assert torch.equal(first.weight, second.weight)


def everywhere(stream):
    return torch.ones(stream.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(
    ("build", "model_type"),
    [(tiny_base_model, "bert"), (tiny_model, "olmo2"), (tiny_model, "gemma2"), (tiny_base_model, "dinov2")],
)
def test_a_block_that_does_not_add_its_projections_is_left(build, model_type):
    """A norm or a scale comes between the projection and the stream."""
    model = build(model_type)
    stack = Anatomy(model).stack()
    inputs = tiny_inputs(model)
    runner = BlockRunner(model, stack, Batch(inputs, None))
    _, streams = recorded(runner)
    writers = Writers(model, stack, 1)
    assert writers.modules
    assert writers.multiplier(streams[1], *writers.features(runner, streams[1]), everywhere(streams[1])) is None
    assert writers.fit([runner], [streams[1]], [streams[3]], [0.1]) is None


@pytest.mark.parametrize("value", [1.0, 0.22])
def test_the_multiplier_of_granite(value):
    model = with_multiplier(tiny_model("granite"), value)
    stack, runners, streams = runners_of(model)
    writers, stream = Writers(model, stack, 2), streams[0][2]
    found = writers.multiplier(stream, *writers.features(runners[0], stream), everywhere(stream))
    assert found == pytest.approx(value, rel=1e-4)


def test_projections_that_do_not_run_are_left_alone():
    """Longformer multiplies by the weight itself in places, so that the module is never called."""
    model = tiny_model("llama")
    stack, runners, streams = runners_of(model)
    mlp = stack.blocks[1].mlp
    mlp.forward = lambda x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) @ mlp.down_proj.weight.T
    assert Writers(model, stack, 1).fit(runners[:1], [streams[0][1]], [streams[0][3]], [0.1]) is None


def test_a_change_that_would_not_help_is_none():
    model = tiny_model("llama")
    stack, runners, starts, _ = fitting_of(model)
    generator = torch.Generator().manual_seed(0)
    targets = [runner.run(1, start) for runner, start in zip(runners, starts, strict=True)]
    noise = [target + torch.randn(target.shape, generator=generator) for target in targets]
    assert Writers(model, stack, 1).fit(runners, starts, noise, [1e-6]) is None


# --- the plan ---------------------------------------------------------------------------------------------------------


def calibration_of(model, samples=24, batch_size=3):
    ids = torch.randint(4, 63, (samples, 10), generator=torch.Generator().manual_seed(8))
    return prepare(ids, model, None, DataOptions(batch_size=batch_size))


def plan_of(model, calibration, **options):
    before = Trace.of(model)
    plan = plan_for(MKAConfig(**options), CalibrationContext(model, calibration))
    assert before.difference(model) is None
    assert leftovers(model) == []
    return plan


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_plan(model, count):
    plan = plan_of(model, calibration_of(model), num_merges=count)
    gone = plan.removed(LAYERS)
    assert len(gone) == count
    assert 0 not in gone, "the first block is never absorbed"
    assert all(isinstance(edit, MergeBlocks) for edit in plan.edits)
    for edit in plan.edits:
        assert edit.absorbed == tuple(range(edit.kept + 1, edit.kept + 1 + len(edit.absorbed)))
    kept = [index for index in range(5) if index not in gone]
    assert {int(name.split(".")[2]) for name in plan.tensors} <= set(kept)
    for entry in plan.notes["merges"]:
        assert entry["absorbed"] == int(min(entry["losses"], key=entry["losses"].__getitem__))
        assert "0" not in entry["losses"]
    assert sorted(entry["absorbed"] for entry in plan.notes["merges"]) == list(gone)


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_block_is_never_absorbed_even_if_it_does_nothing(model, count):
    first = model.model.layers[0]
    first.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.zero_()
    assert 0 not in plan_of(model, calibration_of(model), num_merges=count).removed(LAYERS)


@pytest.fixture
def refit_is_kept(monkeypatch):
    """Whatever it does to the loss: these tokens are random, so that tells nothing."""
    losses = iter([1.0, 0.5])
    monkeypatch.setattr(Chooser, "loss_without", lambda *_: next(losses))


@pytest.mark.usefixtures("refit_is_kept")
def test_only_output_projections_change(model):
    plan = plan_of(model, calibration_of(model, samples=120, batch_size=12), num_merges=1)
    assert plan.tensors
    own = dict(model.named_parameters())
    changed = {name for name, tensor in plan.tensors.items() if not torch.equal(tensor, own[name])}
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


def choice_loss(model, plan, calibration, samples):
    """Mean loss of the model that the plan gives, on the batches to score: every third of the choice's."""
    smaller = copy.deepcopy(model)
    apply(plan, smaller)
    return mean_loss_on(smaller, calibration.some(samples, least=3)[2::3])


def mean_loss_on(model, batches):
    """Cross-entropy of every token but the first of a text; these texts have no padding."""
    total = count = 0.0
    for batch in batches:
        ids = batch.inputs["input_ids"].long()
        logits = model(ids).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2])
def test_never_worse_than_leaving_the_blocks_out(model, seed, count):
    for parameter in model.model.layers.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    calibration = calibration_of(model)
    plan = plan_of(model, calibration, num_merges=count, choice_samples=9)
    plain = choice_loss(model, Plan((RemoveBlocks(LAYERS, plan.removed(LAYERS)),)), calibration, 9)
    solved = choice_loss(model, plan, calibration, 9)
    assert plan.notes["loss"]["blocks left out"] == pytest.approx(plain, rel=1e-4)
    if plan.tensors:
        assert plan.notes["loss"]["refitted"] == pytest.approx(solved, rel=1e-3)
        assert solved < plain
    else:
        assert plan.notes["loss"]["refitted"] >= plan.notes["loss"]["blocks left out"]


def test_a_refit_that_does_not_help_is_not_kept(model, monkeypatch):
    def worse(context, stack, absorbed, tokens, drafts, known):
        drafts.undo.write(model.lm_head.weight, -3 * model.lm_head.weight)
        drafts.rewrite(["lm_head.weight"])
        return []

    monkeypatch.setattr(refit_module, "_correct", worse)
    plan = plan_of(model, calibration_of(model), num_merges=1)
    assert plan.notes["loss"]["refitted"] > plan.notes["loss"]["blocks left out"]
    assert plan.tensors == {}


def test_a_block_that_does_nothing_costs_nothing(model):
    """There is nothing to solve for, and the loss after absorbing it is the whole model's."""
    third = model.model.layers[3]
    third.self_attn.o_proj.weight.zero_()
    third.mlp.down_proj.weight.zero_()
    calibration = calibration_of(model, batch_size=2)
    losses = plan_of(model, calibration, num_merges=1, choice_samples=6).notes["merges"][0]["losses"]
    scored = calibration.some(6, least=3)[2::3]  # of three batches, the third is not fitted on
    whole = mean_loss_on(model, scored)
    assert losses["3"] == pytest.approx(whole, rel=1e-6)
    assert len(losses) > 1
    assert all(loss != pytest.approx(whole, rel=1e-6) for index, loss in losses.items() if index != "3")


@pytest.mark.usefixtures("refit_is_kept")
def test_solving_takes_away_error_on_data_that_was_not_seen(model):
    """The stream after the merged block is nearer to the original than without solving."""
    calibration = calibration_of(model, samples=120, batch_size=12)
    plan = plan_of(model, calibration, num_merges=1)
    (edit,) = plan.edits
    assert plan.notes["fits"][0]["block"] == edit.kept
    assert plan.notes["fits"][0]["absorbed"] == [*edit.absorbed]
    fresh = torch.randint(4, 63, (40, 10), generator=torch.Generator().manual_seed(77))
    runner = BlockRunner(model, Anatomy(model).stack(), Batch({"input_ids": fresh}, None))
    streams = recorded(runner)[1]
    target = runner.run(edit.absorbed[-1], streams[edit.absorbed[-1]])
    plain = (runner.run(edit.kept, streams[edit.kept]) - target).square().sum().item()
    with Undo() as undo:
        for name, tensor in plan.tensors.items():
            if name.startswith(f"{LAYERS}.{edit.kept}."):
                undo.write(model.get_parameter(name), tensor)
        solved = (runner.run(edit.kept, streams[edit.kept]) - target).square().sum().item()
    assert solved < 0.95 * plain


@pytest.mark.parametrize("model_type", ["bert", "vit", "mixtral", "gemma3_text", "olmo2"])
def test_other_families_are_compressed_or_left_plain(model_type):
    model = (tiny_base_model if model_type in ("bert", "vit") else tiny_model)(model_type)
    generator = torch.Generator().manual_seed(0)
    if model_type == "vit":
        size = model.config.image_size
        data = torch.randn((12, 3, size, size), generator=generator)
    else:
        data = torch.randint(8, 100, (12, 8), generator=generator)
    with torch.enable_grad():
        compress(model, MKAConfig(num_merges=1), data, options=DataOptions(batch_size=2))
    assert len(Anatomy(model).stack()) == 3
    assert model.compression_report.notes["loss"]["blocks left out"] > 0


def test_too_few_samples(model):
    with pytest.raises(CalibrationError, match=r"7 calibration samples are too few.*at least 8 are needed"):
        plan_for(MKAConfig(num_merges=1), CalibrationContext(model, calibration_of(model, samples=7)))


def test_with_too_few_batches_to_hold_one_out_the_penalty_is_not_chosen(model):
    calibration = calibration_of(model, samples=9, batch_size=3)
    plan = plan_of(model, calibration, num_merges=1)
    assert {fit["penalty"] for fit in plan.notes["fits"]} <= {0.1, None}


# --- cost -------------------------------------------------------------------------------------------------------------


def block_forwards(model, calibration, **options):
    """How many times a block really ran (its own FFN) while planning, over the number of blocks."""
    calls = []
    with hooked(layer.mlp.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers):
        plan_for(MKAConfig(**options), CalibrationContext(model, calibration))
    return len(calls)


def test_the_cost_depends_on_the_budgets_not_on_the_data(model):
    options = {"num_merges": 2, "choice_samples": 12, "refit_tokens": 240}
    costs = [block_forwards(model, calibration_of(model, samples=n), **options) for n in (24, 48, 96, 192)]
    assert max(costs) < 1.5 * min(costs), "blocks already settled are not solved for, so the counts differ a little"
    more = block_forwards(model, calibration_of(model, samples=96), **options | {"choice_samples": 48})
    assert more > costs[0]


def test_the_cost_is_bounded_by_the_number_of_merges(model):
    """In block forwards on L blocks: per merge every candidate's target, fit and tail on the choice's batches."""
    length = 5
    for merges in (1, 2, 3):
        calibration = calibration_of(model, samples=30, batch_size=3)
        choice, refit = 6, 8  # batches
        cost = block_forwards(model, calibration, num_merges=merges, choice_samples=18, refit_tokens=240)
        per_candidate = choice * (1 + 2 + 1 + length)  # target, features twice at most, one block and the tail
        choosing = merges * (choice * length + length * per_candidate)
        correcting = 2 * choice * length + refit * length * 4 + choice * length
        assert cost <= choosing + correcting


def test_streams_of_the_walk_are_two_a_batch(model, monkeypatch):
    """The refit keeps the streams of as many batches as its budget of tokens holds."""
    seen = []
    own = refit_module._fit

    def spy(context, stack, index, pairs, undo):
        seen.append(len(pairs))
        return own(context, stack, index, pairs, undo)

    monkeypatch.setattr(refit_module, "_fit", spy)
    plan_for(MKAConfig(num_merges=1, refit_tokens=240), CalibrationContext(model, calibration_of(model, samples=192)))
    assert set(seen) == {8}


def test_streams_that_the_choice_has_kept_are_not_made_again(model, monkeypatch):
    """And whether they are known makes no difference to the plan."""
    calls = []

    def plan():
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        with hooked(layer.mlp.register_forward_hook(count) for layer in model.model.layers):
            return plan_for(MKAConfig(num_merges=2), CalibrationContext(model, calibration_of(model)))

    with_streams = plan()
    monkeypatch.setattr(Streams, "of", lambda *_: None)
    without = plan()
    assert calls[0] < calls[1]
    assert with_streams.to_list() == without.to_list()
    assert with_streams.tensors.keys() == without.tensors.keys()
    assert all(torch.equal(value, without.tensors[name]) for name, value in with_streams.tensors.items())
