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
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from framequant.errors import NumericalError


@dataclass(frozen=True)
class Wave:
    """The cells of one matrix that are rounded at one step: block row I at panel ``tick - I``.

    Attributes:
        linear: number of the matrix.
        tick: the step.
        first, last: the block rows, the last one included.
    """

    linear: int
    tick: int
    first: int
    last: int

    def cells(self, blocks: Tensor) -> Tensor:
        """View of the wave's cells, (cells, height, width), in a contiguous (blocks, height, panels, width)."""
        _, height, panels, width = blocks.shape
        stride = height * panels * width
        start = self.first * stride + (self.tick - self.first) * width
        shape = (self.last - self.first + 1, height, width)
        return blocks.as_strided(shape, (stride - width, panels * width, 1), blocks.storage_offset() + start)

    def panels(self, tensor: Tensor, dim: int) -> Tensor:
        """The wave's panels along a dimension, in the order of its block rows."""
        first, last = self.tick - self.last, self.tick - self.first
        return tensor.narrow(dim, first, last - first + 1).flip(dim)


class CellCoder(Protocol):
    """A coder that rounds cells: the pieces in which block rows and panels of columns cross."""

    panel: int

    def open_blocks(self, heights: Sequence[int]) -> None:
        """Prepare to record block rows of this many rows, for each matrix."""
        ...

    def quantize_cells(self, waves: Sequence[Wave], values: Sequence[Tensor]) -> list[Tensor]:
        """Round the cells of some waves, (cells, height, panel) each, record their codes, return the values."""
        ...


@dataclass
class BlockRows:
    """One matrix cut into block rows, and what has been rounded of it.

    Attributes:
        coefficients: D, padded to whole block rows and panels, (blocks, height, panels, width).
        above: transposed M_G above its diagonal blocks, (blocks, height, blocks · height); None without G.
        errors: D̃ - D, of the shape of ``coefficients``.
        aimed_errors: D̃ - W', likewise.
    """

    coefficients: Tensor
    above: Tensor | None
    errors: Tensor = field(init=False)
    aimed_errors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.errors = torch.zeros_like(self.coefficients)
        self.aimed_errors = torch.zeros_like(self.coefficients)

    @classmethod
    def of(
        cls, matrix: Float[Tensor, "m n"], row_upper: Float[Tensor, "m m"] | None, height: int, width: int
    ) -> BlockRows:
        """Cut a matrix into block rows of ``height`` and panels of ``width``, padding with zeros."""
        rows, cols = matrix.shape
        more_rows, more_cols = -rows % height, -cols % width
        padded = functional.pad(matrix, (0, more_cols, 0, more_rows))
        cells = padded.reshape(len(padded) // height, height, -1, width).contiguous()
        if row_upper is None:
            return cls(cells, None)
        factor = functional.pad(_strict(unit_factor(row_upper, height), height), (0, more_rows, 0, more_rows))
        return cls(cells, factor.T.reshape(len(cells), height, -1).contiguous())

    def wave(self, linear: int, tick: int) -> Wave | None:
        """The cells to round at a step, or None when there are none."""
        blocks, _, panels, _ = self.coefficients.shape
        first, last = max(0, tick - panels + 1), min(tick, blocks - 1)
        return Wave(linear, tick, first, last) if first <= last else None

    def targets(self, wave: Wave, columns: Float[Tensor, "p n w"]) -> tuple[Tensor, Tensor]:
        """W' of a wave's cells, and W' with the feedback of the columns before: what is to be rounded."""
        aimed = wave.cells(self.coefficients)
        blocks, height, panels, width = self.coefficients.shape
        rows = slice(wave.first, wave.last + 1)
        if self.above is not None:
            others = wave.panels(self.errors.view(blocks * height, panels, width), 1).transpose(0, 1)
            aimed = aimed - torch.bmm(self.above[rows], others)
        done = self.aimed_errors.view(blocks, height, panels * width)[rows]
        return aimed, aimed - torch.bmm(done, wave.panels(columns, 0))

    def record(self, wave: Wave, aimed: Tensor, values: Tensor) -> None:
        """Keep the errors of rounded cells."""
        wave.cells(self.errors).copy_(values - wave.cells(self.coefficients))
        wave.cells(self.aimed_errors).copy_(values - aimed)

    def rounded(self, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        """D̃ without the padding."""
        blocks, height, panels, width = self.coefficients.shape
        matrix = (self.errors + self.coefficients).reshape(blocks * height, panels * width)
        return matrix[:rows, :cols]


def _strict(factor: Tensor, block: int) -> Tensor:
    """A block triangular factor with its diagonal blocks set to zero, in place."""
    for first in range(0, len(factor), block):
        factor[first : first + block, first : first + block] = 0
    return factor


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
    blocks = diagonal_blocks(upper, block)
    columns = functional.pad(factor, (0, -n % block)).reshape(n, -1, block)
    return torch.bmm(columns.transpose(0, 1), blocks).transpose(0, 1).reshape(n, -1)[:, :n].contiguous()


def diagonal_blocks(matrix: Float[Tensor, "n n"], block: int) -> Float[Tensor, "blocks b b"]:
    """The square blocks on the diagonal; the last one is filled up with the identity."""
    n = matrix.shape[0]
    more = -n % block
    padded = functional.pad(matrix, (0, more, 0, more))
    padded.diagonal()[n:] = 1
    count = len(padded) // block
    return padded.reshape(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def feedback_loss(upper: Float[Tensor, "n n"], block: int) -> float:
    """Sum of the traces of the block LDL factorisation's diagonal: the loss of unit errors under feedback.

    Args:
        upper: U of ``feedback_factor``.
        block: columns that are rounded without feedback among them.
    """
    blocks = diagonal_blocks(upper, block)
    eye = torch.eye(block, dtype=upper.dtype, device=upper.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, eye, upper=True)
    return float(inverse.square().sum()) - (-len(upper) % block)


def round_two_sided(
    matrices: Sequence[Float[Tensor, "m n"]],
    upper: Float[Tensor, "n n"],
    row_uppers: Sequence[Float[Tensor, "m m"] | None],
    coder: CellCoder,
    height: int,
) -> Float[Tensor, "m_total n"]:
    """Round matrices that share their inputs, with feedback on both sides.

    Args:
        matrices: D of each linear, float64.
        upper: U of the damped H, see ``feedback_factor``.
        row_uppers: U of each linear's damped G; None for no feedback between its rows.
        coder: rounds cells of whole tiles.
        height: rows of a block row, a multiple of the tiles' height; without G all rows are one.

    Returns:
        The rounded values, stacked.

    Raises:
        NumericalError: a rounded value is not finite.

    Cost:
        About 2 m n² + 2 n m² multiply-adds in ``panels + blocks`` steps.
    """
    width = coder.panel
    heights = [
        -(-len(matrix) // height) * height if row_upper is None else height
        for matrix, row_upper in zip(matrices, row_uppers, strict=True)
    ]
    parts = [
        BlockRows.of(matrix, row_upper, high, width)
        for matrix, row_upper, high in zip(matrices, row_uppers, heights, strict=True)
    ]
    columns = _panel_columns(upper, width)
    coder.open_blocks(heights)
    for tick in range(max(sum(part.coefficients.shape[0:3:2]) for part in parts) - 1):
        _round_tick(parts, columns, coder, tick)
    if not all(bool(torch.isfinite(part.aimed_errors).all()) for part in parts):
        raise NumericalError("rounding produced NaN or infinity; raise the damping or check the weights.")
    return torch.cat([part.rounded(*matrix.shape) for part, matrix in zip(parts, matrices, strict=True)])


def _panel_columns(upper: Tensor, width: int) -> Float[Tensor, "panels n width"]:
    """M_H above its diagonal blocks, by panel of its columns, padded to whole panels."""
    more = -len(upper) % width
    padded = functional.pad(_strict(unit_factor(upper, width), width), (0, more, 0, more))
    return padded.reshape(len(padded), -1, width).transpose(0, 1).contiguous()


def _round_tick(parts: list[BlockRows], columns: Tensor, coder: CellCoder, tick: int) -> None:
    waves = [wave for wave in (part.wave(i, tick) for i, part in enumerate(parts)) if wave is not None]
    pairs = [parts[wave.linear].targets(wave, columns) for wave in waves]
    values = coder.quantize_cells(waves, [target for _, target in pairs])
    for wave, (aimed, _), value in zip(waves, pairs, values, strict=True):
        parts[wave.linear].record(wave, aimed, value)
