"""Ridge regression from the data, and the sums from which the package does it."""

import numpy as np
import torch

from hf_compress.numerics.ridge import LeastSquares


def data(rows=60, inputs=5, outputs=3, seed=0, noise=0.3):
    """x and y = xW + 2 + noise, in float64; W is the same whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x, x @ weight + 2.0 + noise * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)


def statistics(x, y, weights=None):
    sums = LeastSquares(x.shape[1], y.shape[1])
    sums.update(x, y, weights)
    return sums


def ridge(x, y, penalty, prior=None, affine=False):
    """(weight, bias) by ordinary least squares of the data, centred if affine, with rows sqrt(penalty) I appended."""
    prior = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype) if prior is None else prior
    x_mean, y_mean = (x.mean(dim=0), y.mean(dim=0)) if affine else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    x, y = x - x_mean, y - y_mean
    root = (penalty * x.square().sum(dim=0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    weight = torch.from_numpy(np.linalg.lstsq(rows.numpy(), torch.cat([y, root * prior]).numpy(), rcond=None)[0])
    return weight, y_mean - x_mean @ weight
