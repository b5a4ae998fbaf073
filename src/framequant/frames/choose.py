"""Choosing a fusion frame for a dimension and a redundancy.

Few redundancies are met exactly, and their costs differ a hundredfold: this module finds the cheapest sparse
frame whose true redundancy is close, and returns a spec whose ``redundancy`` is the truth to report. Pure
integer search, no tensors. Imports no other module of ours but ``operator``, ``spectral_tetris`` and
``errors``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from framequant.errors import FrameError
from framequant.frames.operator import FrameKind, FrameSpec
from framequant.frames.spectral_tetris import Step, next_step

MAX_REDUNDANCY = 8.0
"""Largest redundancy offered."""

SMALL_BLOCK = 32
"""Up to this many subspaces an exact redundancy is worth more than a cheaper inexact one."""

BANDED_OVERHEAD = 128
"""What gathering and weighting the windows of a banded frame costs, in subspaces of a block-diagonal one.

These are passes over memory, whatever the number of subspaces. On two CPU cores they took as long as the
products of a block-diagonal frame of 70 to 130 subspaces; an accelerator has arithmetic in plenty, and the
ratio there can only be larger. 128 is also about what the randomized Hadamard transform before it costs."""


@dataclass(frozen=True)
class _Candidate:
    num_subspaces: int
    subspace_dim: int
    banded: bool
    deviation: float

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Exact and small first, then cheap, then close."""
        exact = self.deviation < 1e-12 and self.num_subspaces <= SMALL_BLOCK
        return not exact, self.cost, self.deviation

    @property
    def cost(self) -> int:
        """Cost in units of a block-diagonal frame with one subspace: about 2 dim multiply-adds."""
        return self.num_subspaces + BANDED_OVERHEAD * self.banded


def choose_frame(dim: int, redundancy: float, seed: int = 0, tolerance: float = 0.005) -> FrameSpec:
    """Choose the transform for a dimension and a requested redundancy.

    If 1 lies within the tolerance of the request (1.0 itself above all), a randomized Hadamard transform
    without a fusion frame is chosen. Otherwise the cheapest sparse fusion frame of true redundancy at least 1
    within the tolerance, an exact hit with few subspaces before all; frames that need a dense complement are
    never chosen. Small dimensions offer few redundancies: if none lies within the tolerance, the nearest
    is returned, so report ``spec.redundancy`` and not the request.

    Args:
        dim: number of coordinates, at least 1.
        redundancy: requested num_coefficients / dim, from 1 to 8.
        seed: unsigned 64-bit seed of the random signs.
        tolerance: largest relative deviation from the request, in [0, 0.5].

    Returns:
        The spec; ``build_frame`` builds it.

    Raises:
        FrameError: if an argument is out of range.

    Examples:
        >>> spec = choose_frame(1024, 1.125)
        >>> spec.num_subspaces, spec.subspace_dim, spec.redundancy
        (9, 128, 1.125)
    """
    FrameSpec(FrameKind.IDENTITY, dim, seed=seed)  # refuses a dim or a seed out of range
    if not 1.0 <= redundancy <= MAX_REDUNDANCY:
        raise FrameError(f"redundancy must lie between 1 and {MAX_REDUNDANCY:g}, not be {redundancy}.")
    if not 0.0 <= tolerance <= 0.5:
        raise FrameError(f"tolerance must lie between 0 and 0.5, not be {tolerance}.")
    plain = FrameSpec(FrameKind.HADAMARD, dim, seed=seed)
    if abs(1.0 / redundancy - 1.0) <= tolerance:
        return plain
    best = _cheapest(dim, redundancy, tolerance) or _closest(dim, redundancy)
    chosen = FrameSpec(FrameKind.FUSION, dim, best.num_subspaces, 2 * best.subspace_dim, seed)
    return plain if best.deviation >= redundancy - 1.0 else chosen


def _cheapest(dim: int, redundancy: float, tolerance: float) -> _Candidate | None:
    """Search K upwards, since it is the cost, until no larger K can do better."""
    # The slack keeps an exact hit inside the range when the tolerance is zero.
    low = math.ceil(redundancy * (1.0 - tolerance) * dim / 2 - 1e-6)
    high = math.floor(redundancy * (1.0 + tolerance) * dim / 2 + 1e-6)
    best = None
    for candidate in _sparse_frames(dim, low, high, redundancy):
        if best is not None and candidate.num_subspaces > max(best.cost, SMALL_BLOCK):
            break
        if best is None or candidate.rank < best.rank:
            best = candidate
    return best


def _closest(dim: int, redundancy: float) -> _Candidate:
    """Return the cheapest of the sparse frames whose redundancy is nearest to the request."""
    target = redundancy * dim / 2
    products = range(math.ceil(dim / 2), math.ceil(2 * target) + 1)
    for product in sorted(products, key=lambda p: (abs(p - target), p)):
        candidates = list(_sparse_frames(dim, product, product, redundancy))
        if candidates:
            return min(candidates, key=lambda candidate: candidate.rank)
    raise AssertionError("unreachable: two subspaces that are the whole space always exist")


def _sparse_frames(dim: int, low: int, high: int, redundancy: float) -> Iterator[_Candidate]:
    """Yield, by ascending K, the sparse frames whose K * L lies between ``low`` and ``high``.

    Sizes are complex (L = subspace_dim / 2, N = dim / 2 rounded up); K * L >= N keeps the redundancy at
    least one, and the existence theorem demands it anyway. K = 1 is left out: it is the identity, padded
    with a zero coefficient if the dimension is odd.
    """
    N = (dim + 1) // 2
    for K in range(2, high + 1):
        for L in range(max(-(-low // K), 1), min(high // K, N) + 1):
            step = next_step(K, L, N)
            if step in (Step.BLOCK, Step.BANDED):
                yield _Candidate(K, L, step is Step.BANDED, abs(2 * K * L / dim - redundancy))
