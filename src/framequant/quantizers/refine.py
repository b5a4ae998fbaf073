"""Improve chosen codes: cyclic coordinate descent on the loss that LDLQ lowers greedily.

LDLQ rounds a column once, before it knows the errors of those after it. A sweep visits the columns again:
with all others held, the loss tr((D̃ - D) H (D̃ - D)ᵀ) is a parabola in each coefficient of column j whose
minimum lies at ``D̃_j - G_j / H_jj``, G = (D̃ - D) H, so the nearest level to that is its best value.

Must not import models, layers or frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import NumericalError
from framequant.quantizers.rounding import BLOCK_COLUMNS, FeedbackCoder


def refine_codes(
    coefficients: Float[Tensor, "m n"],
    rounded: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    coder: FeedbackCoder,
    sweeps: int,
) -> Float[Tensor, "m n"]:
    """Requantize every column in turn against all others, ``sweeps`` times over; the loss never rises.

    Stops early when a sweep changes nothing: then no single code can be changed for the better.

    Args:
        coefficients: D, what the values should be, float64. Better not clipped to the grid: an error that no
            level can take away is made up for by the other columns.
        rounded: D̃, values of the code that ``coder`` recorded.
        hessian: symmetric positive semi-definite, in the natural order of columns, float64.
        coder: the one that rounded; it records the new codes.
        sweeps: at most so many; with 0 nothing changes.

    Returns:
        The refined values, a new tensor.

    Raises:
        NumericalError: a refined value is not finite.

    Cost:
        2 m n² multiply-adds a sweep.

    References:
        Coordinate descent after LDLQ: Chee et al. 2023, arXiv 2307.13304 ("greedy updates").
    """
    target = coefficients.T
    current = rounded.T.clone(memory_format=torch.contiguous_format)
    error = current - target
    diagonal = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)
    columns = torch.arange(current.shape[0], device=current.device)
    for _ in range(sweeps):
        before = current.clone()
        for first in range(0, current.shape[0], BLOCK_COLUMNS):
            block = slice(first, first + BLOCK_COLUMNS)
            step = (hessian[block] @ error) / diagonal[block, None]
            values = _refine_block(current[block], step, hessian[block, block], coder, columns[block])
            error[block] += values - current[block]
            current[block] = values
        if torch.equal(current, before):
            break
    if not bool(torch.isfinite(current).all()):
        raise NumericalError("refinement produced NaN or infinity; raise the damping or check the weights.")
    return current.T


def _refine_block(
    current: Tensor, step: Tensor, hessian: Tensor, coder: FeedbackCoder, columns: Tensor
) -> Tensor:
    """Move the columns of a block in turn; a move of j by δ lets the minimum of k move by ``-δ H_jk / H_kk``.

    In terms of ``quantize_block`` with ``previous``: column k loses (previous - value)_j times the factor.
    """
    factor = hessian / -hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)
    factor.fill_diagonal_(1.0)
    values, _ = coder.quantize_block(current - step, factor, columns, previous=current)
    return values
