"""The weight to round: corrected so that the quantized chain lands where the float model does.

The linear will see x_q, the activations of already quantized predecessors, while the float model's weight was
made for x_f. The least-squares weight for x_q, damped, is::

    W* = W + α · W (C - H)(H + λI)⁻¹ + β · R (H + λI)⁻¹

with H = E[x_q x_qᵀ], C = E[x_f x_qᵀ] and R = E[(h_f - h_q) x_qᵀ], the deviation that the residual stream has
already accumulated where the linear writes into it. α = β = 1 is the full least-squares solution; smaller
values shrink it against the finite calibration set.

Must not import ``torch.nn``, models or frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.quantizers.hessian import damped

#: Damping λ of the correction, a fraction of the mean diagonal of H.
TARGET_DAMPING = 0.01


def float_target(
    weight: Float[Tensor, "o n"],
    hessian: Float[Tensor, "n n"],
    drift: Float[Tensor, "n n"] | None,
    residual: Float[Tensor, "o n"] | None,
    strength: float,
    residual_strength: float,
    damping: float = TARGET_DAMPING,
) -> Float[Tensor, "o n"]:
    """Return the weight W* to round, from the float model's inputs and the residual stream.

    Args:
        weight: W, (out_features, in_features), float64.
        hessian: H = E[x_q x_qᵀ], float64.
        drift: C - H = E[(x_f - x_q) x_qᵀ], or None to skip the first correction.
        residual: R = E[(h_f - h_q) x_qᵀ], or None to skip the second.
        strength: α, 0 (off) to 1.
        residual_strength: β, 0 (off) to 1.
        damping: λ as a fraction of the mean diagonal of H.

    Returns:
        W*, a new tensor of the shape and dtype of ``weight``; ``weight`` itself where nothing applies.

    Cost:
        One Cholesky of n × n and two triangular solves with o right-hand sides.
    """
    change = torch.zeros_like(weight)
    if drift is not None and strength:
        change += strength * (weight @ drift)
    if residual is not None and residual_strength:
        change += residual_strength * residual
    if not change.any():
        return weight
    del drift, residual  # as large as all else together, where the caller keeps none
    factor = torch.linalg.cholesky(damped(hessian, damping))
    return weight + torch.cholesky_solve(change.T, factor).T
