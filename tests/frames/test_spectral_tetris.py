"""The existence theorem against construction of every small case, and the Spectral Tetris matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.frames import tight_fusion_frame_exists
from framequant.frames.spectral_tetris import (
    Step,
    construction_steps,
    dense_isometry,
    modulation,
    next_step,
    roots_of_unity,
    spectral_tetris,
)


@pytest.mark.parametrize("dim", range(1, 13))
def test_theorem_and_constructor_agree(dim: int) -> None:
    for subspace_dim in range(1, dim + 1):
        for num_subspaces in range(1, 2 * dim + 3):
            sizes = (num_subspaces, subspace_dim, dim)
            if tight_fusion_frame_exists(*sizes):
                assert_tight(dense_isometry(*sizes))
            else:
                with pytest.raises(ValueError, match="no tight fusion frame"):
                    dense_isometry(*sizes)


def assert_tight(frame: np.ndarray) -> None:
    K, L, N = frame.shape
    stacked = frame.reshape(K * L, N)
    np.testing.assert_allclose(stacked.conj().T @ stacked, np.eye(N), rtol=0, atol=1e-12)
    bases = frame * np.sqrt(K * L / N)
    np.testing.assert_allclose(
        bases @ bases.conj().swapaxes(1, 2), np.broadcast_to(np.eye(L), (K, L, L)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("sizes", "exists"),
    [
        ((4, 3, 10), False),  # K <= ceil(N/L)
        ((5, 4, 13), True),  # K = ceil(N/L) + 1 and the Naimark complement exists
        ((4, 4, 11), False),  # K = ceil(N/L) + 1 and it does not
        ((3, 2, 3), True),  # complements of three lines in C^3
        ((1, 5, 5), True),
        ((2, 3, 5), False),
        ((0, 1, 1), False),
        ((3, 4, 3), False),
        ((4, 0, 2), False),
    ],
)
def test_known_cases(sizes: tuple[int, int, int], exists: bool) -> None:
    assert tight_fusion_frame_exists(*sizes) is exists


@settings(deadline=None, max_examples=50)
@given(K=st.integers(1, 40), L=st.integers(1, 40), N=st.integers(1, 60))
def test_existence_is_symmetric_under_complements(K: int, L: int, N: int) -> None:
    exists = tight_fusion_frame_exists(K, L, N)
    if L < N:
        assert exists == tight_fusion_frame_exists(K, N - L, N)
    if L <= N < K * L and L <= K * L - N:
        assert exists == tight_fusion_frame_exists(K, L, K * L - N)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_tetris_rows_are_orthogonal_and_columns_normal(data: st.DataObject) -> None:
    dim = data.draw(st.integers(2, 80))
    subspace_dim = data.draw(st.integers(1, dim // 2))
    rows = spectral_tetris(subspace_dim, dim)
    width = rows.weights.shape[1]
    assert width <= (dim // subspace_dim if dim % subspace_dim == 0 else -(-dim // subspace_dim) + 2)
    matrix = np.zeros((subspace_dim, dim + width))
    for row, start in enumerate(rows.starts):
        matrix[row, start : start + width] = rows.weights[row]
    assert not matrix[:, dim:].any()
    expected = np.eye(subspace_dim) * dim / subspace_dim
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose((matrix[:, :dim] ** 2).sum(axis=0), 1.0, rtol=0, atol=1e-13)
    assert (np.count_nonzero(matrix, axis=0) <= 2).all()


def test_tetris_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match="2L <= N"):
        spectral_tetris(3, 5)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.data())
def test_modulation_columns_are_orthonormal(num_subspaces: int, data: st.DataObject) -> None:
    block = modulation(num_subspaces, data.draw(st.integers(1, num_subspaces)))
    np.testing.assert_allclose(block.conj().T @ block, np.eye(block.shape[1]), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000))
def test_roots_of_unity_are_accurate_and_symmetric(order: int) -> None:
    cosines, sines = roots_of_unity(order)
    angles = 2 * np.pi * np.arange(order, dtype=np.longdouble) / order
    np.testing.assert_allclose(cosines, np.cos(angles).astype(float), rtol=0, atol=2e-15)
    np.testing.assert_allclose(sines, np.sin(angles).astype(float), rtol=0, atol=2e-15)
    if order % 2 == 0:
        assert (cosines[order // 2 :] == -cosines[: order // 2]).all()
    if order % 4 == 0:
        assert (cosines[order // 4], sines[order // 4]) == (0.0, 1.0)


def test_phases_do_not_lose_accuracy_with_the_dimension() -> None:
    block = modulation(4099, 4099)[:, -4:]
    np.testing.assert_allclose(block.conj().T @ block, np.eye(4), rtol=0, atol=1e-12)


def test_steps_of_the_recursion() -> None:
    assert next_step(9, 32, 288) is Step.BLOCK
    assert next_step(23, 98, 2048) is Step.BANDED
    assert [step for step, _, _ in construction_steps(3, 2, 3)] == [Step.SPATIAL, Step.BLOCK]
    assert [step for step, _, _ in construction_steps(5, 4, 13)][:2] == [Step.NAIMARK, Step.SPATIAL]
