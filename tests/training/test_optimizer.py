"""Changes in mid-run: the optimizer's groups are those of the changed model, and the survivors keep their momentum."""

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_compress import CompressionCallback, DropBlocksConfig, LayerCollapseConfig, MKAConfig
from hf_compress.training.optimizer import following
from tests.helpers.language import tiny_llama
from tests.helpers.runs import arguments, figures, ids_of, state_of, tiny_dense, token_rows

ROWS = token_rows()
CALIBRATION = ids_of(token_rows(64))
CASES = {
    "dropping": DropBlocksConfig(num_blocks=2, criterion="last"),
    "influence": DropBlocksConfig(num_blocks=2),
    "merging": MKAConfig(num_merges=2, variant="paper", similarity="block_influence"),
    "refitting": MKAConfig(num_merges=2),
    "collapsing": LayerCollapseConfig(num_layers=2),
    "factors": LayerCollapseConfig(num_layers=2, rank=4),
}


class Watch(TrainerCallback):
    """Looks at the optimizer around the changes: before, as the last of `on_optimizer_step`, and after, at the end."""

    def __init__(self):
        self.before, self.changes, self.weights = {}, 0, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        inner = kwargs["optimizer"].optimizer
        self.before = {p: {k: v.clone() for k, v in values.items()} for p, values in inner.state.items()}

    def on_step_end(self, args, state, control, **kwargs):
        model, inner = kwargs["model"], kwargs["optimizer"].optimizer
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = {p for name, p in named.items() if p.ndim > 1}
        groups = [[p for p in named.values() if (p in decayed) == decay] for decay in (True, False)]
        assert [len(group["params"]) for group in inner.param_groups] == [len(group) for group in groups]
        for group, expected in zip(inner.param_groups, groups, strict=True):
            assert all(one is other for one, other in zip(group["params"], expected, strict=True))
        assert [group["weight_decay"] for group in inner.param_groups] == [0.1, 0.0]
        assert set(inner.state) <= set(named.values())
        assert set(inner.state) == set(self.before) & set(named.values())
        for parameter, values in inner.state.items():
            assert all(torch.equal(value, self.before[parameter][key]) for key, value in values.items())
            assert values["step"].item() > 0
        self.changes += set(self.before) != set(named.values())
        self.weights.append(state_of(model))


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_follows(case, tmp_path):
    watch = Watch()
    callback = CompressionCallback(CASES[case], CALIBRATION, every=2)
    args = arguments(tmp_path, weight_decay=0.1, max_steps=6)
    trainer = Trainer(tiny_llama(5), args, train_dataset=ROWS, callbacks=[callback, watch])
    trainer.train()
    assert watch.changes == 2
    *_, before, after = watch.weights
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in after if "embed" not in name)
    assert len(figures(trainer)) == 6


def test_one_change_each_so_many_steps(tmp_path):
    lengths = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            lengths.append(len(kwargs["model"].model.layers))

    callback = CompressionCallback(CASES["dropping"], every=2)
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2)
    Trainer(tiny_llama(5), args, train_dataset=ROWS, callbacks=[callback, Count()]).train()
    assert lengths == [5, 4, 4, 3, 3, 3]


def test_new_parameters_go_where_their_like_are():
    """By name, else by dimensions; a bias that nothing had before is not decayed; frozen ones stay out."""
    model = tiny_dense(use_bias=False, gated=False)
    model.bias = torch.nn.Parameter(torch.zeros(3))
    model.classifier.weight.requires_grad_(False)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1 and p.requires_grad], "weight_decay": 0.1},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = optimizer.state[model.embedding.weight]
    with following(model, optimizer):
        model.layers[1].mlp = torch.nn.Linear(8, 8)
        model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(4, 8))
        model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(8, 4), requires_grad=False)
    first, second = (group["params"] for group in optimizer.param_groups)
    named = dict(model.named_parameters())
    frozen = ("classifier.weight", "layers.2.mlp.down_proj.weight")
    assert [id(p) for p in first] == [id(p) for n, p in named.items() if p.ndim > 1 and n not in frozen]
    assert [id(p) for p in second] == [id(p) for p in named.values() if p.ndim == 1]
    assert any(p is model.layers[1].mlp.bias for p in second)
    assert optimizer.state[model.embedding.weight] is kept
    assert set(optimizer.state) < set(named.values())
    assert model.layers[1].mlp.weight not in optimizer.state


def own_run(config, folder, every=None, resume=None, learns=lambda name: True):
    """A run with an optimizer of the user's own, made before the Trainer is."""
    model = tiny_llama(5)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if learns(name)], lr=1e-2)
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3)
    callback = CompressionCallback(config, CALIBRATION, every=every)
    trainer = Trainer(model, args, train_dataset=ROWS, callbacks=[callback], optimizers=(optimizer, None))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} <= {id(p) for p in model.parameters()}
    return model, start, figures(trainer)


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_of_ones_own_follows_from_the_beginning(case, tmp_path):
    model, start, _ = own_run(CASES[case], tmp_path)
    assert all(not torch.equal(start[name], p) for name, p in model.named_parameters() if "embed" not in name)


@pytest.mark.parametrize("every", [None, 2])
def test_it_can_be_resumed_with(every, tmp_path):
    model, _, losses = own_run(CASES["dropping"], tmp_path, every)
    again, _, resumed = own_run(CASES["dropping"], tmp_path, every, str(tmp_path / "checkpoint-3"))
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in losses]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("every", [None, 1])
def test_it_learns_no_more_than_it_was_given(every, tmp_path):
    """Here no projection of an FFN, though collapsing makes new ones in their places."""
    model, start, _ = own_run(CASES["factors"], tmp_path, every, learns=lambda name: "mlp" not in name)
    for name, parameter in model.named_parameters():
        if "embed" not in name and ("mlp" not in name or every is None):  # else they change once on the way
            assert torch.equal(start[name], parameter) == ("mlp" in name), name


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    optimizer = torch.optim.AdamW(tiny_llama(5).parameters())
    given = {"callbacks": [CompressionCallback(CASES["dropping"])], "optimizers": (optimizer, None)}
    trainer = Trainer(tiny_llama(5), arguments(tmp_path), train_dataset=ROWS, **given)
    with pytest.raises(ValueError, match=r"has \d+ parameters that are none of the model's: make it from this model"):
        trainer.train()
