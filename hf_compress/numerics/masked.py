"""Least squares where each output may use some of the inputs alone."""

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean diagonal: what weights are held to what they were by
_STEPS = 64
_CLOSE = 1e-9  # of the first residual, squared


@torch.no_grad()
def solve_masked(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """What the weights kept have to become to make up for the others, row by row.

    min over V, 0 where not kept, of  tr (V − W) G (V − W)ᵀ + λ |V − W|²,  by conjugate gradients on all rows at once.

    Args:
        weight: W, (outputs, inputs).
        gram: G = Σ x xᵀ of the inputs, (inputs, inputs).
        kept: bool, (outputs, inputs).

    Returns:
        V, (outputs, inputs) float32.

    Raises:
        ValueError: shapes that do not fit, or a gram that is not finite.

    Source of the method: M. R. Hestenes and E. Stiefel, 1952, with the diagonal as preconditioner.
    """
    inputs = weight.shape[1]
    if gram.shape != (inputs, inputs) or kept.shape != weight.shape:
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a gram ({inputs}, {inputs}) and kept of its shape; got "
            f"{tuple(gram.shape)} and {tuple(kept.shape)}"
        )
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the gram matrix holds NaN or infinity: run the calibration in float32 or bfloat16")
    scale = gram.diagonal().double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    system = (gram.double() / scale + _DAMPING * torch.eye(inputs, dtype=torch.float64, device=gram.device)).float()
    mask, target = kept.float(), weight.detach().float()
    solution = target * mask
    residual = ((target - solution) @ system) * mask
    inverse = 1 / system.diagonal()
    ahead = residual * inverse
    direction, size = ahead, (residual * ahead).sum(dim=1, keepdim=True)
    enough = _CLOSE * size
    for _ in range(_STEPS):
        image = (direction @ system) * mask
        step = size / (direction * image).sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        solution = solution + step * direction
        residual = residual - step * image
        ahead = residual * inverse
        new = (residual * ahead).sum(dim=1, keepdim=True)
        if bool((new <= enough).all()):
            break
        direction, size = ahead + new / size.clamp(min=torch.finfo(torch.float32).tiny) * direction, new
    return solution
