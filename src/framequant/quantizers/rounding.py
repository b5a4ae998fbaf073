"""Choose the codes: nearest, or with error feedback (LDLQ, the rounding of GPTQ).

A *coder* holds a fitted code and rounds a panel of adjacent columns at a time; the rounding here decides in
which order panels are visited and what has been added to a column by the errors of those before it. Rows never
interact, so linears that share a Hessian are rounded together as one tall matrix.

Arithmetic is float64 on every device: an error that is fed forward amplifies the last bit of a sum into another
code, and the same codes on CPU and GPU are worth more than the time.

Must not import models, layers or frames.
"""

from __future__ import annotations

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


#: Columns between two updates of the remaining matrix; inside a block errors are fed forward column by column.
BLOCK_COLUMNS = 128


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
    work = coefficients.clone() if order is None else coefficients[:, order]
    rounded = torch.empty_like(work)
    positions = range(work.shape[1]) if order is None else order.tolist()
    block = max(BLOCK_COLUMNS // coder.panel, 1) * coder.panel
    for start in range(0, work.shape[1], block):
        stop = min(start + block, work.shape[1])
        errors = _round_block(work, rounded, upper, coder, positions, start, stop)
        if stop < work.shape[1]:
            work[:, stop:] -= errors @ upper[start:stop, stop:]
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError("rounding produced NaN or infinity; raise the damping or check the weights.")
    if order is None:
        return rounded
    natural = torch.empty_like(rounded)
    natural[:, order] = rounded
    return natural


def _round_block(
    work: Tensor, rounded: Tensor, upper: Tensor, coder: Coder, positions, start: int, stop: int
) -> Tensor:
    """Round one block in place; return E with the block's errors solved against U, for the columns after it."""
    errors = torch.empty_like(work[:, start:stop])
    for first in range(start, stop, coder.panel):
        last = min(first + coder.panel, stop)
        panel = work[:, first:last]
        values = coder.quantize(panel, int(positions[first]))
        rounded[:, first:last] = values
        if last - first == 1:
            solved = (panel - values) / upper[first, first]
        else:
            solved = torch.linalg.solve_triangular(
                upper[first:last, first:last], panel - values, upper=True, left=False
            )
        errors[:, first - start : last - start] = solved
        if last < stop:
            work[:, last:stop].addmm_(solved, upper[first:last, last:stop], alpha=-1)
    return errors


def proxy_loss(error: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"]) -> float:
    """Return tr(E H Eᵀ), the layer's expected squared output error; float64 in, float out."""
    return float(((error @ hessian) * error).sum())
