"""Ridge regression by the tokens' products gives what that by the inputs' sums does."""

import pytest
import torch

from hf_compress.methods.base.few_rows import HeldOutRows
from hf_compress.methods.base.ridge import HeldOutSums

PENALTIES = (0.01, 0.1, 1.0)


def data(rows, held, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + held, 40, generator=generator)
    x[:, 30:] *= 100
    y = x @ torch.randn(40, 6, generator=generator) + 5 * torch.randn(rows + held, 6, generator=generator)
    return [part.to(dtype).split([rows, held]) for part in (x, y)]


@pytest.mark.parametrize(("rows", "held"), [(20, 8), (25, 0), (0, 25), (60, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_by_sums(rows, held, dtype):
    (x, x_held), (y, y_held) = data(rows, held, dtype)
    few, sums = HeldOutRows((30, 10)), HeldOutSums.empty(40, 6)
    for one in (few, sums):
        for part in range(0, rows, 10):
            one.update(x[part : part + 10], y[part : part + 10], held=False)
        one.update(x_held, y_held, held=True)
    assert few.energy == pytest.approx(sums.fitted.energy + sums.held.energy, rel=1e-6)
    found, expected = few.fit(PENALTIES), sums.fit(penalties=PENALTIES, parts=(30, 10))
    assert found.penalty == expected.penalty
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_all_zero_get_nothing_and_no_rows_are_refused():
    few = HeldOutRows((2, 2))
    with pytest.raises(ValueError, match="no rows were seen"):
        few.fit()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2:] = 0
    few.update(x, torch.ones(3, 1), held=False)
    found = few.fit()
    assert torch.isfinite(found.weight).all()
    assert not found.weight[2:].any()
