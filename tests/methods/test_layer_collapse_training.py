"""LayerCollapse in training: settings, penalty, the optimizer of α against one by hand, and whole short runs."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import Trainer

from hf_compress import CompressionCallback
from hf_compress.anatomy.anatomy import Anatomy
from hf_compress.anatomy.undo import Undo
from hf_compress.calibration.data import DataOptions, prepare
from hf_compress.errors import CalibrationError
from hf_compress.methods.base.context import CalibrationContext
from hf_compress.methods.base.registry import plan_for, schedule_for, steps_for
from hf_compress.methods.layer_collapse import LayerCollapseConfig
from hf_compress.methods.layer_collapse.blend import blended
from hf_compress.methods.layer_collapse.closed_form import count_of
from hf_compress.methods.layer_collapse.training import Blending, ClosedForm
from hf_compress.modules.activation import BlendedActivation
from hf_compress.rewrite.apply import apply, carry_out
from hf_compress.rewrite.builders import replace_activation
from hf_compress.rewrite.record import recorded
from tests.helpers.models import leftovers
from tests.helpers.runs import arguments, dense_rows, figures, loss_on, same, state_of, tiny_dense


def paper(**settings):
    return LayerCollapseConfig(variant="paper", **settings)


def values(rows):
    return torch.stack([row["input_values"] for row in rows])


def context_of(model):
    return CalibrationContext(model, prepare(values(dense_rows(32)), model, None, DataOptions(batch_size=4)))


def begun(config, progress=0.0, model=None, **settings):
    """A blended model, with a schedule that has begun."""
    model = model if model is not None else tiny_dense(**settings)
    schedule = Blending(config)
    carry_out(schedule.prepare(context_of(model)), model, Undo())
    schedule.begin(model, progress)
    return model, schedule


def alphas(model):
    return [module.alpha.item() for module in model.modules() if isinstance(module, BlendedActivation)]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_what_is_done_in_training():
    assert type(schedule_for(paper())) is Blending
    assert type(schedule_for(LayerCollapseConfig(ratio=0.5, gradual=True))) is Blending
    assert type(schedule_for(LayerCollapseConfig(ratio=0.5))) is ClosedForm
    learned = {
        ("paper", None): True,
        ("paper", "scheduled"): False,
        ("closed_form", None): False,
        ("closed_form", "learned"): True,
    }
    for (variant, alpha), expected in learned.items():
        config = LayerCollapseConfig(variant=variant, num_layers=1, gradual=variant != "paper", alpha=alpha)
        schedule = Blending(config)
        assert (schedule.learned, schedule.ramp) == (expected, 0.0 if expected else 0.5)
        assert Blending(replace(config, ramp=0.25)).ramp == 0.25


def test_steps():
    context = CalibrationContext(tiny_dense(num_hidden_layers=4))
    one = LayerCollapseConfig(num_layers=1)
    assert steps_for(LayerCollapseConfig(num_layers=3), context) == [one] * 3
    assert steps_for(LayerCollapseConfig(ratio=0.25, penalty=0.5), context) == [replace(one, penalty=0.5)]
    for config in (paper(), LayerCollapseConfig(ratio=0.5, gradual=True), LayerCollapseConfig(target_r2=0.5)):
        with pytest.raises(ValueError, match="only a closed form with a ratio or num_layers can be cut into steps"):
            steps_for(config, context)


@pytest.mark.parametrize(("ffns", "ratio", "count"), [(4, 0.5, 2), (4, 0.75, 3), (12, 0.5, 6)])
def test_a_ratio_is_a_share_of_the_ffns(ffns, ratio, count):
    assert count_of(LayerCollapseConfig(ratio=ratio), ffns) == count


@pytest.mark.parametrize("blend", ["identity", "leaky"])
def test_a_gate_that_could_only_become_linear_is_refused(blend):
    with pytest.raises(ValueError, match="constant"):
        Blending(paper(blend=blend)).prepare(context_of(tiny_dense(gated=True)))


# --- what takes part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "blocks"), [({}, [0, 1, 2, 3]), ({"num_layers": 2}, [2, 3]), ({"ratio": 0.25}, [3])]
)
def test_the_last_take_part_or_all(amount, blocks):
    model = tiny_dense(num_hidden_layers=4)
    plan = Blending(paper(**amount)).prepare(CalibrationContext(model))
    assert [edit.activation for edit in plan.edits] == [f"layers.{index}.mlp.act_fn" for index in blocks]
    assert {edit.blend for edit in plan.edits} == {"leaky"}


def test_what_would_grow_takes_no_part():
    """Narrow FFNs are no larger than their map; the others are counted without them."""
    model = tiny_dense(num_hidden_layers=4, intermediate_size=[32, 32, 2, 32])
    plan = Blending(paper(num_layers=2)).prepare(CalibrationContext(model))
    assert [edit.activation.split(".")[1] for edit in plan.edits] == ["1", "3"]


def test_gradually_those_that_the_closed_form_chooses():
    model = tiny_dense(num_hidden_layers=4)
    context = context_of(model)
    chosen = [step["block"] for step in plan_for(LayerCollapseConfig(num_layers=2), context).notes["collapsed"]]
    plan = Blending(LayerCollapseConfig(num_layers=2, gradual=True)).prepare(context)
    assert [int(edit.activation.split(".")[1]) for edit in plan.edits] == sorted(chosen)
    assert all(not tensor.any() for tensor in plan.tensors.values())  # a schedule starts at 0


@pytest.mark.parametrize(
    ("settings", "blend", "got"),
    [
        ({"hidden_act": "gelu"}, None, "identity"),
        ({"hidden_act": "gelu"}, "leaky", "leaky"),
        ({"hidden_act": "relu"}, "identity", "identity"),
        ({"hidden_act": "silu", "gated": True}, None, "constant"),
    ],
)
def test_a_blend_on_request(settings, blend, got):
    model, schedule = begun(paper(blend=blend, alpha_init=0.25), **settings)
    assert [module.blend for module in schedule.modules.values()] == [got] * 3
    assert alphas(model) == [0.25] * 3
    z = torch.linspace(-2, 2, 64).view(1, 2, 32)
    with torch.no_grad():
        activated = schedule.modules[0](z)
    if got == "leaky":
        assert torch.equal(activated, torch.where(z > 0, z, 0.25 * z))


def test_gates_without_data_are_told():
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Blending(paper()).prepare(CalibrationContext(tiny_dense(gated=True)))


def test_what_an_earlier_run_has_blended_keeps_its_share():
    model = tiny_dense(num_hidden_layers=3, hidden_act="gelu")
    carry_out(replace_activation(Anatomy(model).block(1), "identity", 0.625), model, Undo())
    before = model.layers[1].mlp.act_fn
    model, schedule = begun(paper(alpha_init=0.125, blend="leaky"), model=model)
    assert model.layers[1].mlp.act_fn is before
    assert alphas(model) == [0.125, 0.625, 0.125]
    assert schedule.alpha.tolist() == [0.125, 0.625, 0.125]
    assert [module.blend for module in schedule.modules.values()] == ["leaky", "identity", "leaky"]


def test_a_frozen_ffn_cannot_learn():
    model = tiny_dense()
    model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj is frozen"):
        Blending(paper()).prepare(CalibrationContext(model))
    assert same(before, state_of(model))


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ramp", "progress", "risen"), [(None, 0.0, 1.0), (0.5, 0.2, 0.4), (0.5, 0.7, 1.0)])
def test_the_penalty_and_its_gradient(ramp, progress, risen):
    """lc · Σ(1 − α)², whose derivative by each α is 2·lc·(α − 1)."""
    model, schedule = begun(paper(lc=3.0, ramp=ramp))
    with torch.no_grad():
        for module, alpha in zip(schedule.modules.values(), (0.25, 0.75, 1.5), strict=True):
            module.alpha.fill_(alpha)
    lc = 3.0 * risen
    penalty = schedule.penalty(progress)
    assert penalty.item() == pytest.approx(lc * (0.75**2 + 0.25**2 + 0.5**2))
    penalty.backward()
    assert schedule.gradient.tolist() == pytest.approx([2 * lc * (alpha - 1) for alpha in (0.25, 0.75, 1.5)])
    assert all(module.alpha.grad is None for module in schedule.modules.values())
    assert schedule.logs()["penalty"] == penalty.item()
    schedule.penalty(progress).backward()  # a second micro-batch
    assert schedule.gradient.tolist() == pytest.approx([4 * lc * (alpha - 1) for alpha in (0.25, 0.75, 1.5)])
    assert leftovers(model) == []


def test_the_loss_itself_moves_alpha_too():
    """dL/dα of PReLU by a difference quotient, through the model."""
    model, schedule = begun(paper(alpha_init=0.5), hidden_act="relu")
    batch = {name: torch.stack([row[name] for row in dense_rows(8)]) for name in ("input_values", "labels")}
    model(**batch).loss.backward()
    model.double()
    for place, module in enumerate(schedule.modules.values()):
        losses = []
        for alpha in (0.5 - 1e-5, 0.5 + 1e-5):
            with torch.no_grad():
                module.alpha.fill_(alpha)
                losses.append(model(**batch).loss.item())
                module.alpha.fill_(0.5)
        assert schedule.gradient[place].item() == pytest.approx((losses[1] - losses[0]) / 2e-5, rel=1e-3, abs=1e-6)


# --- the optimizer of α -----------------------------------------------------------------------------------------------

GRADIENTS = [[0.5, -2.0, 0.0], [0.25, -1.0, 1e-4], [-3.0, 0.125, 0.0], [0.0, 0.0, 5.0], [1.0, -1.0, 1.0]]


def slow_adam(start, gradients, rate):
    """Kingma and Ba (2015), algorithm 1, with their settings."""
    m, v, alpha = 0.0, 0.0, start
    for step, gradient in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        alpha -= rate * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return alpha


def pushed(schedule, gradients, loss_scale=1.0):
    for gradient in gradients:
        schedule.gradient += torch.tensor(gradient) * loss_scale
        for module in schedule.modules.values():
            module.alpha.grad = torch.zeros_like(module.alpha)  # as DDP leaves it
        schedule.step(0.0, loss_scale)
        assert all(module.alpha.grad is None for module in schedule.modules.values())
        assert not schedule.gradient.any()  # the next step starts anew


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_alpha_follows_adam(loss_scale):
    model, schedule = begun(paper(alpha_init=0.25, alpha_lr=0.04))
    pushed(schedule, GRADIENTS, loss_scale)
    expected = [slow_adam(0.25, column, 0.04) for column in zip(*GRADIENTS, strict=True)]
    assert alphas(model) == pytest.approx(expected, abs=1e-6)
    assert schedule.alpha.tolist() == pytest.approx(expected, abs=1e-6)
    assert schedule.logs() == {f"alpha_{i}": alpha for i, alpha in enumerate(alphas(model))} | {"penalty": 0.0}


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_step_that_overflows_is_left_out(broken):
    model, schedule = begun(paper(alpha_init=0.25))
    pushed(schedule, [*GRADIENTS[:2], [broken, 1.0, 1.0], *GRADIENTS[2:]])
    expected = [slow_adam(0.25, column, 0.02) for column in zip(*GRADIENTS, strict=True)]
    assert alphas(model) == pytest.approx(expected, abs=1e-6)


def test_alpha_is_kept_in_float32():
    """Steps that bfloat16 cannot make one by one (at 0.5 it has 1/256 between numbers) add up."""
    model, schedule = begun(paper(alpha_init=0.5, alpha_lr=1e-4), model=tiny_dense().bfloat16())
    assert model.layers[0].mlp.act_fn.alpha.dtype == torch.bfloat16
    assert schedule.alpha.dtype == torch.float32
    gradients = [[-1.0, -1.0, 1.0]] * 100
    pushed(schedule, gradients)
    assert schedule.alpha.tolist() == pytest.approx([0.51, 0.51, 0.49], abs=1e-5)
    assert alphas(model) == schedule.alpha.bfloat16().tolist() != [0.5] * 3


def test_what_a_resumed_run_has_to_know():
    model, schedule = begun(paper(alpha_init=0.25))
    pushed(schedule, GRADIENTS[:3])
    saved = schedule.state()
    pushed(schedule, GRADIENTS[3:])
    again, resumed = begun(paper(alpha_init=0.25), progress=0.6)
    resumed.restore(saved)
    pushed(resumed, GRADIENTS[3:])
    assert alphas(again) == alphas(model)
    fresh = Blending(paper())
    carry_out(fresh.prepare(context_of(other := tiny_dense())), other, Undo())
    fresh.begin(other, 0.0)
    fresh.restore(fresh.state())  # before any step
    pushed(fresh, GRADIENTS)


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ramp", "size"), [(None, 0.5), (0.25, 0.25), (1.0, 1.0)])
def test_a_scheduled_alpha_rises_with_progress(ramp, size):
    config = paper(alpha="scheduled", ramp=ramp, alpha_init=0.3)
    model, schedule = begun(config)
    assert alphas(model) == [0.0] * 3
    for step in range(1, 21):
        for module in schedule.modules.values():
            (module.alpha * 7).sum().backward()  # moves nothing
        schedule.step(step / 20, 1.0)
        assert alphas(model) == pytest.approx([min(1.0, step / 20 / size)] * 3)
        assert all(module.alpha.grad is None for module in schedule.modules.values())
    assert alphas(model) == [1.0] * 3
    assert schedule.penalty(0.5) is None
    assert schedule.state() == {}
    assert alphas(begun(config, progress=size / 2)[0]) == pytest.approx([0.5] * 3)  # a resumed run


def test_what_is_not_linear_enough_at_the_end_is_solved_in_closed_form():
    model = tiny_dense(hidden_act="gelu")
    context = context_of(model)
    schedule = Blending(LayerCollapseConfig(num_layers=2, gradual=True, alpha="learned", tolerance=0.25))
    carry_out(schedule.prepare(context), model, Undo())
    schedule.begin(model, 0.0)
    (first, near), (second, far) = schedule.modules.items()
    with torch.no_grad():
        near.alpha.fill_(0.765625)
        far.alpha.fill_(0.75)
    steps = schedule.finish(context).notes["collapsed"]
    assert [(step["block"], "r2" in step) for step in steps] == [(second, True), (first, False)]
    assert set(blended(model, Anatomy(model).stack())) == {first, second}  # a plan, no change
    assert not any(module.alpha._post_accumulate_grad_hooks for module in schedule.modules.values())


# --- whole runs -------------------------------------------------------------------------------------------------------

NETWORKS = {
    "ReLU": {"hidden_act": "relu"},
    "GELU": {"hidden_act": "gelu"},
    "SwiGLU": {"hidden_act": "silu", "gated": True},
    "GEGLU": {"hidden_act": "gelu", "gated": True},
}
STEPS = 60


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_trained_until_it_collapses(network, tmp_path):
    model, rows = tiny_dense(**NETWORKS[network]), dense_rows(32)
    size = sum(p.numel() for p in model.parameters())
    callback = CompressionCallback(paper(alpha_lr=0.05, lc=10.0), calibration=values(rows))
    settings = arguments(tmp_path / "run", max_steps=STEPS, per_device_train_batch_size=16)
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback])
    assert alphas(model) == pytest.approx([0.01] * 3)
    trainer.train()
    log = figures(trainer)
    for block in range(3):
        course = [entry[f"compression/alpha_{block}"] for entry in log]
        assert course[0] < 0.1
        assert abs(1 - course[-1]) < 0.05
    assert loss_on(model, rows) < 0.5  # guessing has 0.7; a linear model can do it all
    assert [type(edit).__name__ for edit in recorded(model.config)][-3:] == ["LinearFFN"] * 3
    assert [step["block"] for step in model.compression_report.notes["collapsed"]] == [2, 1, 0]
    assert alphas(model) == []
    assert sum(p.numel() for p in model.parameters()) < size / 2
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(values(rows)).logits, model.eval()(values(rows)).logits)


@pytest.mark.parametrize("network", ["ReLU", "GEGLU"])
def test_under_the_weights_own_adam_alpha_would_stand_still(network):
    """Why α has an optimizer of its own: the paper's loss with everything under Adam at 1e-3, for as many steps."""
    model, rows = tiny_dense(**NETWORKS[network]), dense_rows(32)
    config = paper()
    apply(Blending(config).prepare(context_of(model)), model)
    modules = [module for module in model.modules() if isinstance(module, BlendedActivation)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        penalty = sum((1 - module.alpha).square().sum() for module in modules)
        (model(**batch).loss + config.lc * penalty).backward()
        optimizer.step()
    assert max(alphas(model)) < 0.2
    assert min(alphas(model)) > 0.02  # it moves, at its learning rate a step


def test_a_run_too_short_keeps_the_model_as_it_was_trained(tmp_path, caplog):
    model, rows = tiny_dense(), dense_rows(16)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[CompressionCallback(paper())])
    trainer.train()
    assert len(alphas(model)) == 3
    assert "no FFN has |1 − α| below the tolerance 0.05: block 0 α = 0.0" in caplog.text
    assert "train longer" in model.compression_report.notes["not_collapsed"]
    assert not any(
        module.alpha._post_accumulate_grad_hooks for module in blended(model, Anatomy(model).stack()).values()
    )
