"""Error feedback on both sides: from column to column through H, and from row to row through G.

With H the second moment of a linear's inputs and G that of its output gradients, the loss of a rounding error E
is ``tr(G E H Eᵀ)``. Factor ``H = R Rᵀ`` and ``G = S Sᵀ`` with upper triangular R and S: the loss is
``‖Sᵀ E R‖²``, and entry (i, j) of that product holds only errors of rows up to i and columns up to j. So a
tile that is rounded after all tiles above it and left of it can make up for what they did. With M the factors
made unit on their diagonal blocks, block row I is rounded by ordinary LDLQ towards::

    W'_I = W_I - Σ_{A<I} M_G[A, I]ᵀ E_A

Its panel J needs only panel J of the rows above, so all block rows run at once, each one panel behind the one
above it: ``panels + blocks - 1`` steps in all.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from framequant.errors import NumericalError


class CellCoder(Protocol):
    """A coder that rounds cells, pieces of block rows and panels, anywhere in its stacked matrices."""

    panel: int

    def quantize_cells(
        self,
        values: Float[Tensor, "cells rows cols"],
        linear: Int[Tensor, " cells"],
        block_rows: Int[Tensor, " cells"],
        panels: Int[Tensor, " cells"],
    ) -> Float[Tensor, "cells rows cols"]:
        """Round cells of one height, record their codes, return the values."""
        ...


@dataclass
class BlockRows:
    """One matrix cut into block rows, and what has been rounded of it.

    Attributes:
        coefficients: D, padded to whole block rows and panels, (blocks, height, panels, width).
        row_factor: M_G transposed without its diagonal: (blocks, height, blocks · height).
        errors: D̃ - D, (blocks · height, panels, width).
        aimed_errors: D̃ - W', (blocks, height, panels · width).
    """

    coefficients: Tensor
    row_factor: Tensor
    errors: Tensor = field(init=False)
    aimed_errors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        blocks, height, panels, width = self.coefficients.shape
        self.errors = self.coefficients.new_zeros((blocks * height, panels, width))
        self.aimed_errors = self.coefficients.new_zeros((blocks, height, panels * width))

    @classmethod
    def of(
        cls, matrix: Float[Tensor, "m n"], row_factor: Float[Tensor, "m m"], height: int, width: int
    ) -> BlockRows:
        """Cut a matrix into block rows of ``height`` and panels of ``width``, padding with zeros."""
        rows, cols = matrix.shape
        more_rows, more_cols = -rows % height, -cols % width
        padded = functional.pad(matrix, (0, more_cols, 0, more_rows))
        factor = functional.pad(row_factor, (0, more_rows, 0, more_rows))
        blocks = len(padded) // height
        above = factor.T.reshape(blocks, height, -1).clone()
        for block in range(blocks):
            above[block, :, block * height : (block + 1) * height] = 0
        return cls(padded.reshape(blocks, height, -1, width), above)

    def active(self, tick: int) -> Int[Tensor, " cells"]:
        """Block rows that have a panel to round at this step; block I is at panel ``tick - I``."""
        blocks, _, panels, _ = self.coefficients.shape
        first, last = max(0, tick - panels + 1), min(tick, blocks - 1)
        return torch.arange(first, max(last + 1, first), device=self.coefficients.device)

    def targets(
        self, rows: Int[Tensor, " cells"], panels: Int[Tensor, " cells"], columns: Float[Tensor, "p n w"]
    ) -> tuple[Tensor, Tensor]:
        """W' of cells, and W' with the feedback of the columns before: what is to be rounded."""
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        above = torch.bmm(self.row_factor[part], self.errors[:, panels].transpose(0, 1))
        aimed = self.coefficients[rows, :, panels] - above
        return aimed, aimed - torch.bmm(self.aimed_errors[part], columns[panels])

    def record(
        self,
        rows: Int[Tensor, " cells"],
        panels: Int[Tensor, " cells"],
        aimed: Float[Tensor, "cells h w"],
        values: Float[Tensor, "cells h w"],
    ) -> None:
        """Keep the errors of rounded cells."""
        blocks, height, count, width = self.coefficients.shape
        self.errors.view(blocks, height, count, width)[rows, :, panels] = (
            values - self.coefficients[rows, :, panels]
        )
        self.aimed_errors.view(blocks, height, count, width)[rows, :, panels] = values - aimed

    def rounded(self, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        """D̃ without the padding."""
        blocks, height, count, width = self.coefficients.shape
        matrix = self.errors.view(blocks, height, count, width) + self.coefficients
        return matrix.reshape(blocks * height, count * width)[:rows, :cols]


def unit_factor(upper: Float[Tensor, "n n"], block: int) -> Float[Tensor, "n n"]:
    """M = S blockdiag(S)⁻¹ of ``S = upper⁻¹``, from U with ``matrix⁻¹ = Uᵀ U``: unit on its diagonal blocks.

    Args:
        upper: U of ``feedback_factor``, float64.
        block: rows of a diagonal block; the last one may be smaller.

    Returns:
        M, block upper triangular with identity blocks on the diagonal, float64.
    """
    n = upper.shape[0]
    eye = torch.eye(n, dtype=upper.dtype, device=upper.device)
    factor = torch.linalg.solve_triangular(upper, eye, upper=True)
    for first in range(0, n, block):
        part = slice(first, min(first + block, n))
        factor[:, part] = factor[:, part] @ upper[part, part]
        factor[part, part] = eye[part, part]
    return factor


def round_two_sided(
    matrices: Sequence[Float[Tensor, "m n"]],
    upper: Float[Tensor, "n n"],
    row_uppers: Sequence[Float[Tensor, "m m"]],
    coder: CellCoder,
    height: int,
) -> Float[Tensor, "m_total n"]:
    """Round matrices that share their inputs, with feedback on both sides.

    Args:
        matrices: D of each linear, float64.
        upper: U of the damped H, see ``feedback_factor``.
        row_uppers: U of each linear's damped G.
        coder: rounds cells of whole tiles.
        height: rows of a block row, a multiple of the tiles' height.

    Returns:
        The rounded values, stacked.

    Raises:
        NumericalError: a rounded value is not finite.

    Cost:
        About m n² + n m² multiply-adds.
    """
    n, width = upper.shape[0], coder.panel
    parts = [
        BlockRows.of(matrix, unit_factor(row_upper, height), height, width)
        for matrix, row_upper in zip(matrices, row_uppers, strict=True)
    ]
    columns = _panel_columns(upper, width)
    ticks = max(sum(part.coefficients.shape[0:3:2]) for part in parts) - 1
    for tick in range(ticks):
        _round_tick(parts, columns, coder, tick)
    rounded = torch.cat([part.rounded(len(matrix), n) for part, matrix in zip(parts, matrices, strict=True)])
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError("rounding produced NaN or infinity; raise the damping or check the weights.")
    return rounded


def _panel_columns(upper: Tensor, width: int) -> Float[Tensor, "panels n width"]:
    """M_H without its diagonal blocks, by panel of its columns, padded to whole panels."""
    n = upper.shape[0]
    factor = unit_factor(upper, width)
    for first in range(0, n, width):
        factor[first : first + width, first : first + width] = 0
    more = -n % width
    padded = functional.pad(factor, (0, more, 0, more))
    return padded.reshape(n + more, -1, width).transpose(0, 1).contiguous()


def _round_tick(parts: list[BlockRows], columns: Tensor, coder: CellCoder, tick: int) -> None:
    cells = []
    for number, part in enumerate(parts):
        rows = part.active(tick)
        if len(rows):
            panels = tick - rows
            cells.append((number, rows, panels, *part.targets(rows, panels, columns)))
    linear = torch.cat([torch.full_like(rows, number) for number, rows, *_ in cells])
    values = coder.quantize_cells(
        torch.cat([cell[4] for cell in cells]),
        linear,
        torch.cat([cell[1] for cell in cells]),
        torch.cat([cell[2] for cell in cells]),
    )
    pieces = values.split([len(cell[1]) for cell in cells])
    for (number, rows, panels, aimed, _), piece in zip(cells, pieces, strict=True):
        parts[number].record(rows, panels, aimed, piece)
