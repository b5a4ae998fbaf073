"""One budget of bytes shared out among linears: the knapsack that a bit allocation is.

Every linear has options, a rate and what it costs and loses. Losses add up, bytes add up, and the loss falls
convexly with the rate (by about a factor of four a bit), so the steps of steepest descent of all linears, taken
in order, are the solution of the relaxed problem; what is left of the budget at the end goes to the best steps
that still fit.

Must not import models, layers or frames.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from framequant.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One way of storing a linear.

    Attributes:
        bits: rate of the code, bits per coefficient.
        redundancy: of the input frame.
        size: bytes on disk.
        loss: predicted increase of the model's loss, any unit that is the same for all linears.
    """

    bits: float
    redundancy: float
    size: int
    loss: float


def share_out(
    options: Mapping[str, Sequence[Option]], budget: int, weights: int | None = None
) -> dict[str, Option]:
    """Choose an option for each linear so that sizes stay within the budget and the summed loss is least.

    Args:
        options: of each linear by name, at least one each.
        budget: bytes of all linears together.
        weights: their weights, to say in bits per weight what would fit.

    Returns:
        The chosen option of each linear.

    Raises:
        ConfigError: even the smallest options do not fit; the message says what would.

    Cost:
        O(n log n) in the number of options.

    References:
        Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
    """
    hulls = {name: _lower_hull(choices) for name, choices in options.items()}
    position = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].size for hull in hulls.values())
    check_fits(spent, budget, weights)
    queue = [(-_slope(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull, at = hulls[name], position[name]
        more = hull[at + 1].size - hull[at].size
        if spent + more > budget:
            continue
        spent += more
        position[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (-_slope(hull[at + 1], hull[at + 2]), name))
    return {name: hulls[name][position[name]] for name in hulls}


def check_fits(least: int, budget: int, weights: int | None = None) -> None:
    """Refuse a budget that the smallest options exceed.

    Args:
        least: bytes of the smallest option of every linear.
        budget: bytes of all linears together.
        weights: as in ``share_out``.

    Raises:
        ConfigError: they do not fit; the message says what would.
    """
    if least > budget:
        needed = f"{least} bytes" if weights is None else f"{math.ceil(8e4 * least / weights) / 1e4:.4f} bits"
        asked = f"{budget} bytes" if weights is None else f"{8 * budget / weights:.4f} bits"
        raise ConfigError(
            f"the budget is {asked} per weight, and these linears take {needed} at least, with everything that "
            "is stored for them: raise --bits, or lower the rates that overrides ask for."
        )


def _slope(before: Option, after: Option) -> float:
    """Loss taken away by each further byte."""
    return (before.loss - after.loss) / (after.size - before.size)


def _lower_hull(choices: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of (size, loss), in order of size."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda choice: (choice.size, choice.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    assert all(a.size < b.size for a, b in pairwise(hull))
    return hull
