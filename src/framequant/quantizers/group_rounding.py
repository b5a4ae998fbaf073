"""Round the coefficients of linears that share their inputs, by the way that their settings and code ask for.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.config import ColumnOrder, FrameQuantConfig, Rounding
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import FeedbackFactor, damped, feedback_factor
from framequant.quantizers.refine import refine_codes
from framequant.quantizers.rounding import round_ldlq, round_nearest
from framequant.quantizers.trellis_coder import TrellisCoder
from framequant.quantizers.two_sided import round_two_sided, unit_factor


class RowShare(Protocol):
    """Deals rows out to several processes."""

    def bounds(self, rows: int) -> tuple[int, int]:
        """First row, and one past the last, that is rounded here."""
        ...

    def gather_rows(self, rows: Tensor, total: int) -> Tensor:
        """All ``total`` rows from every process's share."""
        ...


def round_group(
    matrices: Sequence[Float[Tensor, "m n"]],
    hessian: Float[Tensor, "n n"],
    grams: Sequence[Float[Tensor, "m m"] | None],
    coder: ScalarCoder | TrellisCoder,
    config: FrameQuantConfig,
    name: str,
    share: RowShare | None = None,
) -> tuple[Float[Tensor, "m_total n"], FeedbackFactor | None]:
    """Choose the codes of a group.

    Args:
        matrices: D of each linear, float64.
        hessian: H' of their shared coefficients.
        grams: of each linear's output gradients, in its output frame; None for no feedback between its rows.
        coder: fitted to the matrices; it records the codes.
        config: ``rounding``, dampings, order and sweeps.
        name: of the first linear, for messages.
        share: deals the rows of a scalar code without feedback between rows out to several processes.

    Returns:
        The rounded values, stacked, and the factor of H' (None for nearest rounding).
    """
    stacked = torch.cat(list(matrices))
    if config.rounding is Rounding.NEAREST:
        return round_nearest(_clipped(stacked, coder, config), coder), None
    uppers = [
        None if gram is None else feedback_factor(gram, config.output_damping, name).upper for gram in grams
    ]
    if isinstance(coder, TrellisCoder):
        factor = feedback_factor(hessian, config.damping, name)
        return round_two_sided(matrices, factor.upper, uppers, coder, config.output_block), factor
    order = None
    if config.column_order is ColumnOrder.DESCENDING:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    ordered = hessian if order is None else hessian[order][:, order]
    factor = feedback_factor(ordered, config.damping, name)
    smooth = damped(hessian, factor.damping)

    def columns(part: Tensor, rows: ScalarCoder) -> Tensor:
        rounded = round_ldlq(_clipped(part, rows, config), factor.upper, rows, order)
        return refine_codes(part, rounded, smooth, rows, config.sweeps)

    if all(upper is None for upper in uppers):
        return _shared(stacked, coder, columns, share), factor
    pieces, first = [], 0
    for matrix, upper in zip(matrices, uppers, strict=True):
        rows = coder.part(first, first + len(matrix))
        pieces.append(_round_block_rows(matrix, upper, rows, config.output_block, columns))
        first += len(matrix)
    return torch.cat(pieces), factor


def _shared(
    stacked: Tensor,
    coder: ScalarCoder,
    columns: Callable[[Tensor, ScalarCoder], Tensor],
    share: RowShare | None,
) -> Tensor:
    """Round all rows; with a share, some of them, and take the others' values and codes from where they are."""
    if share is None:
        return columns(stacked, coder)
    first, last = share.bounds(len(stacked))
    rounded = columns(stacked[first:last], coder.part(first, last))
    coder.record(share.gather_rows(coder.codes(first, last), len(stacked)))
    return share.gather_rows(rounded, len(stacked))


def _round_block_rows(
    matrix: Tensor,
    upper: Tensor | None,
    coder: ScalarCoder,
    height: int,
    columns: Callable[[Tensor, ScalarCoder], Tensor],
) -> Tensor:
    """Round block rows one after the other, each towards what makes up for those above; see ``two_sided``."""
    if upper is None:
        return columns(matrix, coder)
    factor = unit_factor(upper, height)
    errors = torch.zeros_like(matrix)
    for first in range(0, len(matrix), height):
        last = min(first + height, len(matrix))
        aimed = matrix[first:last] - factor[:first, first:last].T @ errors[:first]
        errors[first:last] = columns(aimed, coder.part(first, last)) - matrix[first:last]
    return matrix + errors


def _clipped(coefficients: Tensor, coder: ScalarCoder | TrellisCoder, config: FrameQuantConfig) -> Tensor:
    return coder.clip(coefficients) if config.clip_coefficients else coefficients
