"""Steps of one group of linears that several processes share: rows to each, and what rows have in common to one.

The functions here know a process only as what it can tell the others (``Shares``); ``framequant.model.ranks`` has
those that speak through ``torch.distributed``. Every function is called by all of them, in the same order.

Must not import ``torch.nn``, models or frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from framequant.errors import NumericalError
from framequant.quantizers.hessian import FeedbackFactor


class Shares(Protocol):
    """The processes that share rows."""

    rank: int
    size: int

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All rows, of which the processes hold so many each, one after the other."""
        ...

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process."""
        ...

    def share(self, value: Any, owner: int) -> Any:
        """The owner's value, tensors and all."""
        ...


def even_counts(rows: int, parts: int) -> list[int]:
    """Numbers of rows of so many parts, as equal as can be."""
    return [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]


def own_rows(counts: Sequence[int], rank: int) -> slice:
    """The rows of one part."""
    first = sum(counts[:rank])
    return slice(first, first + counts[rank])


def targets_beside_factor(
    weights: Mapping[str, Float[Tensor, "o n"]],
    targets: Callable[[Mapping[str, slice]], Mapping[str, Float[Tensor, "rows n"]]],
    factor: Callable[[], FeedbackFactor],
    share: Shares,
) -> tuple[dict[str, Float[Tensor, "o n"]], FeedbackFactor]:
    """The weights to round, by all processes but the last, each some of the rows; beside them the factor, by the last.

    Both take a factorisation that no process can share, of matrices that do not need each other.

    Args:
        weights: of the linears, for their shapes and device.
        targets: makes the targets, float64, of some rows of every linear.
        factor: makes the factor for the rounding.
        share: the processes, more than one.

    Returns:
        The targets and the factor, on every process.

    Raises:
        NumericalError: a process could not make its part; all of them raise it.
    """
    last = share.size - 1
    counts = {name: [*even_counts(len(weight), last), 0] for name, weight in weights.items()}
    mine = {name: weight[:0].double() for name, weight in weights.items()}
    made, problem = None, None
    try:
        if share.rank == last:
            made = factor()
        else:
            mine.update(targets({name: own_rows(counts[name], share.rank) for name in weights}))
    except NumericalError as error:
        problem = error
    for found in share.gather(problem):
        if found is not None:
            raise found
    whole = {name: share.gather_rows(mine[name], counts[name]) for name in weights}
    return whole, _sent(made, last, share)


def _sent(made: FeedbackFactor | None, owner: int, share: Shares) -> FeedbackFactor:
    """The owner's factor, whose columns may be what lies together: it is not copied for that."""
    parts = None
    if made is not None:
        columns = made.upper.T.is_contiguous()
        parts = made.upper.T if columns else made.upper, columns, made.damping, made.escalations
    upper, columns, damping, escalations = share.share(parts, owner)
    return FeedbackFactor(upper.T if columns else upper, damping, escalations)
