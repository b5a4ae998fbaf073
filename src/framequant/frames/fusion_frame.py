"""Tight fusion frames of R^d, stored and applied as sparsely as their construction allows.

Real form: a complex tight fusion frame (k, l/2, d/2) with every entry t replaced by ``[[Re t, -Im t],
[Im t, Re t]]``, so that coordinates 2n and 2n + 1 are the real and imaginary part of complex coordinate n.
An odd dimension is embedded in the next even one: the restriction of a Parseval frame to the first
coordinates is still Parseval, though its subspaces are then no longer orthonormal projections.

Coefficients are ordered *group-major*: by row of the Spectral Tetris matrix (the group), then by subspace,
then re/im. Every group reads a run of consecutive coordinates and all groups share one small block, so this
order needs no transposition; ``subspace_indices`` says where a subspace lies in it.

Three storage forms, from cheap to dense, share one signature. Imports no other module of ours but
``operator``, ``spectral_tetris`` and ``errors``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from framequant.errors import FrameError
from framequant.frames.operator import (
    MAX_COEFFICIENTS,
    MAX_DENSE_ENTRIES,
    MAX_DIM,
    Constants,
    LinearStage,
    check_last_axis,
)
from framequant.frames.spectral_tetris import (
    Step,
    construction_steps,
    dense_isometry,
    modulation,
    spectral_tetris,
)

MAX_COMPLEMENT_WORK = 1 << 40
"""Bound on the cubed sizes of the QR factorisations of a dense complement: some minutes on one processor."""


class FusionFrame:
    """Parseval analysis operator of a tight fusion frame: k subspaces of dimension l in R^d.

    Subspace j is spanned by rows ``subspace_indices(j)`` of ``T``, which times ``sqrt(k l / d)`` are
    orthonormal for even d.

    Attributes:
        dim: number of coordinates d.
        num_subspaces: k.
        subspace_dim: l.
        num_coefficients: k l.
        steps: the constructions used, outermost first; a single one unless complements were needed.

    References:
        Casazza, Fickus, Mixon, Wang, Zhou 2011; Adepu, Zeng, Zhang, Singh 2024, arXiv 2403.06082.
    """

    def __init__(self, dim: int, num_subspaces: int, subspace_dim: int) -> None:
        """Build the frame.

        Args:
            dim: d.
            num_subspaces: k.
            subspace_dim: l, even.

        Raises:
            FrameError: if no such tight fusion frame exists (the message names a near one that does), or it
                exists only in a dense form too large to build.
        """
        self.dim, self.num_subspaces, self.subspace_dim = dim, num_subspaces, subspace_dim
        self.num_coefficients = num_subspaces * subspace_dim
        if not (0 < dim <= MAX_DIM and num_subspaces > 0 and 0 < self.num_coefficients <= MAX_COEFFICIENTS):
            raise FrameError(f"sizes out of range: dim={dim}, {num_subspaces=}, {subspace_dim=}.")
        sizes = (num_subspaces, subspace_dim // 2, _even(dim) // 2)
        steps = [] if subspace_dim % 2 else construction_steps(*sizes)
        if not steps:
            raise FrameError(
                f"no tight fusion frame of {num_subspaces} subspaces of dimension {subspace_dim} in "
                f"dimension {dim} can be built;{_nearest_existing(dim, num_subspaces, subspace_dim)}"
            )
        self.steps = tuple(step for step, _, _ in steps)
        self._form = _build_form(*sizes, self.steps)

    @property
    def redundancy(self) -> float:
        """The true redundancy k l / d."""
        return self.num_coefficients / self.dim

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector, in one direction."""
        return self._form.multiply_adds

    def subspace_indices(self, subspace: int) -> Int[Tensor, " subspace_dim"]:
        """Return the positions of one subspace's coefficients in the group-major order.

        Args:
            subspace: j, from 0 to k - 1.

        Returns:
            The l positions, ascending: ``2 (k i + j) + {0, 1}`` for group i.

        Raises:
            FrameError: if there is no such subspace.
        """
        if not 0 <= subspace < self.num_subspaces:
            raise FrameError(f"subspace must lie between 0 and {self.num_subspaces - 1}, not be {subspace}.")
        positions = torch.arange(self.num_coefficients, device="cpu").reshape(-1, self.num_subspaces, 2)
        return positions[:, subspace].flatten()

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... coefficients"]:
        """Apply ``T`` to the last axis.

        Args:
            x: any leading shape, any floating dtype; computed in that dtype.

        Returns:
            A new tensor ``(..., k l)`` in group-major order.

        Raises:
            FrameError: if the last axis is not ``dim`` long or the dtype is not floating.
        """
        check_last_axis(x, self.dim, "analysis")
        return self._form.analysis(torch.nn.functional.pad(x, (0, 1)) if self.dim % 2 else x)

    def synthesis(self, coefficients: Float[Tensor, "... coefficients"]) -> Float[Tensor, "... dim"]:
        """Apply ``T^T``, adjoint and left inverse, to the last axis; errors as for ``analysis``."""
        check_last_axis(coefficients, self.num_coefficients, "synthesis")
        return self._form.synthesis(coefficients)[..., : self.dim]

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "coefficients dim"]:
        """Return ``T`` densely, assembled from its definition."""
        return self._form.as_matrix()[:, : self.dim].to(dtype=dtype, device=device)


class _BlockForm:
    """``I_groups`` Kronecker one block: l divides d, and every group reads coordinates of its own."""

    def __init__(self, K: int, L: int, N: int) -> None:
        self.dim, self.num_coefficients, self.groups = 2 * N, 2 * K * L, L
        self._constants = Constants(block=shared_block(K, N // L))

    @property
    def multiply_adds(self) -> int:
        return self.groups * self._constants.originals["block"].numel()

    def analysis(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, self.dim // self.groups))
        return (grouped @ self._constants.like(x)["block"].mT).flatten(-2)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        grouped = coefficients.unflatten(-1, (self.groups, self.num_coefficients // self.groups))
        return (grouped @ self._constants.like(coefficients)["block"]).flatten(-2)

    def as_matrix(self) -> Tensor:
        block = self._constants.originals["block"]
        return torch.kron(torch.eye(self.groups, dtype=block.dtype, device="cpu"), block)


class _BandedForm:
    """Spectral Tetris: overlapping windows of coordinates, weighted, then one common block.

    Row i, modulated, is the block times the window that starts at the row's first column: shifting the
    phase by that column only turns the row's coefficients by a unit factor, and leaves the subspaces alone.
    Windows overlap by at most two columns, so each coordinate is read once or twice: synthesis gathers these
    two (the second with weight zero where there is but one) instead of scattering, and stays deterministic.
    """

    def __init__(self, K: int, L: int, N: int) -> None:
        self.dim, self.num_coefficients, self.groups = 2 * N, 2 * K * L, L
        tetris = spectral_tetris(L, N)
        width = tetris.weights.shape[1]
        columns = np.minimum(tetris.starts[:, None] + np.arange(width), N - 1)
        slots, slot_weights = _slots_of_columns(columns, tetris.weights, N)
        self._constants = Constants(
            block=shared_block(K, width),
            weights=torch.from_numpy(np.repeat(tetris.weights, 2, axis=1)),
            columns=_coordinates(columns),
            first_slot=_coordinates(slots[:, 0]),
            second_slot=_coordinates(slots[:, 1]),
            first_weight=torch.from_numpy(np.repeat(slot_weights[:, 0], 2)),
            second_weight=torch.from_numpy(np.repeat(slot_weights[:, 1], 2)),
        )

    @property
    def multiply_adds(self) -> int:
        constants = self._constants.originals
        return self.groups * constants["block"].numel() + constants["weights"].numel()

    def analysis(self, x: Tensor) -> Tensor:
        constants = self._constants.like(x)
        windows = x.index_select(-1, constants["columns"]).unflatten(-1, constants["weights"].shape)
        return ((windows * constants["weights"]) @ constants["block"].mT).flatten(-2)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        constants = self._constants.like(coefficients)
        grouped = coefficients.unflatten(-1, (self.groups, self.num_coefficients // self.groups))
        windows = (grouped @ constants["block"]).flatten(-2)
        first = windows.index_select(-1, constants["first_slot"]) * constants["first_weight"]
        second = windows.index_select(-1, constants["second_slot"]) * constants["second_weight"]
        return first + second

    def as_matrix(self) -> Tensor:
        constants = self._constants.originals
        block, weights = constants["block"], constants["weights"]
        columns = constants["columns"].reshape(weights.shape)
        matrix = block.new_zeros(self.groups, block.shape[0], self.dim)
        for group in range(self.groups):
            matrix[group].index_add_(1, columns[group], block * weights[group])
        return matrix.reshape(self.num_coefficients, self.dim)


class _DenseForm:
    """A dense matrix: frames that exist only through spatial and Naimark complements."""

    def __init__(self, K: int, L: int, N: int) -> None:
        self.dim, self.num_coefficients = 2 * N, 2 * K * L
        group_major = dense_isometry(K, L, N).swapaxes(0, 1).reshape(K * L, N)
        self._constants = Constants(matrix=_real_form(group_major))

    @property
    def multiply_adds(self) -> int:
        return self.dim * self.num_coefficients

    def analysis(self, x: Tensor) -> Tensor:
        return x @ self._constants.like(x)["matrix"].mT

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self._constants.like(coefficients)["matrix"]

    def as_matrix(self) -> Tensor:
        return self._constants.originals["matrix"].clone()


_Form = _BlockForm | _BandedForm | _DenseForm


def _build_form(K: int, L: int, N: int, steps: tuple[Step, ...]) -> _Form:
    """Choose the storage form, refusing first what would not fit in memory or time."""
    width = {Step.BLOCK: N // L, Step.BANDED: -(-N // L) + 2}.get(steps[0], K * L)
    height = K if steps[0] in (Step.BLOCK, Step.BANDED) else N
    work = (K * L) ** 3 * (len(steps) - 1)
    if 4 * width * height > MAX_DENSE_ENTRIES or work > MAX_COMPLEMENT_WORK:
        raise FrameError(
            f"the tight fusion frame of {K} subspaces of dimension {2 * L} in dimension {2 * N} exists, but "
            f"its dense block is too large to build; choose_frame picks a sparse one of near redundancy."
        )
    if steps[0] is Step.BLOCK:
        return _BlockForm(K, L, N)
    return _BandedForm(K, L, N) if steps[0] is Step.BANDED else _DenseForm(K, L, N)


def _real_form(entries: NDArray[np.complex128]) -> Tensor:
    """Replace each complex entry t of an M x N matrix by ``[[Re t, -Im t], [Im t, Re t]]``: 2M x 2N."""
    real, imaginary = entries.real, entries.imag
    rows = np.stack([np.stack([real, -imaginary], -1), np.stack([imaginary, real], -1)], axis=1)
    return torch.from_numpy(rows.reshape(2 * entries.shape[0], 2 * entries.shape[1]))


def shared_block(K: int, width: int) -> Tensor:
    """The block that all groups of K complex subspaces share, (2 K, 2 width): it depends on these two alone."""
    return _real_form(modulation(K, width))


def _coordinates(columns: NDArray[np.int64]) -> Tensor:
    """Flatten complex indices into pairs of real ones: n becomes 2n, 2n + 1."""
    return torch.from_numpy((2 * columns.reshape(-1, 1) + np.arange(2)).reshape(-1))


def _slots_of_columns(
    columns: NDArray[np.int64], weights: NDArray[np.float64], N: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Invert the windows: for each column, the one or two window slots that read it, and their weights."""
    slots = np.zeros((N, 2), dtype=np.int64)
    slot_weights = np.zeros((N, 2))
    used = np.flatnonzero(weights)
    owners = columns.reshape(-1)[used]
    order = np.argsort(owners, kind="stable")
    used, owners = used[order], owners[order]
    is_second = np.zeros(len(used), dtype=np.int64)
    is_second[1:] = owners[1:] == owners[:-1]
    slots[owners, is_second] = used
    slot_weights[owners, is_second] = weights.reshape(-1)[used]
    return slots, slot_weights


def _even(dim: int) -> int:
    return dim + dim % 2


def _nearest_existing(dim: int, num_subspaces: int, subspace_dim: int) -> str:
    """Name the existing frame of the nearest number of coefficients, as the end of an error message."""
    wanted = num_subspaces * subspace_dim
    best = min(
        _existing_candidates(dim, num_subspaces, subspace_dim),
        key=lambda sizes: (abs(sizes[0] * sizes[1] - wanted), abs(sizes[1] - subspace_dim), sizes),
    )
    return f" the nearest that exists has {best[0]} subspaces of dimension {best[1]}."


def _existing_candidates(dim: int, num_subspaces: int, subspace_dim: int) -> Iterator[tuple[int, int]]:
    """Yield existing sizes around those given: l near the one asked for, k near it or just what l needs."""
    N = _even(dim) // 2
    centre = min(max(subspace_dim // 2, 1), N)
    for L in range(max(centre - 8, 1), min(centre + 8, N) + 1):
        least = -(-N // L)
        around = {num_subspaces + offset for offset in range(-4, 5)} | {least, least + 1, least + 2}
        for K in sorted(around):
            if construction_steps(K, L, N):
                yield K, 2 * L


_: type[LinearStage] = FusionFrame
