"""Fitted codes as the rounding sees them: round a panel of columns, remember the codes, give stored tensors.

Linears that share a Hessian are stacked into one tall matrix for rounding; a coder therefore spans the rows
of several linears, each fitted on its own, and hands each its tensors back at the end.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.codes.grid import Grid, GridSpec, clip_to_grid, decode, encode, fit_grid
from framequant.codes.packing import pack_codes
from framequant.codes.sigma_delta import SigmaDeltaSpec
from framequant.codes.trellis import TrellisSpec
from framequant.errors import ConfigError
from framequant.kernels.feedback import GridTable, round_block
from framequant.quantizers.trellis_coder import TrellisCoder


class ScalarCoder:
    """Scalar grids of one or more stacked matrices of coefficients.

    Args:
        matrices: the coefficients D of each linear, (rows_i, cols), float64.
        spec: the grid, the same for all.
        backend: of ``quantize_block``; see ``framequant.kernels.feedback``.
    """

    panel = 1

    def __init__(
        self, matrices: Sequence[Float[Tensor, "rows cols"]], spec: GridSpec, backend: str = "auto"
    ) -> None:
        self._backend = backend
        self._rows = [matrix.shape[0] for matrix in matrices]
        self._grids = [fit_grid(matrix, spec) for matrix in matrices]
        self._grid = _stack(self._grids, self._rows)
        self._table = GridTable.of(self._grid, sum(self._rows))
        first = matrices[0]
        self._codes = torch.empty(sum(self._rows), first.shape[1], dtype=torch.uint8, device=first.device)

    def part(self, first: int, last: int) -> ScalarCoder:
        """A coder of some of the stacked rows; it records their codes here."""
        part = ScalarCoder.__new__(ScalarCoder)
        zeros = self._grid.zero_points
        part._backend, part._rows = self._backend, [last - first]
        part._grid = Grid(
            spec=self._grid.spec,
            levels=self._grid.levels,
            scales=self._grid.scales[first:last],
            zero_points=None if zeros is None else zeros[first:last],
        )
        part._grids = [part._grid]
        part._table = GridTable.of(part._grid, last - first)
        part._codes = self._codes[first:last]
        return part

    def codes(self, first: int, last: int) -> Int[Tensor, "rows n"]:
        """The codes recorded for some of the stacked rows."""
        return self._codes[first:last]

    def record(self, codes: Int[Tensor, "m n"]) -> None:
        """Record the codes of all stacked rows, some of them chosen elsewhere."""
        self._codes.copy_(codes)

    def clip(self, coefficients: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Clamp the stacked coefficients to the range of their grids."""
        return clip_to_grid(coefficients, self._grid)

    def quantize(self, columns: Float[Tensor, "m c"], first: int) -> Float[Tensor, "m c"]:
        """Round columns to the nearest level and record their codes."""
        codes = encode(columns, self._grid, first)
        self._codes[:, first : first + codes.shape[1]] = codes
        return decode(codes, self._grid, first, dtype=columns.dtype)

    def quantize_block(
        self,
        work: Float[Tensor, "c m"],
        factor: Float[Tensor, "c c"],
        columns: Int[Tensor, " c"],
        previous: Float[Tensor, "c m"] | None = None,
    ) -> tuple[Float[Tensor, "c m"], Float[Tensor, "c m"]]:
        """Round columns in turn with feedback among them and record their codes; see ``FeedbackCoder``."""
        block = round_block(work, factor, self._table, columns, previous=previous, backend=self._backend)
        self._codes[:, columns] = block.codes.T
        return block.values, block.solved

    def tensors(self) -> list[dict[str, Tensor]]:
        """The stored tensors of each linear, in the order in which the matrices were given."""
        result = []
        for grid, codes in zip(self._grids, self._codes.split(self._rows), strict=True):
            stored = {
                "packed_codes": pack_codes(codes, grid.spec.num_levels),
                "scales": grid.stored_scales(),
            }
            zero_points = grid.stored_zero_points()
            if zero_points is not None:
                stored["zero_points"] = zero_points
            result.append(stored)
        return result


def _stack(grids: Sequence[Grid], rows: Sequence[int]) -> Grid:
    """One grid over the rows of all; a scale per tensor is repeated for each of its rows."""
    first = grids[0]
    zeros = [
        grid.zero_points.expand(count, -1)
        for grid, count in zip(grids, rows, strict=True)
        if grid.zero_points is not None
    ]
    return Grid(
        spec=GridSpec.from_dict({**first.spec.to_dict(), "per_tensor": False}),
        levels=first.levels,
        scales=torch.cat([grid.scales.expand(count, -1) for grid, count in zip(grids, rows, strict=True)]),
        zero_points=torch.cat(zeros) if zeros else None,
    )


def make_coder(
    matrices: Sequence[Float[Tensor, "rows cols"]], spec: GridSpec | TrellisSpec | SigmaDeltaSpec
) -> ScalarCoder | TrellisCoder:
    """Fit the code that ``spec`` describes to stacked matrices of coefficients.

    Raises:
        ConfigError: a Sigma-Delta code, which is chosen without a Hessian; see ``sigma_delta_weight``.
    """
    if isinstance(spec, SigmaDeltaSpec):
        raise ConfigError(
            "Sigma-Delta codes are chosen without calibration data, not by rounding with a Hessian."
        )
    if isinstance(spec, TrellisSpec):
        return TrellisCoder(matrices, spec)
    return ScalarCoder(matrices, spec)
