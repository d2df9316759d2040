"""Similarity matrices: bounds, invariances and the cases where the answer is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.numerics.similarity import SIMILARITIES, cka, similarity_matrix

ALL = ["angular", "cka", "cosine", "information"]


def chain(blocks=5, samples=100, features=4, step=0.3, seed=0):
    """A residual stream: each block adds a little that is its own."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(samples, features, generator=generator)]
    for _ in range(blocks - 1):
        states.append(states[-1] + step * torch.randn(samples, features, generator=generator))
    return states


def test_the_registry_holds_the_four_and_no_name_twice():
    assert sorted(SIMILARITIES) == ALL
    with pytest.raises(ValueError, match="similarity 'cka' is already registered"):
        SIMILARITIES.register("cka")(cka)
    with pytest.raises(ValueError, match="unknown similarity 'block_influence'; expected one of 'angular', 'cka'"):
        similarity_matrix(chain(), "block_influence")


@pytest.mark.parametrize("similarity", ALL)
def test_matrix_of_a_residual_stream(similarity):
    matrix = similarity_matrix(chain(), similarity)
    assert (matrix.shape, matrix.dtype) == ((5, 5), torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(5, dtype=torch.float64))
    assert (matrix[0].diff() < 0).all()  # the farther apart, the less alike


@pytest.mark.parametrize("similarity", ALL)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), samples=st.integers(6, 30), features=st.integers(1, 40), step=st.floats(0, 10))
def test_bounds(similarity, seed, samples, features, step):
    matrix = similarity_matrix(chain(3, samples, features, step, seed), similarity)
    low = -1.0 if similarity == "cosine" else 0.0
    assert ((matrix >= low) & (matrix <= 1)).all()
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("similarity", ALL)
def test_scale_of_a_block_does_not_matter(similarity):
    blocks = chain()
    scaled = [1e3 * blocks[0].double(), 1e-200 * blocks[1].double(), *blocks[2:]]
    torch.testing.assert_close(similarity_matrix(scaled, similarity), similarity_matrix(blocks, similarity))


@pytest.mark.parametrize(("similarity", "matters"), [("cka", False), ("cosine", True), ("angular", True)])
def test_rotation_of_a_block(similarity, matters):
    blocks = chain()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    rotated, expected = (similarity_matrix([blocks[0] @ r, blocks[1]], similarity) for r in (rotation, torch.eye(4)))
    assert torch.allclose(rotated, expected, atol=1e-6) is not matters


def test_cka_is_unbiased_where_the_plain_one_is_not():
    """Unrelated blocks much wider than the samples are many: the biased CKA says nearly 1."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(20, 2000, generator=generator, dtype=torch.float64) for _ in range(12)]
    off_diagonal = similarity_matrix(blocks, "cka")[~torch.eye(12, dtype=torch.bool)]
    assert off_diagonal.mean() < 0.1
    centred = [x - x.mean(dim=0) for x in blocks[:2]]
    grams = [x @ x.T for x in centred]
    assert (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()) > 0.9


def test_cka_survives_a_large_common_offset():
    blocks = [x.double() for x in chain()]
    moved, expected = similarity_matrix([x + 1e6 for x in blocks], "cka"), similarity_matrix(blocks, "cka")
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8)


def test_known_angles():
    blocks = [torch.tensor([row] * 3) for row in ([1.0, 0.0], [1.0, 1.0], [-2.0, 0.0])]
    for similarity, expected in (("cosine", [1, 0.5**0.5, -1]), ("angular", [1, 0.75, 0])):
        assert similarity_matrix(blocks, similarity)[0].tolist() == pytest.approx(expected)


def test_per_sample_measures_do_not_depend_on_the_chunks():
    blocks = chain(3, samples=150)
    whole = similarity_matrix(blocks, "cosine")
    parts = [similarity_matrix([x[i : i + 50] for x in blocks], "cosine") for i in (0, 50, 100)]
    torch.testing.assert_close(whole, sum(parts) / 3)


def test_options_reach_the_measure():
    blocks = chain()
    few, many = (similarity_matrix(blocks, "information", neighbors=count) for count in (3, 9))
    assert not torch.equal(few, many)
    with pytest.raises(TypeError, match="neighbors"):
        similarity_matrix(blocks, "cka", neighbors=9)


@pytest.mark.parametrize("similarity", ALL)
def test_refuses_bad_blocks(similarity):
    blocks = chain()
    with pytest.raises(ValueError, match="no blocks were given"):
        similarity_matrix([], similarity)
    with pytest.raises(ValueError, match="block 1 has 99 samples and block 0 has 100"):
        similarity_matrix([blocks[0], blocks[1][:99]], similarity)
    blocks[2][7, 0] = float("nan")
    message = r"block 2 has NaN or infinite entries in 1 of 100 samples \(first: sample 7\)"
    with pytest.raises(ValueError, match=message):
        similarity_matrix(blocks, similarity)


def test_refuses_what_a_measure_cannot_say():
    blocks = chain()
    with pytest.raises(ValueError, match="block 1 has 3 features and block 0 has 4"):
        similarity_matrix([blocks[0], blocks[1][:, :3]], "cosine")
    blocks[1][5] = 0.0
    with pytest.raises(ValueError, match="sample 5 of block 1 is all zeros"):
        similarity_matrix(blocks, "angular")
    with pytest.raises(ValueError, match="all 100 samples of block 1 are identical"):
        similarity_matrix([blocks[0], torch.ones(100, 4)], "cka")
    with pytest.raises(ValueError, match="3 samples; the unbiased HSIC divides by N - 3"):
        similarity_matrix([x[:3] for x in blocks], "cka")
