"""Plain round-to-nearest at a given number of bits per weight: what every Sigma-Delta figure is shown beside.

No frame, no feedback, no calibration: each row of W is rounded to a uniform grid with one bfloat16 scale, whose
range is the best of a search. The number of levels is the largest whose codes and scales fit into the same bits.
Pure functions. Must not import layers or models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SCALE_BITS = 16
MAX_LEVELS = 1 << 16
_SHARES = tuple(1 - 0.05 * n for n in range(17))  # of the range of the row, down to a fifth


def equal_levels(bits_per_weight: float, columns: int) -> int:
    """The most levels that plain rounding can afford: ``log2(levels) + 16/columns ≤ bits``; 0 if not even two."""
    levels = int(2 ** min(bits_per_weight - SCALE_BITS / columns + 1e-9, 17))
    return min(levels, MAX_LEVELS) if levels >= 2 else 0


def round_to_nearest(weight: Float[Tensor, "o n"], levels: int) -> Float64[Tensor, "o n"]:
    """Round each row to ``levels`` uniform levels around zero, the step searched for least squared error.

    Args:
        weight: W.
        levels: 2 or more; odd counts have a level at zero, even ones do not.

    Returns:
        The rounded weight.
    """
    weight = weight.double()
    half = (levels - 1) / 2
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.zeros_like(weight)
    least = weight.square().sum(1, keepdim=True)
    for share in _SHARES:
        step = (largest * share / half).to(torch.bfloat16).double()
        safe = torch.where(step > 0, step, 1.0)
        rounded = ((weight / safe + half).round().clamp(0, levels - 1) - half) * step
        error = (weight - rounded).square().sum(1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best


def nearest_at_equal_bits(weight: Float[Tensor, "o n"], bits_per_weight: float) -> dict[str, Any]:
    """Figures of plain rounding at the same bits.

    Args:
        weight: W.
        bits_per_weight: measured bits of the code compared with.

    Returns:
        levels, bits per weight and relative squared error; levels 0 and error 1 where the bits do not pay for
        two levels. More than 16 bits of levels are not used.
    """
    levels = equal_levels(bits_per_weight, weight.shape[1])
    if not levels:
        return {"levels": 0, "bits_per_weight": 0.0, "relative_error": 1.0}
    total = float(weight.double().square().sum())
    error = float((weight.double() - round_to_nearest(weight, levels)).square().sum())
    return {
        "levels": levels,
        "bits_per_weight": math.log2(levels) + SCALE_BITS / weight.shape[1],
        "relative_error": error / total if total > 0 else 0.0,
    }
