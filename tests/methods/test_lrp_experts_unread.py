"""LRP on experts that no token is given to: their sizes decide, and nothing is made up for."""

import pytest
import torch

from hf_compress.modules.experts import Expert
from hf_compress.modules.packed import MixedPrecisionLinear
from tests.helpers.changes import forward
from tests.helpers.linears import IDS, lrp, mask_of, stored
from tests.helpers.mixtures import apart, is_unread, lopsided, maps_of
from tests.helpers.models import refusing

BITS = {"bits": 4.5, "group_size": 16}
HALF = {"sparsity": 0.5}
PAPER = {"variant": "paper"}


@pytest.fixture
def weights_before():
    """Of the experts that read nothing."""
    split, ran = apart(lopsided()), []
    found = {path: module for path, module in split.named_modules() if isinstance(module, Expert)}
    for path, expert in found.items():
        expert.register_forward_hook(lambda *_, path=path: ran.append(path))
    forward(split, {"input_ids": IDS})
    assert set(ran) == {path for path in found if not is_unread(path)}
    return {path: module.weight.detach() for path, module in maps_of(split).items() if is_unread(path)}


def largest(sizes, count):
    """A mask of the `count` largest of each row."""
    return torch.stack([torch.zeros(len(row)).bool().index_fill(0, row.argsort()[-count:], True) for row in sizes])


@pytest.mark.parametrize(
    "settings",
    [{}, {"score": "wanda"}, {"score": "signed"}, {"scope": "row"}, {"compensation": "none"}, {"temper": 1.0}],
    ids=str,
)
def test_unread_experts_are_pruned_by_size_and_nothing_else(settings, weights_before):
    model = lrp(lopsided(), **HALF, **settings)
    for path, weight in weights_before.items():
        module = model.get_submodule(path)
        sizes = weight.abs() if settings.get("scope") == "row" else weight.abs().flatten()[None]
        mask = mask_of(module)
        assert torch.equal(mask.view(sizes.shape), largest(sizes, sizes.shape[1] // 2))
        assert torch.equal(module.unpacked(), weight * mask), "nothing is known that could be made up for"


def test_rows_and_groups_of_unread_experts_go_by_size(weights_before):
    rows, groups = lrp(lopsided(), granularity="row", **HALF), lrp(lopsided(), granularity="n:m")
    for path, weight in weights_before.items():
        sums = weight.abs().sum(dim=1)
        assert torch.equal(mask_of(rows.get_submodule(path)).all(dim=1), largest(sums[None], len(sums) // 2)[0])
        mask = mask_of(groups.get_submodule(path)).reshape(-1, 4)
        assert torch.equal(mask, largest(weight.abs().reshape(-1, 4), 2))


def test_the_paper_leaves_unread_experts_whole(weights_before):
    """Sizes are above 0, all of them; where two precisions are given, by the median size."""
    model = lrp(lopsided(), **PAPER)
    for path, weight in weights_before.items():
        assert bool(mask_of(model.get_submodule(path)).all())
        assert torch.equal(model.get_submodule(path).unpacked(), weight)
    model = lrp(lopsided(), prune=False, split=(8, 4), group_size=16, **PAPER)
    for path, weight in weights_before.items():
        median = sorted(weight.abs().flatten().tolist())[(weight.numel() - 1) // 2]
        assert torch.equal(mask_of(model.get_submodule(path)), weight.abs() > median)


@pytest.mark.parametrize("allocation", ["fisher", "relevance", "error"])
def test_unread_experts_are_rounded_to_nearest(allocation, weights_before):
    """Each weight is the nearest of the values that its group's grid has; in the fewest bits, if nothing feels it."""
    model = lrp(lopsided(), allocation=allocation, **BITS)
    maps = stored(model, MixedPrecisionLinear)
    bits = {path: module.bits.tolist() for path, module in maps.items() if ".experts." in path}
    for path, weight in weights_before.items():
        module = maps[path]
        groups = zip(weight.reshape(-1, 16).double(), module.unpacked().reshape(-1, 16).double(), strict=True)
        steps, zeros = module.steps.view(torch.bfloat16).double(), module.zeros.double()
        for (values, rounded), step, width, zero in zip(groups, steps, bits[path], zeros, strict=True):
            grid = step * (torch.arange(2**width) - zero)
            least = (values[:, None] - grid).abs().amin(dim=1)
            assert bool(((values - rounded).abs() <= least + 1e-6).all())
        if allocation != "error":
            assert set(bits[path]) == {2}
    read = [width for path, widths in bits.items() if path not in weights_before for width in widths]
    if allocation != "error":
        assert sum(read) / len(read) > 2.3


def test_in_few_bits_and_sparse(weights_before):
    model = lrp(lopsided(), **HALF, **BITS)
    for path, weight in weights_before.items():
        module = model.get_submodule(path)
        mask = mask_of(module)
        assert float(weight[mask].abs().min()) >= float(weight[~mask].abs().max())
        assert set(module.bits.tolist()) == {2}
        assert not module.unpacked()[~mask].any()


@pytest.mark.parametrize("score", ["relevance", "wanda", "signed"])
def test_compared_across_the_model_unread_experts_would_be_gone(score):
    model = lopsided()
    message = r"no weight of model\.layers\.\d\.mlp\.experts\.[45]\.(up|down) would be left"
    with refusing(model, ValueError, message):
        lrp(model, scope="model", score=score, **HALF)
