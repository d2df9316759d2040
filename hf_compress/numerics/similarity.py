"""How alike the states of the blocks are: one symmetric matrix over blocks, by a choice of measures.

Source: MKA (arXiv 2406.16330) for the matrix over layers that decides what is merged; each measure names its own.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .information import information_matrix
from .registry import Registry
from .samples import as_matched_samples, is_constant

SIMILARITIES: Registry[Callable[..., Tensor]] = Registry("similarity")
"""Name -> `f(pooled, **options) -> Tensor [L, L]`."""

# Samples brought to float64 at a time by the per-sample measures: L times the model's width of them fit anywhere.
_CHUNK = 64


def similarity_matrix(pooled: Sequence[Tensor], similarity: str, **options: int) -> Tensor:
    """Similarity of every pair of blocks.

    Args:
        pooled: L tensors [N, D]: the states of the same N samples at each block, one vector a sample. For "information"
            the embeddings of those states (`manifold.embed`), whose widths may differ; so may they for "cka".
        similarity: a name in `SIMILARITIES`: "information", "cka", "cosine" or "angular".
        options: passed on: `neighbors` for "information".

    Returns:
        [L, L] float64 on the CPU, symmetric, diagonal exactly 1; in [0, 1], but "cosine" in [-1, 1].

    Raises:
        ValueError: unknown similarity, no blocks, shapes that do not match, too few samples, NaN or infinite entries,
            states for which the measure is undefined.
        TypeError: an option that the chosen similarity does not have.
    """
    matrix = SIMILARITIES.resolve(similarity)(pooled, **options)
    # Batched products can differ from their transpose in the last bit; merging must not depend on the order of a pair.
    return ((matrix + matrix.T) / 2).fill_diagonal_(1.0)


@SIMILARITIES.register("information")
def information(pooled: Sequence[Tensor], neighbors: int = 3) -> Tensor:
    """Normalised mutual information of embeddings, [L, L] in [0, 1]: `information.information_matrix`."""
    return information_matrix(pooled, neighbors)


@SIMILARITIES.register("cka")
def cka(pooled: Sequence[Tensor]) -> Tensor:
    """Linear centred kernel alignment with the unbiased HSIC, [L, L] clipped to [0, 1].

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T. The biased form goes to 1 for unrelated blocks as D / N
    grows, and here D is the model's width; the unbiased one stays around 0, hence the clipping.

    Args:
        pooled: L tensors [N, D_l], N >= 4. Memory: L N^2 float64.

    Raises:
        ValueError: N < 4, a block whose samples are all identical.

    Source: S. Kornblith et al., "Similarity of neural network representations revisited" (arXiv 1905.00414),
    equation (4); L. Song et al., JMLR 13 (2012), the unbiased estimator of HSIC, in the inner-product form of
    G. J. Szekely and M. L. Rizzo, Annals of Statistics 42 (2014), for U-centred matrices.
    """
    blocks = as_matched_samples(pooled)
    if len(blocks[0]) < 4:
        raise ValueError(f"{len(blocks[0])} samples; the unbiased HSIC divides by N - 3: give at least 4 samples")
    centred = torch.stack([_u_centred_gram(x, i) for i, x in enumerate(blocks)])
    return (centred @ centred.T).clamp(0.0, 1.0)


@SIMILARITIES.register("cosine")
def cosine(pooled: Sequence[Tensor]) -> Tensor:
    """Mean over samples of the cosine between a sample's states at two blocks, [L, L] in [-1, 1].

    Args:
        pooled: L tensors [N, D] of one shape.

    Raises:
        ValueError: widths that differ, a state that is 0.
    """
    return _sample_cosines(pooled).mean(dim=0)


@SIMILARITIES.register("angular")
def angular(pooled: Sequence[Tensor]) -> Tensor:
    """Mean over samples of 1 - arccos(cosine) / pi, [L, L] in [0, 1]; arguments and errors as `cosine`.

    Source: A. Gromov et al., "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887): one minus
    their angular distance.
    """
    return (1 - torch.arccos(_sample_cosines(pooled)) / math.pi).mean(dim=0)


def _u_centred_gram(x: Tensor, index: int) -> Tensor:
    """The U-centred linear Gram matrix of x [N, D], flat [N * N] and of unit norm, so that inner products are CKA."""
    if is_constant(x):
        raise ValueError(
            f"all {len(x)} samples of block {index} are identical, so CKA is 0/0; expected samples that differ: "
            "check the calibration texts, or leave this block out"
        )
    size = len(x)
    # Neither the mean nor the scale changes CKA; removing both keeps the precision of states with a large offset.
    x = x - x.mean(dim=0)
    x = x / x.abs().amax()
    gram = (x @ x.T).fill_diagonal_(0.0)
    rows = gram.sum(dim=1) / (size - 2)
    centred = gram - rows[:, None] - rows[None, :] + rows.sum() / (size - 1)
    flat = centred.fill_diagonal_(0.0).flatten()
    return flat / flat.norm()


def _sample_cosines(pooled: Sequence[Tensor]) -> Tensor:
    """Cosines [N, L, L] between the states of each sample at every two blocks."""
    blocks = as_matched_samples(pooled)
    for i, x in enumerate(blocks):
        if x.shape[1] != blocks[0].shape[1]:
            raise ValueError(
                f"block {i} has {x.shape[1]} features and block 0 has {blocks[0].shape[1]}; a cosine needs equal "
                "widths: use 'cka' or 'information' for blocks of different width"
            )
        zero = (x == 0).all(dim=1)
        if zero.any():
            raise ValueError(
                f"sample {int(zero.nonzero()[0])} of block {i} is all zeros and has no direction; expected states "
                "other than 0: leave that sample out, or use 'cka' or 'information'"
            )
    cosines = []
    for start in range(0, len(blocks[0]), _CHUNK):
        states = torch.stack([x[start : start + _CHUNK] for x in blocks], dim=1)  # [n, L, D]
        states = states / states.abs().amax(dim=2, keepdim=True)  # squares of tiny states would underflow
        states = states / states.norm(dim=2, keepdim=True)
        cosines.append((states @ states.transpose(1, 2)).clamp(-1.0, 1.0))
    return torch.cat(cosines)
