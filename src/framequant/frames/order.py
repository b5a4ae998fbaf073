"""In which order error feedback should visit the coefficients of a fusion frame.

The K coefficients of a group are samples of a signal with fewer frequencies than samples, N/L of K. Visited as they
lie, the last samples follow from those before them only by extrapolation, which magnifies every rounding error
exponentially: with many subspaces, feedback gets lost there. Visited by strides of the golden section, early samples
lie all over the period, and late ones between them follow by interpolation.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from framequant.frames.operator import FrameKind, FrameSpec

#: Fewer subspaces leave one or two coefficients of a group to extrapolate; their order made no difference.
FEWEST_SUBSPACES = 16


def golden_stride(period: int) -> int:
    """The stride next to the golden section of a period that visits all of it; 1 for periods up to 2."""
    section = period * (math.sqrt(5) - 1) / 2
    strides = (stride for stride in range(1, max(period, 2)) if math.gcd(stride, period) == 1)
    return min(strides, key=lambda stride: (abs(stride - section), stride))


def spread_order(spec: FrameSpec) -> Int[Tensor, " coefficients"] | None:
    """Positions in the group-major order of ``fusion_frame``, group by group, far apart within each.

    Args:
        spec: of a frame; real and imaginary parts of a coefficient stay together.

    Returns:
        The order, or None where coefficients may be visited as they lie.

    Examples:
        >>> spread_order(FrameSpec(FrameKind.FUSION, 36, 23, 2))[:6].tolist()
        [0, 1, 28, 29, 10, 11]
    """
    period = spec.num_subspaces
    if spec.kind is not FrameKind.FUSION or period < FEWEST_SUBSPACES:
        return None
    stride = golden_stride(period)
    samples = torch.arange(period) * stride % period
    parts = torch.stack([2 * samples, 2 * samples + 1], dim=1).flatten()
    starts = torch.arange(spec.subspace_dim // 2) * 2 * period
    return (starts[:, None] + parts).flatten()
