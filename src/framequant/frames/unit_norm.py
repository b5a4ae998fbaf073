"""Finite unit-norm tight frames in general: the protocol, its laws, the frame variation, and orderings.

A frame here is N unit vectors e_n of R^d in an order, with ``E^T E = (N/d) I``. ``HarmonicFrame`` is one;
``DenseFrame`` holds any other: ``random_frame`` draws one, ``tetris_frame`` takes Spectral Tetris's. How well
Sigma-Delta quantization does depends on the order: ``low_variation_order`` looks for one whose consecutive vectors
are close.

Imports no module of ours but ``duals``, ``operator``, ``signs``, ``spectral_tetris`` and ``errors``.

References:
    Benedetto, Powell, Yılmaz, "Sigma-Delta quantization and finite frames", IEEE Trans. Inf. Theory 52, 2006.
    Wang, "Sigma-Delta quantization errors and the traveling salesman problem", Adv. Comput. Math. 28, 2008.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from framequant.errors import FrameError
from framequant.frames.operator import check_last_axis
from framequant.frames.signs import splitmix64
from framequant.frames.spectral_tetris import spectral_tetris

MAX_ORDERED = 8192
"""Most vectors that ``low_variation_order`` takes: it holds all their distances."""


class UnitNormFrame(Protocol):
    """N unit vectors e_n of R^d with ``Σ e_n e_nᵀ = (N/d) I``, in the order in which they are quantized."""

    dim: int
    size: int

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """Return ``<x, e_n>``."""
        ...

    def adjoint(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``Σ c_n e_n``."""
        ...

    def synthesis(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``(d/N) Σ c_n e_n``, a left inverse of ``analysis``."""
        ...

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "size dim"]:
        """Return the vectors as rows."""
        ...


class DenseFrame:
    """A unit-norm tight frame given by its vectors, checked when it is made.

    Attributes:
        dim: d.
        size: N.
    """

    def __init__(self, vectors: Float[Tensor, "size dim"], tolerance: float = 1e-10) -> None:
        """Take the vectors as rows (a float64 copy is kept).

        Args:
            vectors: N unit vectors.
            tolerance: largest defect accepted; see ``check_frame``.

        Raises:
            FrameError: the vectors are not of norm one or not tight.
        """
        self._matrix = vectors.detach().to("cpu", torch.float64, copy=True)
        self.size, self.dim = self._matrix.shape
        checks = check_frame(self._matrix)
        if checks.norm_defect > tolerance or checks.tightness_defect > tolerance:
            raise FrameError(
                f"no unit-norm tight frame: norms miss 1 by {checks.norm_defect:.2g}, tightness by "
                f"{checks.tightness_defect:.2g} (tolerance {tolerance:g})."
            )

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """Return ``<x, e_n>`` in the dtype of ``x``."""
        check_last_axis(x, self.dim, "analysis")
        return x @ self._matrix.to(x).mT

    def adjoint(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``Σ c_n e_n``."""
        check_last_axis(coefficients, self.size, "adjoint")
        return coefficients @ self._matrix.to(coefficients)

    def synthesis(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``(d/N) Σ c_n e_n``."""
        return self.adjoint(coefficients) * (self.dim / self.size)

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "size dim"]:
        """Return the vectors as rows; a copy."""
        return self._matrix.to(dtype=dtype, device=device, copy=True)

    def reordered(self, order: Int[Tensor, " size"]) -> DenseFrame:
        """The same vectors in another order."""
        return DenseFrame(self._matrix[order])

    def __repr__(self) -> str:
        return f"DenseFrame(dim={self.dim}, size={self.size})"


@dataclass(frozen=True)
class FrameChecks:
    """How far vectors are from a zero-sum unit-norm tight frame.

    Attributes:
        norm_defect: max |‖e_n‖ - 1|.
        tightness_defect: max |(d/N) E^T E - I| over entries.
        sum_norm: ‖Σ e_n‖; 0 for a zero-sum frame.
    """

    norm_defect: float
    tightness_defect: float
    sum_norm: float


def check_frame(vectors: Float[Tensor, "size dim"]) -> FrameChecks:
    """Measure unit norm, tightness and the sum of vectors."""
    rows = vectors.double()
    size, dim = rows.shape
    gram = rows.mT @ rows * (dim / size)
    return FrameChecks(
        norm_defect=float((rows.norm(dim=1) - 1).abs().max()),
        tightness_defect=float((gram - torch.eye(dim, dtype=gram.dtype, device=gram.device)).abs().max()),
        sum_norm=float(rows.sum(0).norm()),
    )


def frame_variation(vectors: Float[Tensor, "size dim"], order: int = 1) -> float:
    """Return ``Σ_{n=1}^{N-ρ} ‖Δ^ρ e_n‖`` with Δ e_n = e_n - e_{n+1}: how much the order of vectors jumps about.

    Args:
        vectors: E, rows in the order of quantization.
        order: ρ ≥ 1.

    Raises:
        FrameError: ``order`` is below 1.
    """
    if order < 1:
        raise FrameError(f"the order of a frame variation is 1 or more, not {order}.")
    rows = vectors.double()
    for _ in range(order):
        rows = rows[:-1] - rows[1:]
    return float(rows.norm(dim=1).sum())


# --- Frames other than the harmonic -------------------------------------------------------------------------


def tetris_frame(dim: int, size: int) -> DenseFrame:
    """Build a sparse real unit-norm tight frame by Spectral Tetris: the columns of its d x N matrix.

    Args:
        dim: d.
        size: N, at least 2d or a multiple of d.

    Raises:
        FrameError: Spectral Tetris does not apply; the message names the nearest N.
    """
    if dim < 1 or size < dim or (size % dim and size < 2 * dim):
        raise FrameError(
            f"Spectral Tetris builds N = d or N >= 2d unit vectors, not N = {size} in R^{dim}; "
            f"the nearest is N = {dim if abs(size - dim) < abs(size - 2 * dim) else 2 * dim}."
        )
    tetris = spectral_tetris(dim, size)
    width = tetris.weights.shape[1]
    matrix = np.zeros((dim, size + width))
    for row, start in enumerate(tetris.starts):
        matrix[row, start : start + width] = tetris.weights[row]
    return DenseFrame(torch.from_numpy(matrix[:, :size].T.copy()))


def random_frame(dim: int, size: int, seed: int = 0) -> DenseFrame:
    """Draw a random unit-norm tight frame: a random tight frame, then plane rotations that set its norms to one.

    Rotating two rows of E in their plane leaves ``E^T E``; of two rows, one shorter and one longer than one, some
    rotation makes the first a unit vector. N - 1 rotations do for all.

    Args:
        dim: d.
        size: N ≥ d.
        seed: unsigned 64-bit.

    Raises:
        FrameError: N < d, or a seed out of range.
    """
    if dim < 1 or size < dim:
        raise FrameError(f"N = {size} vectors cannot span R^{dim}; the nearest is N = {max(dim, 1)}.")
    gaussian = _gaussian(size * dim, seed).reshape(size, dim)
    rows = np.linalg.qr(gaussian)[0] * math.sqrt(size / dim)
    squares = (rows**2).sum(1)
    short = [int(n) for n in np.flatnonzero(squares < 1)]
    long = [int(n) for n in np.flatnonzero(squares >= 1)]
    while short and long:
        i, j = short.pop(), long.pop()
        rows[i], rows[j] = _rotated(rows[i], rows[j])
        (short if rows[j] @ rows[j] < 1 else long).append(j)
    return DenseFrame(torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)))


def _rotated(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Rotate a row of norm below one and one of norm above one so that the first has norm one."""
    a, b, g = float(first @ first), float(second @ second), float(first @ second)
    # A root t of (b - 1) t² + 2 g t = 1 - a, in the form that does not cancel.
    root = math.sqrt(g * g + max(b - 1, 0.0) * (1 - a))
    if g < 0 < b - 1:
        tangent = (root - g) / (b - 1)
    else:
        tangent = (1 - a) / (root + g) if root + g > 0 else 0.0
    cosine = 1 / math.hypot(1, tangent)
    sine = tangent * cosine
    return cosine * first + sine * second, cosine * second - sine * first


def _gaussian(count: int, seed: int) -> NDArray[np.float64]:
    """Standard normal numbers by Box and Muller from SplitMix64: the same on every machine up to last bits."""
    words = splitmix64(2 * count, seed) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:count]))
    result: NDArray[np.float64] = radius * np.cos(2 * math.pi * uniform[count:])
    return result


# --- Orderings ----------------------------------------------------------------------------------------------


def low_variation_order(vectors: Float[Tensor, "size dim"], sweeps: int = 10) -> Int[Tensor, " size"]:
    """Order vectors so that consecutive ones are close: nearest neighbour, then 2-opt.

    The least variation is a shortest Hamiltonian path, so this is a heuristic for it; the variation of the result is
    never above that of the order given.

    Args:
        vectors: E, at most ``MAX_ORDERED`` rows.
        sweeps: of 2-opt at most.

    Returns:
        A permutation p: quantize ``vectors[p]``.

    Raises:
        FrameError: there are too many vectors.

    Cost:
        N² distances in memory; each sweep is N vectorised passes over N.
    """
    size = vectors.shape[0]
    if size > MAX_ORDERED:
        raise FrameError(f"{size} vectors are too many to order; the limit is {MAX_ORDERED}.")
    rows = vectors.double().cpu()
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    paths = [_two_opt(path, distances, sweeps) for path in (_nearest_path(distances), np.arange(size))]
    best = min(paths, key=lambda path: _length(path, distances))
    return torch.from_numpy(best.astype(np.int64))


def _length(path: NDArray[np.int64], distances: NDArray[np.float64]) -> float:
    return float(distances[path[:-1], path[1:]].sum())


def _nearest_path(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    size = len(distances)
    path = np.zeros(size, dtype=np.int64)
    left = np.ones(size, dtype=bool)
    left[0] = False
    for n in range(1, size):
        path[n] = np.where(left, distances[path[n - 1]], np.inf).argmin()
        left[path[n]] = False
    return path


def _two_opt(path: NDArray[np.int64], distances: NDArray[np.float64], sweeps: int) -> NDArray[np.int64]:
    """Reverse stretches of an open path while that shortens it."""
    path, size = path.copy(), len(path)
    for _ in range(sweeps):
        improved = False
        for i in range(size - 2):
            # Reversing i+1 … j replaces the steps (i, i+1) and (j, j+1); the last j has no step after it.
            ends, after = path[i + 1 :], path[i + 2 :]
            change = distances[path[i], ends] - distances[path[i], path[i + 1]]
            change[:-1] += distances[path[i + 1], after] - distances[ends[:-1], after]
            j = int(change.argmin())
            if change[j] < -1e-12:
                path[i + 1 : i + 2 + j] = path[i + 1 : i + 2 + j][::-1].copy()
                improved = True
        if not improved:
            break
    return path
