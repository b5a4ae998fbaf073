"""What can be done about the noise of codes after they were chosen: shrinkage, a gain per row, consistency.

Two of them are settings (``denoise``), folded into the scales that are stored anyway, so they cost no bit:

- *wiener*: a row y = x + n of coefficients is shrunk by ``σ_x² / (σ_x² + σ_n²)``, the Wiener (LMMSE) filter of a
  Parseval frame for a white signal. It takes the noise for uncorrelated with the signal, which it is not where codes
  are centroids; there it hurts.
- *gain*: the factor of least loss in the metric that counts, ``g = (d H d̃ᵀ) / (d̃ H d̃ᵀ)``. Before the scales are stored
  it never raises the loss of its row.

The other two are for analysis: the Wiener filter with any covariances, whose matrix no file could hold, and consistent
reconstruction, which looks for a vector whose coefficients lie in the cells that the codes name. It gains nothing for
redundancies up to 1.5 at two bits, and cells say nothing where errors were fed forward.

References:
    Kutyniok, Pezeshki, Calderbank, Liu 2009, Robust dimension reduction, fusion frames, and Grassmannian packings.
    Goyal, Vetterli, Thao 1998, Quantized overcomplete expansions in R^N.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.frames import FrameOperator


def wiener_gains(exact: Float[Tensor, "rows m"], rounded: Float[Tensor, "rows m"]) -> Float[Tensor, " rows"]:
    """Shrinkage of every row, ``σ_x² / (σ_x² + σ_n²)``, in (0, 1]; 1 for a row of zeros without error.

    Args:
        exact: coefficients.
        rounded: their quantized values.
    """
    signal = exact.square().mean(1)
    noise = (rounded - exact).square().mean(1)
    total = signal + noise
    return torch.where(
        total > 0, signal / total.clamp(min=torch.finfo(total.dtype).tiny), torch.ones_like(total)
    )


def metric_gains(
    exact: Float[Tensor, "rows m"], rounded: Float[Tensor, "rows m"], hessian: Float[Tensor, "m m"]
) -> Float[Tensor, " rows"]:
    """The factor of every row that has least loss tr(E H Eᵀ); 1 where the metric sees nothing of a row.

    Args:
        exact: coefficients.
        rounded: their quantized values.
        hessian: H' of the coefficients.
    """
    weighted = rounded @ hessian
    power = (weighted * rounded).sum(1)
    gains = (weighted * exact).sum(1) / power.clamp(min=torch.finfo(power.dtype).tiny)
    return torch.where(power > 0, gains, torch.ones_like(gains))


def wiener_filter(
    frame: FrameOperator,
    coefficients: Float[Tensor, "*b m"],
    signal: Float[Tensor, "d d"],
    noise: float,
) -> Float[Tensor, "*b d"]:
    """Estimate vectors from noisy coefficients y = T x + n: ``R_x (R_x + σ_n² I)⁻¹ Tᵀ y``.

    Args:
        frame: a Parseval frame T.
        coefficients: y.
        signal: R_x, the second moment of x.
        noise: σ_n², variance of every entry of n.

    Returns:
        A new tensor of the coefficients' dtype.
    """
    decoded = frame.synthesis(coefficients)
    damped = signal + noise * torch.eye(len(signal), dtype=signal.dtype, device=signal.device)
    return decoded @ torch.linalg.solve(damped, signal)


def wiener_error(signal: Float[Tensor, "d d"], noise: float) -> float:
    """Mean squared error of ``wiener_filter`` in closed form, ``tr((R_x⁻¹ + I/σ_n²)⁻¹)``, summed over entries."""
    values = torch.linalg.eigvalsh(signal.double()).clamp(min=0)
    return float((values * noise / (values + noise)).sum()) if noise > 0 else 0.0


def consistent_reconstruction(
    frame: FrameOperator,
    low: Float[Tensor, "*b m"],
    high: Float[Tensor, "*b m"],
    start: Float[Tensor, "*b m"],
    iterations: int = 200,
) -> Float[Tensor, "*b d"]:
    """Look for a vector whose coefficients lie in given cells: projections onto the cells and the range of T.

    Args:
        frame: a Parseval frame.
        low: lower bounds of the cells; -inf for outermost ones.
        high: upper bounds.
        start: coefficients to begin with.
        iterations: pairs of projections.

    Returns:
        The synthesis of the last coefficients. They lie in the cells up to what the iterations left.
    """
    current = start
    for _ in range(iterations):
        current = frame.analysis(frame.synthesis(torch.minimum(torch.maximum(current, low), high)))
    return frame.synthesis(current)
