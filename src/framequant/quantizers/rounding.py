"""Choose the codes: nearest, or with error feedback (LDLQ, the rounding of GPTQ).

A *coder* holds a fitted code and rounds a panel of adjacent columns at a time; the rounding here decides in
which order panels are visited and what has been added to a column by the errors of those before it. A coder
of single columns may take whole blocks and feed errors forward inside them itself (``FeedbackCoder``). Rows
never interact, so linears that share a Hessian are rounded together as one tall matrix.

Arithmetic is float64 on every device: an error that is fed forward amplifies the last bit of a sum into
another code, and the same codes on CPU and GPU are worth more than the time.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.errors import NumericalError


class Coder(Protocol):
    """A fitted code that rounds panels of columns and remembers what it chose."""

    panel: int

    def quantize(self, columns: Float[Tensor, "m c"], first: int) -> Float[Tensor, "m c"]:
        """Round columns ``first … first + c - 1`` (natural order), record the codes, return the values."""
        ...


@runtime_checkable
class FeedbackCoder(Coder, Protocol):
    """A coder of single columns that feeds errors forward by itself inside a block of columns, and fast."""

    def quantize_block(
        self,
        work: Float[Tensor, "c m"],
        factor: Float[Tensor, "c c"],
        columns: Int[Tensor, " c"],
        previous: Float[Tensor, "c m"] | None = None,
    ) -> tuple[Float[Tensor, "c m"], Float[Tensor, "c m"]]:
        """Round ``columns`` in turn and record their codes; see ``framequant.kernels.feedback.round_block``.

        Returns:
            Their values, and their errors solved against ``factor``; both transposed, as ``work`` is.
        """
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
    width = BLOCK_COLUMNS if coder.panel == 1 else coder.panel  # single columns are rounded side by side
    panels = [
        coder.quantize(coefficients[:, first : first + width], first)
        for first in range(0, coefficients.shape[1], width)
    ]
    return torch.cat(panels, dim=1)


def round_ldlq(
    coefficients: Float[Tensor, "m n"],
    upper: Float[Tensor, "n n"],
    coder: Coder,
    order: Tensor | None = None,
) -> Float[Tensor, "m n"]:
    """Round columns in order, feeding each panel's error forward to the columns that are left.

    With H⁻¹ = Uᵀ U, the error e of panel P changes the remaining columns F by ``-e U_PP⁻¹ U_PF``, which is
    the exact minimiser of tr((D - D̃) H (D - D̃)ᵀ) over F given what is already rounded.

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
    # Transposed, so that a column of D is contiguous.
    work = (coefficients if order is None else coefficients[:, order]).T.clone(
        memory_format=torch.contiguous_format
    )
    rounded = torch.empty_like(work)
    if order is None:
        order = torch.arange(work.shape[0], device=work.device)
    sizes: tuple[int, ...] = (BLOCK_COLUMNS,)
    if isinstance(coder, FeedbackCoder):
        leaf = _block_leaf(coder, order)
    else:
        sizes, leaf = _block_sizes(coder.panel), _panel_leaf(coder, order)
    _round_range(work, rounded, upper, leaf, 0, work.shape[0], sizes)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError("rounding produced NaN or infinity; raise the damping or check the weights.")
    natural = torch.empty_like(rounded)
    natural[order] = rounded
    return natural.T


def _block_sizes(panel: int) -> tuple[int, ...]:
    sizes = (max(size // panel, 1) * panel for size in (BLOCK_COLUMNS, INNER_COLUMNS))
    return tuple(dict.fromkeys((*sizes, panel)))


#: Rounds the columns from one position to another in the order of rounding: takes them and the diagonal block
#: of U, and returns values and errors solved against it, all as in ``FeedbackCoder.quantize_block``.
_Leaf = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def _block_leaf(coder: FeedbackCoder, order: Tensor) -> _Leaf:
    def leaf(work: Tensor, factor: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        return coder.quantize_block(work, factor, order[first:last])

    return leaf


def _panel_leaf(coder: Coder, order: Tensor) -> _Leaf:
    positions = order.tolist()

    def leaf(work: Tensor, factor: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        values = coder.quantize(work.T, positions[first]).T
        if last - first == 1:
            return values, (work - values) / factor
        return values, torch.linalg.solve_triangular(factor.T, work - values, upper=False)

    return leaf


def _round_range(
    work: Tensor, rounded: Tensor, upper: Tensor, leaf: _Leaf, start: int, stop: int, sizes: tuple[int, ...]
) -> Tensor:
    """Round columns ``start … stop - 1`` in place, recursively over falling block sizes.

    Returns:
        Their errors solved against U, (stop - start, rows): what later columns have to be corrected by.
    """
    size, *smaller = sizes
    errors = torch.empty_like(work[start:stop])
    for first in range(start, stop, size):
        last = min(first + size, stop)
        if smaller:
            solved = _round_range(work, rounded, upper, leaf, first, last, tuple(smaller))
        else:
            rounded[first:last], solved = leaf(work[first:last], upper[first:last, first:last], first, last)
        errors[first - start : last - start] = solved
        if last < stop:
            _feed_forward(work[last:stop], upper[first:last, last:stop], solved)
    return errors


def _feed_forward(remaining: Tensor, factor: Tensor, solved: Tensor) -> None:
    """Subtract ``factorᵀ @ solved`` in place; for one column an outer product is faster than ``addmm_``."""
    if solved.shape[0] == 1:
        remaining.addcmul_(factor.T, solved, value=-1)
    else:
        remaining.addmm_(factor.T, solved, alpha=-1)


def proxy_loss(error: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"]) -> float:
    """Return tr(E H Eᵀ), the layer's expected squared output error; float64 in, float out."""
    return float(((error @ hessian) * error).sum())
