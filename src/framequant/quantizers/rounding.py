"""Choose the codes: nearest, or with error feedback (LDLQ, the rounding of GPTQ).

A *coder* holds a fitted code and rounds a panel of adjacent columns at a time; the rounding here decides in
which order panels are visited and what has been added to a column by the errors of those before it. Rows never
interact, so linears that share a Hessian are rounded together as one tall matrix.

Arithmetic is float64 on every device: an error that is fed forward amplifies the last bit of a sum into another
code, and the same codes on CPU and GPU are worth more than the time.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import NumericalError


class Coder(Protocol):
    """A fitted code that rounds panels of columns and remembers what it chose."""

    panel: int

    def quantize(self, columns: Float[Tensor, "m c"], first: int) -> Float[Tensor, "m c"]:
        """Round columns ``first … first + c - 1`` (natural order), record their codes, return their values."""
        ...


#: Columns between two updates of the remaining matrix, and between two updates inside such a block: errors of
#: a few columns at a time are fed forward by one matrix product, which keeps caches and GPUs busy.
BLOCK_COLUMNS = 128
INNER_COLUMNS = 16


def round_nearest(coefficients: Float[Tensor, "m n"], coder: Coder) -> Float[Tensor, "m n"]:
    """Round every coefficient to the nearest value of the code, without feedback.

    Returns:
        The rounded values, a new tensor of the shape and dtype of ``coefficients``.
    """
    panels = [
        coder.quantize(coefficients[:, first : first + coder.panel], first)
        for first in range(0, coefficients.shape[1], coder.panel)
    ]
    return torch.cat(panels, dim=1)


def round_ldlq(
    coefficients: Float[Tensor, "m n"],
    upper: Float[Tensor, "n n"],
    coder: Coder,
    order: Tensor | None = None,
) -> Float[Tensor, "m n"]:
    """Round columns in order, feeding each panel's error forward to the columns that are left.

    With H⁻¹ = Uᵀ U, the error e of panel P changes the remaining columns F by ``-e U_PP⁻¹ U_PF``, which is the
    exact minimiser of tr((D - D̃) H (D - D̃)ᵀ) over F given what is already rounded.

    Args:
        coefficients: D, float64.
        upper: U of the damped Hessian *in the order of rounding* (see ``feedback_factor``), float64.
        coder: rounds one column at a time, or panels.
        order: permutation; column ``order[i]`` of D is the i-th to be rounded. Panels must be single columns.

    Returns:
        The rounded values in D's own column order.

    Raises:
        NumericalError: a rounded value is not finite.

    Cost:
        About m n² multiply-adds.

    References:
        Frantar et al. 2022, arXiv 2210.17323; Chee et al. 2023, arXiv 2307.13304 (LDLQ).
    """
    if order is not None and coder.panel != 1:
        raise ValueError("a column order needs a code that rounds single columns")
    positions = list(range(coefficients.shape[1])) if order is None else order.tolist()
    # Transposed, so that a column of D is contiguous.
    work = (coefficients if order is None else coefficients[:, order]).T.clone(memory_format=torch.contiguous_format)
    rounded = torch.empty_like(work)
    _round_range(work, rounded, upper, coder, positions, 0, work.shape[0], _block_sizes(coder.panel))
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError("rounding produced NaN or infinity; raise the damping or check the weights.")
    if order is None:
        return rounded.T
    natural = torch.empty_like(rounded)
    natural[order] = rounded
    return natural.T


def _block_sizes(panel: int) -> tuple[int, ...]:
    sizes = (max(size // panel, 1) * panel for size in (BLOCK_COLUMNS, INNER_COLUMNS))
    return (*dict.fromkeys(sizes), panel) if panel < INNER_COLUMNS else (max(BLOCK_COLUMNS // panel, 1) * panel, panel)


def _round_range(
    work: Tensor, rounded: Tensor, upper: Tensor, coder: Coder, positions: Sequence[int], start: int, stop: int,
    sizes: tuple[int, ...],
) -> Tensor:
    """Round columns ``start … stop - 1`` in place, recursively over falling block sizes.

    Returns:
        Their errors solved against U, (stop - start, rows): what columns after ``stop`` have to be corrected by.
    """
    size, *smaller = sizes
    errors = torch.empty_like(work[start:stop])
    for first in range(start, stop, size):
        last = min(first + size, stop)
        if smaller:
            solved = _round_range(work, rounded, upper, coder, positions, first, last, tuple(smaller))
        else:
            solved = _round_panel(work, rounded, upper, coder, positions, first, last)
        errors[first - start : last - start] = solved
        if last < stop:
            _feed_forward(work[last:stop], upper[first:last, last:stop], solved)
    return errors


def _feed_forward(remaining: Tensor, factor: Tensor, solved: Tensor) -> None:
    """Subtract ``factorᵀ @ solved`` in place; for one column an outer product is faster than a matrix product."""
    if solved.shape[0] == 1:
        remaining.addcmul_(factor.T, solved, value=-1)
    else:
        remaining.addmm_(factor.T, solved, alpha=-1)


def _round_panel(
    work: Tensor, rounded: Tensor, upper: Tensor, coder: Coder, positions: Sequence[int], first: int, last: int
) -> Tensor:
    panel = work[first:last]
    values = coder.quantize(panel.T, positions[first]).T
    rounded[first:last] = values
    if last - first == 1:
        return (panel - values) / upper[first, first]
    return torch.linalg.solve_triangular(upper[first:last, first:last].T, panel - values, upper=False)


def proxy_loss(error: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"]) -> float:
    """Return tr(E H Eᵀ), the layer's expected squared output error; float64 in, float out."""
    return float(((error @ hessian) * error).sum())
