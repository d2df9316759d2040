"""The one gate through which samples enter: checked, and brought to float64 on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


def as_samples(x: Tensor, name: str = "x") -> Tensor:
    """Check a matrix of samples and return it in float64 on the CPU, detached.

    Args:
        x: [N, D], any real dtype, any device.
        name: how the error messages call it.

    Returns:
        [N, D] float64 on the CPU. (CPU before float64: some accelerators have no float64.)

    Raises:
        TypeError: not a tensor, or a complex one.
        ValueError: not two-dimensional, empty, or with NaN or infinite entries.
    """
    if not isinstance(x, Tensor) or x.is_complex():
        found = f"a complex tensor ({x.dtype})" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {found}; expected a real torch.Tensor of shape [N, D]")
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected a non-empty [N, D]: one row a sample (x[:, None] if D is 1)"
        )
    x = x.detach().cpu().to(torch.float64)
    finite = torch.isfinite(x).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{name} has NaN or infinite entries in {len(bad)} of {len(x)} samples (first: sample {bad[0]}); expected "
            "finite values: run the calibration in float32 or bfloat16, or leave those samples out"
        )
    return x


def is_constant(x: Tensor) -> bool:
    """Whether the samples x [N, D] (float64) are all the same but for rounding, 1e-10 of their largest entry."""
    spread = (x.amax(dim=0) - x.amin(dim=0)).amax()
    return bool(spread <= 1e-10 * x.abs().amax())


def as_matched_samples(blocks: Sequence[Tensor]) -> list[Tensor]:
    """`as_samples` for a list whose n-th rows all come from the same n-th sample.

    Args:
        blocks: L tensors [N, D_l]; N must agree, D_l may differ.

    Raises:
        TypeError, ValueError: as `as_samples`, naming the block; an empty list; numbers of samples that differ.
    """
    if len(blocks) == 0:
        raise ValueError("no blocks were given; expected at least one tensor of shape [N, D]")
    checked = [as_samples(x, f"block {i}") for i, x in enumerate(blocks)]
    for i, x in enumerate(checked):
        if len(x) != len(checked[0]):
            raise ValueError(
                f"block {i} has {len(x)} samples and block 0 has {len(checked[0])}; expected the same samples in the "
                "same order for every block: collect them in one pass over the calibration data"
            )
    return checked


def check_positive_int(value: int, name: str) -> None:
    """Raise TypeError unless `value` is an int, ValueError unless it is at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected a whole number >= 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected a whole number >= 1")
