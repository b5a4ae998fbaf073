"""Tight fusion frames over the complex numbers: which exist, and how each is built.

A tight fusion frame (K, L, N) is a family of K subspaces of C^N, each of dimension L, whose orthogonal
projections add up to (KL/N) times the identity. It is held as an isometry ``T`` (KL x N, ``T* T = I``) whose
rows fall into K sets of L orthogonal rows of equal norm, one set for each subspace.

Sizes are complex sizes throughout this module; ``fusion_frame`` runs it at half the real ones. Every decision
is made in exact integers, and only the finished entries are float64. Imports no module of ours.

References:
    Casazza, Fickus, Mixon, Wang, Zhou, "Constructing tight fusion frames", Applied and Computational
    Harmonic Analysis 30, 2011.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class Step(Enum):
    """How a tight fusion frame is obtained; the first two directly, the others from a smaller one."""

    BLOCK = "modulated blocks: L divides N"
    BANDED = "modulated Spectral Tetris: K >= ceil(N/L) + 2"
    SPATIAL = "every subspace replaced by its orthogonal complement"
    NAIMARK = "the rows completed to a unitary matrix, and the new columns kept"


@dataclass(frozen=True)
class TetrisRows:
    """A Spectral Tetris matrix, row by row.

    Attributes:
        starts: ``(L,)`` first column of each row's support.
        weights: ``(L, width)`` the entries from that column on, zero beyond the support.
    """

    starts: NDArray[np.int64]
    weights: NDArray[np.float64]


def next_step(num_subspaces: int, subspace_dim: int, dim: int) -> Step | None:
    """Say which construction the sizes (K, L, N) call for, or None where no tight fusion frame exists.

    A returned SPATIAL or NAIMARK is a conditional answer: the smaller frame has to exist too.
    """
    K, L, N = num_subspaces, subspace_dim, dim
    if min(K, L, N) < 1 or L > N:
        return None
    rows_needed = -(-N // L)
    if N % L == 0:
        return Step.BLOCK if rows_needed <= K else None
    if 2 * L > N:
        return Step.SPATIAL
    if rows_needed + 2 <= K:
        return Step.BANDED
    return Step.NAIMARK if rows_needed + 1 == K else None


def construction_steps(num_subspaces: int, subspace_dim: int, dim: int) -> list[tuple[Step, int, int]]:
    """List the constructions, outermost first, that lead to a tight fusion frame (K, L, N).

    Args:
        num_subspaces: K.
        subspace_dim: L, complex.
        dim: N, complex.

    Returns:
        Triples ``(step, L, N)`` with the sizes at that step; the last step is BLOCK or BANDED. Empty if no
        tight fusion frame of these sizes exists. At most about 2L steps, and one or two for most sizes.
    """
    steps: list[tuple[Step, int, int]] = []
    K, L, N = num_subspaces, subspace_dim, dim
    while True:
        step = next_step(K, L, N)
        if step is None:
            return []
        steps.append((step, L, N))
        if step is Step.SPATIAL:
            L = N - L
        elif step is Step.NAIMARK:
            N = K * L - N
        else:
            return steps


def tight_fusion_frame_exists(num_subspaces: int, subspace_dim: int, dim: int) -> bool:
    """Decide whether C^dim has a tight fusion frame of ``num_subspaces`` subspaces of ``subspace_dim``.

    Examples:
        >>> tight_fusion_frame_exists(5, 2, 8), tight_fusion_frame_exists(4, 3, 10)
        (True, False)
    """
    return bool(construction_steps(num_subspaces, subspace_dim, dim))


def spectral_tetris(subspace_dim: int, dim: int) -> TetrisRows:
    """Build an L x N matrix with orthogonal rows of squared norm N/L and columns of norm one.

    Each row is filled with ones. Where w < 1 of its squared norm is then still missing, the block
    ``sqrt(1/2) [[sqrt(w), sqrt(w)], [sqrt(2-w), -sqrt(2-w)]]`` goes over this row and the next: its columns
    have norm one, its rows are orthogonal, and it leaves the row complete. Norms are counted in units of
    1/L, in integers, so that "is anything missing" is a question about zero and never about rounding.

    Args:
        subspace_dim: L; divides ``dim`` or is at most half of it.
        dim: N.

    Returns:
        The rows. A support has N/L columns if L divides N and at most ceil(N/L) + 2 otherwise.
    """
    L, N = subspace_dim, dim
    if N % L and 2 * L > N:
        raise ValueError(f"Spectral Tetris needs 2L <= N or L dividing N, not L={L}, N={N}.")
    starts, rows, column, carried = [], [], 0, 0
    row: list[float] = []
    for _ in range(L):
        starts.append(column)
        missing = N - carried
        ones, missing = divmod(missing, L)
        column += len(row) + ones
        row += [1.0] * ones
        following: list[float] = []
        carried = 0
        if missing:
            row += [math.sqrt(missing / (2 * L))] * 2
            carried = 2 * L - missing
            root = math.sqrt(carried / (2 * L))
            following = [root, -root]
        rows.append(row)
        row = following
    weights = np.zeros((L, max(map(len, rows))))
    for index, entries in enumerate(rows):
        weights[index, : len(entries)] = entries
    return TetrisRows(np.array(starts, dtype=np.int64), weights)


def roots_of_unity(order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cosine and sine of ``2 pi p / order`` for p = 0 ... order - 1.

    Angles are folded into the first octant in integers, so that exact values come out exact and opposite
    ones opposite; the ``math`` library is used, since numpy's vectorised sine differs between processors.
    """
    pairs = [_cosine_sine(p, order) for p in range(order)]
    return np.array([c for c, _ in pairs]), np.array([s for _, s in pairs])


def _cosine_sine(p: int, order: int) -> tuple[float, float]:
    quarter, rest = divmod(4 * p, order)  # the angle is (pi/2) (quarter + rest / order)
    if 2 * rest > order:
        sine, cosine = (f(math.pi * (order - rest) / (2 * order)) for f in (math.cos, math.sin))
    else:
        cosine, sine = (f(math.pi * rest / (2 * order)) for f in (math.cos, math.sin))
    for _ in range(quarter):
        cosine, sine = -sine, cosine
    return cosine, sine


def modulation(num_subspaces: int, width: int) -> NDArray[np.complex128]:
    """Return the K x width matrix ``exp(2 pi i j n / K) / sqrt(K)``; its columns are orthonormal up to K.

    Phases are reduced modulo K as integers: products j*n rounded in floating point would lose tightness.
    """
    cosines, sines = roots_of_unity(num_subspaces)
    phases = np.outer(np.arange(num_subspaces), np.arange(width)) % num_subspaces
    roots = (cosines + 1j * sines) / math.sqrt(num_subspaces)
    return roots.astype(np.complex128)[phases]


def dense_isometry(num_subspaces: int, subspace_dim: int, dim: int) -> NDArray[np.complex128]:
    """Build any tight fusion frame that exists as a dense array, by the steps of the existence theorem.

    The complements come from LAPACK's QR factorisation, whose last bits depend on the machine; the frames
    that ``choose_frame`` picks never need them.

    Args:
        num_subspaces: K.
        subspace_dim: L, complex.
        dim: N, complex.

    Returns:
        ``(K, L, N)``; reshaped to KL x N it is an isometry, and each ``(L, N)`` slice has orthogonal rows of
        squared norm N/(KL).

    Raises:
        ValueError: if no tight fusion frame of these sizes exists.
    """
    K = num_subspaces
    steps = construction_steps(K, subspace_dim, dim)
    if not steps:
        raise ValueError(f"no tight fusion frame ({K}, {subspace_dim}, {dim}) exists.")
    _, L, N = steps[-1]
    frame = _modulated(K, L, N)
    for step, L, N in reversed(steps[:-1]):
        frame = _spatial_complement(frame) if step is Step.SPATIAL else _naimark_complement(frame)
        assert frame.shape == (K, L, N)
    return frame


def _modulated(K: int, L: int, N: int) -> NDArray[np.complex128]:
    tetris = spectral_tetris(L, N)
    width = tetris.weights.shape[1]
    blocks = tetris.weights * modulation(K, width)[:, None, :]
    frame = np.zeros((K, L, N + width), dtype=np.complex128)
    for row, start in enumerate(tetris.starts):
        frame[:, row, start : start + width] = blocks[:, row]
    return frame[:, :, :N]


def _spatial_complement(frame: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Replace each subspace by its orthogonal complement: (K, L, N) becomes (K, N - L, N)."""
    K, L, N = frame.shape
    unitary, _ = np.linalg.qr(frame.conj().swapaxes(1, 2), mode="complete")
    bases: NDArray[np.complex128] = unitary[:, :, L:].conj().swapaxes(1, 2)
    return bases * math.sqrt(N / (K * (N - L)))


def _naimark_complement(frame: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Complete the isometry to a unitary and keep the new columns: (K, L, N) becomes (K, L, KL - N)."""
    K, L, N = frame.shape
    unitary, _ = np.linalg.qr(frame.reshape(K * L, N), mode="complete")
    return unitary[:, N:].reshape(K, L, K * L - N)
