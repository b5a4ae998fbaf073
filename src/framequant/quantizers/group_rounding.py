"""Round the coefficients of linears that share their inputs, by the way that their settings and code ask for.

Must not import models, layers or frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.config import ColumnOrder, FrameQuantConfig, Rounding
from framequant.memory import free_bytes
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import FeedbackFactor, damped_, feedback_factor
from framequant.quantizers.refine import refine_codes
from framequant.quantizers.rounding import round_ldlq, round_nearest
from framequant.quantizers.sharing import Shares, even_counts, own_rows
from framequant.quantizers.trellis_coder import TrellisCoder
from framequant.quantizers.two_sided import round_two_sided, unit_factor

#: Rows are rounded in pieces of at most so many bytes in float64, and of at most this share of the free memory:
#: rounding works on eight such copies.
PIECE_BYTES = 1 << 30
PIECE_SHARE = 1 / 32


def round_group(
    matrices: list[Float[Tensor, "m n"]],
    hessian: Float[Tensor, "n n"] | Callable[[], Float[Tensor, "n n"]],
    grams: Sequence[Float[Tensor, "m m"] | None],
    coder: ScalarCoder | TrellisCoder,
    config: FrameQuantConfig,
    name: str,
    share: Shares | None = None,
    consume: bool = False,
    spread: Int[Tensor, " n"] | None = None,
    factor: Callable[[], FeedbackFactor] | None = None,
) -> tuple[Float[Tensor, "m_total n"], FeedbackFactor | None]:
    """Choose the codes of a group.

    Args:
        matrices: D of each linear, float64.
        hessian: H' of their shared coefficients, or what makes it anew at each call, see ``feedback_factor``.
        grams: of each linear's output gradients, in its output frame; None for no feedback between its rows.
        coder: fitted to the matrices; it records the codes.
        config: ``rounding``, dampings, order and sweeps.
        name: of the first linear, for messages.
        share: deals the rows of a scalar code without feedback between rows out to several processes.
        consume: whether the list ``matrices`` may be emptied, where the caller needs them no more.
        spread: the order of columns for ``column_order = "spread"``; None for as they lie.
        factor: gives what ``ordered_factor`` made of the same, for a scalar code without feedback between rows, and
            keeps it no longer.

    Returns:
        The rounded values, stacked, and the factor of H' (None for nearest rounding); it may have lost its ``upper``.
    """
    stacked = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    if config.rounding is Rounding.NEAREST:
        return round_nearest(_clipped(stacked, coder, config), coder), None
    uppers = [
        None if gram is None else feedback_factor(gram, config.output_damping, name).upper for gram in grams
    ]
    if isinstance(coder, TrellisCoder):
        joint = feedback_factor(hessian, config.damping, name)
        return round_two_sided(matrices, joint.upper, uppers, coder, config.output_block), joint
    make = hessian if callable(hessian) else hessian.clone
    order = _column_order(make, config, spread)
    order = None if order is None else order.to(stacked.device)
    ordered = _in_order(make, order)
    if all(upper is None for upper in uppers):
        if consume:
            matrices.clear()
        take = factor or (lambda: feedback_factor(ordered, config.damping, name))
        return _round_rows(stacked, make, take, order, coder, config, share)
    joint = feedback_factor(ordered, config.damping, name)
    smooth = damped_(make(), joint.damping)

    def columns(part: Tensor, rows: ScalarCoder) -> Tensor:
        rounded = round_ldlq(_clipped(part, rows, config), joint.upper, rows, order)
        return refine_codes(part, rounded, smooth, rows, config.sweeps)

    pieces, first = [], 0
    for matrix, upper in zip(matrices, uppers, strict=True):
        rows = coder.part(first, first + len(matrix))
        pieces.append(_round_block_rows(matrix, upper, rows, config.output_block, columns))
        first += len(matrix)
    return torch.cat(pieces), joint


def ordered_factor(
    hessian: Callable[[], Float[Tensor, "n n"]],
    config: FrameQuantConfig,
    name: str,
    spread: Int[Tensor, " n"] | None,
) -> FeedbackFactor:
    """The factor through which ``round_group`` feeds errors forward, for a scalar code; arguments are those."""
    order = _column_order(hessian, config, spread)
    return feedback_factor(_in_order(hessian, order), config.damping, name)


def _column_order(
    make: Callable[[], Tensor], config: FrameQuantConfig, spread: Tensor | None
) -> Tensor | None:
    if config.column_order is ColumnOrder.DESCENDING:
        return torch.argsort(make().diagonal(), descending=True, stable=True)
    return spread if config.column_order is ColumnOrder.SPREAD else None


def _in_order(make: Callable[[], Tensor], order: Tensor | None) -> Callable[[], Tensor]:
    return make if order is None else lambda: make()[order][:, order]


def _round_rows(
    stacked: Tensor,
    make: Callable[[], Tensor],
    take_factor: Callable[[], FeedbackFactor],
    order: Tensor | None,
    coder: ScalarCoder,
    config: FrameQuantConfig,
    share: Shares | None,
) -> tuple[Tensor, FeedbackFactor]:
    """Round rows that do not interact, a piece of them at a time; with a share, those that are ours.

    The factor's matrix is dropped before H' is made again: both together are what takes the most memory.
    """
    counts = even_counts(len(stacked), 1 if share is None else share.size)
    own = own_rows(counts, 0 if share is None else share.rank)
    first, last = own.start, own.stop
    factor = take_factor()
    rounded = torch.empty_like(stacked[first:last])
    pieces = _pieces(first, last, stacked)
    for a, b in pieces:
        part = coder.part(a, b)
        rounded[a - first : b - first] = round_ldlq(
            _clipped(stacked[a:b], part, config), factor.upper, part, order
        )
    factor = replace(factor, upper=factor.upper.new_empty(0, 0))
    if config.sweeps:
        smooth = damped_(make(), factor.damping)
        for a, b in pieces:
            done = rounded[a - first : b - first]
            done.copy_(refine_codes(stacked[a:b], done, smooth, coder.part(a, b), config.sweeps))
    if share is None:
        return rounded, factor
    coder.record(share.gather_rows(coder.codes(first, last), counts))
    return share.gather_rows(rounded, counts), factor


def _pieces(first: int, last: int, matrix: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of about the same number, small enough for memory; they decide nothing but the time."""
    limit = max(min(PIECE_BYTES, int(free_bytes(matrix.device) * PIECE_SHARE)), 8 * matrix.shape[1])
    count = max(-(-(last - first) * matrix.shape[1] * 8 // limit), 1)
    count = min(count, max(last - first, 1))
    edges = [first + (last - first) * index // count for index in range(count + 1)]
    return list(itertools.pairwise(edges))


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
