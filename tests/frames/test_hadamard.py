"""The randomized Hadamard transform: orthogonal, flat, any dimension; Sylvester's matrix where it exists."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import RandomizedHadamard, random_signs
from framequant.frames.hadamard import factor_sizes, hartley, sylvester

TIGHT = {"rtol": 0.0, "atol": 1e-12}


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 96, 100, 135, 251, 576, 768, 1000, 1009])
def test_matrix_is_orthogonal_and_agrees_with_its_application(dim: int) -> None:
    transform = RandomizedHadamard(dim, seed=9)
    matrix = transform.as_matrix()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(dim, dtype=torch.float64), **TIGHT)
    x = torch.randn(5, dim, dtype=torch.float64)
    torch.testing.assert_close(transform.analysis(x), x @ matrix.T, **TIGHT)
    torch.testing.assert_close(transform.synthesis(x), x @ matrix, **TIGHT)


@pytest.mark.parametrize("dim", [3420, 4096, 11008, 28672])
def test_large_dimensions_invert(dim: int) -> None:
    transform = RandomizedHadamard(dim, seed=9)
    x = torch.randn(3, dim, dtype=torch.float64)
    torch.testing.assert_close(transform.synthesis(transform.analysis(x)), x, **TIGHT)
    torch.testing.assert_close(transform.analysis(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dim", [64, 576, 768, 1000, 1009, 11008])
def test_one_spike_is_spread_evenly(dim: int) -> None:
    spike = torch.zeros(dim, dtype=torch.float64)
    spike[dim // 3] = 1.0
    odd_factors = sum(size & (size - 1) > 0 for size in factor_sizes(dim))
    bound = math.sqrt(2.0**odd_factors / dim)
    assert RandomizedHadamard(dim, seed=1).analysis(spike).abs().max() <= bound * (1 + 1e-12)


@pytest.mark.parametrize("dim", [2, 16, 128, 2048])
def test_powers_of_two_give_the_sylvester_matrix(dim: int) -> None:
    index = torch.arange(dim)
    common = index[:, None] & index
    parity = sum((common >> bit) & 1 for bit in range(dim.bit_length())) % 2
    expected = (1.0 - 2.0 * parity.double()) / math.sqrt(dim) * random_signs(dim, 4)
    torch.testing.assert_close(RandomizedHadamard(dim, seed=4).as_matrix(), expected, **TIGHT)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 25, 43, 63, 109])
def test_hartley_matrix(size: int) -> None:
    matrix = hartley(size)
    angles = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    np.testing.assert_allclose(matrix, (np.cos(angles) + np.sin(angles)) / math.sqrt(size), atol=1e-12)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-13)
    assert (matrix == matrix.T).all()


def test_sylvester_matrix() -> None:
    assert sylvester(1).tolist() == [[1.0]]
    np.testing.assert_allclose(sylvester(4) * 2, np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]))


@settings(deadline=None)
@given(st.integers(1, 100_000))
def test_factors_multiply_to_the_dimension_and_are_small(dim: int) -> None:
    factors = factor_sizes(dim)
    assert math.prod(factors) == dim
    for size in factors:
        assert size <= 64 or all(size % divisor for divisor in range(2, math.isqrt(size) + 1))


@pytest.mark.parametrize(
    ("dim", "factors"),
    [
        (1, [1]),
        (7, [7]),
        (576, [18, 32]),
        (768, [24, 32]),
        (1000, [25, 40]),
        (1009, [1009]),
        (1536, [48, 32]),
        (3420, [57, 60]),
        (4096, [64, 64]),
        (11008, [43, 16, 16]),
        (14336, [28, 32, 16]),
        (28672, [28, 32, 32]),
    ],
)
def test_golden_factors(dim: int, factors: list[int]) -> None:
    """Files depend on this rule: a change here makes every stored frame another one."""
    assert factor_sizes(dim) == factors


def test_golden_coefficients() -> None:
    """Twelve coefficients worked out from the formulas alone: signs, then Hartley(3) within Sylvester(4)."""
    x = torch.arange(1.0, 13.0, dtype=torch.float64)
    signed = (x * random_signs(12, 7)).reshape(4, 3)
    angles = [[2 * math.pi * i * j / 3 for j in range(3)] for i in range(3)]
    cas = [[math.cos(angle) + math.sin(angle) for angle in row] for row in angles]
    walsh = [[(-1) ** (i & j).bit_count() for j in range(4)] for i in range(4)]
    expected = torch.tensor(walsh).double() @ signed @ torch.tensor(cas, dtype=torch.float64) / math.sqrt(12)
    torch.testing.assert_close(RandomizedHadamard(12, 7).analysis(x), expected.flatten(), **TIGHT)


def test_seed_decides_the_signs() -> None:
    x = torch.ones(64)
    assert torch.equal(RandomizedHadamard(64, 1).analysis(x), RandomizedHadamard(64, 1).analysis(x))
    assert not torch.equal(RandomizedHadamard(64, 1).analysis(x), RandomizedHadamard(64, 2).analysis(x))


def test_refusals() -> None:
    with pytest.raises(FrameError, match="dim"):
        RandomizedHadamard(0)
    with pytest.raises(FrameError, match="prime factor 20011"):
        RandomizedHadamard(2 * 20011)
    with pytest.raises(FrameError, match="seed"):
        RandomizedHadamard(8, -1)
