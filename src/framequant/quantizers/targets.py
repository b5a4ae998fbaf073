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

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import NumericalError
from framequant.quantizers.hessian import cholesky_, column_major, damped_

#: Damping λ of the correction, a fraction of the mean diagonal of H.
TARGET_DAMPING = 0.01
UNSOLVABLE = (
    "its Hessian could not be factored for the target of the float model. Run the walk in float32, or set "
    "float_targets = 0 and residual_targets = 0."
)


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
    """
    wanted = correlation(weight, drift, residual, strength, residual_strength)
    return corrected({"": weight}, {"": wanted}, hessian.clone, damping)[""]


def correlation(
    weight: Float[Tensor, "o n"],
    drift: Float[Tensor, "n n"] | None,
    residual: Float[Tensor, "o n"] | None,
    strength: float,
    residual_strength: float,
) -> Float[Tensor, "o n"] | None:
    """``α · W (C - H) + β · R``: what the correction has in common with the inputs; None where nothing applies.

    Args:
        weight, drift, residual, strength, residual_strength: see ``float_target``.
    """
    wanted = torch.zeros_like(weight)
    if drift is not None and strength:
        wanted += strength * (weight @ drift)
    if residual is not None and residual_strength:
        wanted += residual_strength * residual
    return wanted if wanted.any() else None


def corrected(
    weights: Mapping[str, Float[Tensor, "o n"]],
    correlations: Mapping[str, Float[Tensor, "o n"] | None],
    hessian: Callable[[], Float[Tensor, "n n"]],
    damping: float = TARGET_DAMPING,
) -> dict[str, Float[Tensor, "o n"]]:
    """The weights W* of linears that read one tensor.

    Args:
        weights: W of each, float64.
        correlations: of each, from ``correlation``.
        hessian: makes H anew, float64; what it makes is overwritten. One matrix of this size is there at a time.
        damping: λ as a fraction of the mean diagonal of H.

    Raises:
        NumericalError: H is not positive definite in spite of the damping.

    Cost:
        One Cholesky of n × n, and two triangular solves with as many right-hand sides as there are rows.
    """
    if all(wanted is None for wanted in correlations.values()):
        return dict(weights)
    lower = cholesky_(column_major(damped_(hessian(), damping)))
    if lower is None:
        raise NumericalError(f"{next(iter(weights)) or 'a linear'}: {UNSOLVABLE}")
    found = dict(weights)
    for name, wanted in correlations.items():
        if wanted is not None:
            half = torch.linalg.solve_triangular(lower, wanted.T, upper=False)
            found[name] = weights[name] + torch.linalg.solve_triangular(lower.T, half, upper=True).T
    return found
