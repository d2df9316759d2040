"""Bits by whole linear maps: held against all assignments there are, and what is stored against the budget."""

import itertools
import json

import numpy as np
import pytest
import torch

from hf_compress.anatomy.parts import linear_map
from hf_compress.calibration.data import Batch
from hf_compress.methods.lrp.module_bits import read_together
from hf_compress.modules.packed import MixedPrecisionLinear, PackedLinear, pack
from hf_compress.numerics.budget import spend_on_items
from tests.helpers.linears import IDS, buffer_bytes, linears, lrp, stored
from tests.helpers.marks import only_quick
from tests.helpers.models import assert_reloads, leftovers
from tests.helpers.round_trip import build, logits

SIZE = 32


def run(model, **settings):
    return lrp(model, per="module", **{"group_size": SIZE} | settings)


def packed(model):
    return stored(model, MixedPrecisionLinear)


def bits_of(model):
    """The number of bits of each packed map; there is but one in each."""
    found = {path: set(module.bits.tolist()) for path, module in packed(model).items()}
    assert all(len(bits) == 1 for bits in found.values())
    return {path: bits.pop() for path, bits in found.items()}


def together(path):
    """What stands for the maps that read the same as one, by their names."""
    name = path.rpartition(".")[2]
    sets = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
    return path.rpartition(".")[0] + "." + next((same[0] for same in sets if name in same), name)


def best_of_all(errors, costs, budget):
    """The least error of all assignments within the budget."""
    within = []
    for choices in itertools.product(range(len(costs[0])), repeat=len(costs)):
        if sum(cost[choice] for cost, choice in zip(costs, choices, strict=True)) <= budget:
            within.append(sum(float(errors[item, choice]) for item, choice in enumerate(choices)))
    return min(within)


@pytest.mark.parametrize("seed", range(30))
def test_as_well_as_can_be(seed):
    """Of items of all sizes, with errors of any shape, at every budget; twice as much is still the best."""
    generator = np.random.default_rng(seed)
    choices = 2 + seed % 2
    costs = np.cumsum(generator.integers(1, 40, (6, choices)), axis=1) * (1 + seed % 3)
    errors = torch.from_numpy(generator.random((6, choices)))
    if seed % 4:
        errors = errors.sort(dim=1, descending=True).values
    for budget in range(int(costs[:, 0].sum()), int(costs[:, -1].sum()) + 10, 7):
        found = spend_on_items(errors, costs.tolist(), budget)
        assert sum(costs[item][choice] for item, choice in enumerate(found)) <= budget
        total = sum(float(errors[item, choice]) for item, choice in enumerate(found))
        assert total == pytest.approx(best_of_all(errors, costs.tolist(), budget), rel=1e-12)


def test_a_rough_unit_stays_within_the_budget():
    """Sizes without a common measure, and too many bits for a table: what is lost is less than an item."""
    costs = [[size, 2 * size] for size in (999_983, 1_000_003, 999_979, 1_000_033, 999_961)]
    errors = torch.tensor([[5.0, 0.0], [4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    for whole in range(6):
        assert spend_on_items(errors, costs, 5_100_000 + whole * 1_000_100) == [1] * whole + [0] * (5 - whole)


def test_among_equals_the_cheaper():
    assert spend_on_items(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), [[1, 2], [1, 2]], 10) == [0, 0]


def test_a_budget_below_the_least():
    with pytest.raises(ValueError, match="4 bits are fewer than the 5 that all items take at least"):
        spend_on_items(torch.ones(2, 2), [[2, 4], [3, 6]], 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_the_least_of_all_assignments(symmetric):
    """By rounding errors alone, with all sizes and all that is stored: 2¹⁶ assignments."""
    old = build("Llama")
    model = run(build("Llama"), bits=6, allocation="error", rounding="nearest", symmetric=symmetric)
    items = {together(path): [] for path in linears(old)}
    for path, module in linears(old).items():
        weight, own = linear_map(module).T.detach(), []
        for bits in (4, 8):
            even = symmetric or bits == 8
            packing, tensors = pack(weight, torch.full((len(weight), weight.shape[1] // SIZE), bits), SIZE, even)
            one = MixedPrecisionLinear(packing, bias=False)
            one.load_state_dict(tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            own.append((float((one.unpacked() - weight).double().square().sum()), size))
        items[together(path)].append(own)
    table = np.array([[np.sum([own[choice] for own in maps], axis=0) for choice in (0, 1)] for maps in items.values()])
    takes = np.array(list(itertools.product((0, 1), repeat=len(items)))) == 1
    errors, sizes = (np.where(takes, table[:, 1, i], table[:, 0, i]).sum(axis=1) for i in (0, 1))
    budget = 6 * sum(linear_map(module).numel() for module in linears(old).values()) / 8
    found = bits_of(model)
    index = [{together(path): found[path] == 8 for path in found}[item] for item in items]
    row = int(np.flatnonzero((takes == np.array(index)).all(axis=1))[0])
    assert errors[row] == pytest.approx(errors[sizes <= budget].min(), rel=1e-4)
    assert buffer_bytes(model) == sizes[row] <= budget


@pytest.mark.parametrize("bits", only_quick([5.0, 6.5, 8.75, 12.0], 6.5))
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "BERT", "GPT-2"])
def test_one_number_a_module_and_no_more_than_the_budget(name, bits, tmp_path):
    old = build(name)
    count = sum(linear_map(module).numel() for module in linears(old).values())
    model = run(build(name), bits=bits)
    found = bits_of(model)
    assert found.keys() == linears(old).keys()
    assert set(found.values()) <= {4, 8}
    assert all(module.packing.symmetric for module in packed(model).values())
    groups = {}
    for path, value in found.items():
        groups.setdefault(together(path), set()).add(value)
    assert all(len(values) == 1 for values in groups.values())
    assert buffer_bytes(model) <= min(bits, 8.75) * count / 8
    assert buffer_bytes(model) == count / 8 * 8.75 or bits < 8.75, "enough for all gives all"
    assert bits_of(assert_reloads(model, tmp_path / "out", logits)) == found
    json.dumps(model.compression_report.notes)


def test_bytes_to_aim_at():
    aim = sum(linear_map(module).numel() for module in linears(build("Llama")).values()) * 6 // 8
    assert 0.9 * aim < buffer_bytes(run(build("Llama"), target_bytes=aim)) <= aim


def test_zeros_are_stored_with_4_bits_where_asked_for():
    model = run(build("Llama"), bits=6.5, symmetric=False)
    assert {(len(m.packing.planes), m.packing.symmetric) for m in packed(model).values()} == {(4, False), (8, True)}


def test_groups_keep_their_zeros():
    model = lrp(build("Llama"), bits=5, group_size=SIZE)
    assert not any(module.packing.symmetric for module in packed(model).values())


def test_what_has_no_relevance_gets_the_fewest():
    """Two blocks' FFNs write nothing: their errors cost nothing, and the bits go elsewhere, however large they are."""

    def muted():
        model = build("Llama")
        with torch.no_grad():
            for index in (1, 3):
                model.model.layers[index].mlp.gate_proj.weight *= 8
                model.model.layers[index].mlp.down_proj.weight *= 1e-12
        return model

    paths = [f"model.layers.{index}.mlp.{name}_proj" for index in (1, 3) for name in ("gate", "up")]
    by_relevance, by_error = bits_of(run(muted(), bits=6)), bits_of(run(muted(), bits=6, allocation="error"))
    assert {by_relevance[path] for path in paths} == {4}
    assert {by_error[path] for path in paths} == {8}


def test_with_narrower_ffns():
    model = run(build("Llama"), granularity="neuron", sparsity=0.5, bits=6)
    assert {m.in_features for path, m in packed(model).items() if path.endswith("down_proj")} == {32}
    assert set(bits_of(model).values()) == {4, 8}


def test_who_reads_together():
    """Maps of one module that are given the same tensor; those that are not run stand alone."""
    model = build("Llama")
    maps = linears(model)
    found = read_together(model, Batch({"input_ids": IDS[:1]}, None), {**maps, "elsewhere": torch.nn.Linear(2, 2)})
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    groups += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    expected = [[f"model.layers.{index}.{path}" for path in group] for index in range(4) for group in groups]
    assert found == [*expected, ["elsewhere"]]
    assert leftovers(model) == []


def test_a_budget_that_does_not_suffice():
    model = build("Llama")
    with pytest.raises(ValueError, match=r"bits=4\.5 leaves 3\.75 bits for each weight, where 4 are the fewest"):
        run(model, bits=4.5)
    assert stored(model, PackedLinear) == {}
    assert set(bits_of(run(model, bits=4.75)).values()) == {4}
