"""No linear is worse than none: where rounding does more harm than zeros would, its scales are shrunk.

It happens to matrices that a code cannot describe, one entry a million times the others, or on data that shows one
direction only. Of the matrices g Ŵ the best has ``g = tr(W M Ŵᵀ) / tr(Ŵ M Ŵᵀ)``, M the damped Hessian, and its error
is at most that of g = 0. Scaling all scales of a code scales what it decodes to, so nothing else changes.

Must not import ``torch.nn``, models or frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.quantizers.rounding import proxy_loss

#: Losses below this share of that of zeros need no closer look.
SUSPICIOUS = 0.5


def shrinkage(
    target: Float[Tensor, "o n"],
    restored: Float[Tensor, "o n"],
    hessian: Float[Tensor, "n n"],
    proxy: float,
    reference: float,
    damping: float | None,
) -> float:
    """The factor by which a rounded matrix should be multiplied: 1 unless it is worse than zeros.

    Args:
        target: W*, float64.
        restored: Ŵ.
        hessian: H.
        proxy: tr(E H Eᵀ) of E = Ŵ - W*.
        reference: tr(W H Wᵀ) of the weight.
        damping: fraction of H's mean diagonal that the rounding added; None for rounding without a Hessian, which is
            judged by the error of the weights alone.

    Returns:
        g from 0 to 1.

    Cost:
        Nothing more than sums of squares, unless the loss exceeds ``SUSPICIOUS`` of that of zeros.
    """
    error = restored - target
    if damping is None:
        metric, added, proxy, reference = torch.zeros_like(hessian), 1.0, 0.0, 0.0
    else:
        metric, added = hessian, damping * float(hessian.diagonal().mean())
        added = added or float(not hessian.diagonal().any())  # as ``damped`` has it
    loss = proxy + added * float(error.square().sum())
    if loss <= SUSPICIOUS * (reference + added * float(target.square().sum())):
        return 1.0
    zeros = proxy_loss(target, metric) + added * float(target.square().sum())
    if loss <= zeros:
        return 1.0
    overlap = float(((target @ metric) * restored).sum()) + added * float((target * restored).sum())
    size = proxy_loss(restored, metric) + added * float(restored.square().sum())
    return min(max(overlap / size, 0.0), 1.0) if size > 0 else 1.0


def shrink(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The stored tensors of a linear with its scales multiplied by a factor, rounded to their dtype, never zero."""
    scales = tensors["scales"]
    least = torch.finfo(torch.float32).tiny if scales.dtype != torch.float16 else 2.0**-24
    return {**tensors, "scales": (scales.double() * factor).clamp(min=least).to(scales.dtype)}
