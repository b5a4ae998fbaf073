"""Error bounds of Sigma-Delta quantization: of a vector, a layer, and whole networks.

A bound is *a priori* if it follows from the step and the float weights, *a posteriori* if it uses what was measured
on the quantized ones (states, weight errors, norms). It is *vacuous* where it is not below the norm of what it bounds:
decoding to zero would be guaranteed as much. A-priori bounds of networks are vacuous almost always, since they
multiply operator norms; they are here because the paper states them, and are reported with that flag.

Order ρ leaves ``x - L q = L D^ρ u``, so with |u_n| ≤ δ/2 the error is at most
``(δ/2) Σ_n ‖(L D^ρ)_n‖`` (variation form) and ``‖L D^ρ‖₂ sqrt(N) δ/2`` (spectral form). Pure functions.

References:
    Benedetto, Powell, Yılmaz, IEEE Trans. Inf. Theory 52, 2006 (variation form). Blum, Lammers, Powell, Yılmaz,
    J. Fourier Anal. Appl. 16, 2010 (spectral form). Czaja, Na, arXiv 2404.08131 (networks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from framequant.frames import DualStage, HarmonicFrame
from framequant.frames.duals import shaped

#: Up to so many entries ``L D^ρ`` is formed densely and its norms are exact.
MAX_DENSE = 1 << 22
#: Up to this size spectral norms come from singular values, beyond it from cheaper upper bounds.
MAX_SPECTRAL = 1024


@dataclass(frozen=True)
class Bound:
    """A bound on the norm of an error, beside the norm of what the error is in.

    Attributes:
        value: the bound, a scalar or one for each vector.
        reference: norm of the vector, layer output or network output, of the same shape.
    """

    value: Float64[Tensor, ...]
    reference: Float64[Tensor, ...]

    @property
    def vacuous(self) -> Tensor:
        """Whether the bound says no more than that zero would do as well."""
        return self.value >= self.reference

    def to_dict(self) -> dict[str, float | bool]:
        """Largest bound, its reference, and whether any is vacuous, as JSON-ready values."""
        if self.value.numel() == 0:
            return {"value": 0.0, "reference": 0.0, "vacuous": False}
        worst = int(self.value.flatten().argmax())
        return {
            "value": float(self.value.flatten()[worst]),
            "reference": float(self.reference.flatten()[worst]),
            "vacuous": bool(self.vacuous.any()),
        }


# --- Vectors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapedNorms:
    """Norms of ``L D^ρ``, each an upper bound that is exact for frames of up to ``MAX_DENSE`` entries.

    Attributes:
        variation: Σ_n of the norms of its columns.
        spectral: its operator norm.
        size: N.
    """

    variation: float
    spectral: float
    size: int

    @classmethod
    def of(cls, stage: DualStage, order: int) -> ShapedNorms:
        """Norms for a decoder and an order of the recursion.

        For the canonical dual of a harmonic frame they cost O(N); the last state of order 1 vanishes where the
        frame adds up to zero and N is even, which takes the boundary term out of the variation.
        """
        frame, size = stage.frame, stage.num_coefficients
        harmonic = isinstance(frame, HarmonicFrame) and stage.dual_order == 0
        if stage.dim * size <= MAX_DENSE or not harmonic:
            dual = stage.as_matrix().mT / math.sqrt(size / stage.dim)
            matrix = shaped(dual, order)
            columns = matrix.norm(dim=0)
            boundary = float(columns[-1]) if order else 0.0
            variation, spectral = float(columns.sum()), _gram_norm(matrix)
        else:
            assert isinstance(frame, HarmonicFrame)
            variation, spectral, boundary = _harmonic_norms(frame, order)
        if order == 1 and harmonic and size % 2 == 0 and stage.dim % 2 == 0:
            variation -= boundary
        return cls(variation, spectral, size)


def _harmonic_norms(frame: HarmonicFrame, order: int) -> tuple[float, float, float]:
    """Variation, an upper bound on the operator norm, and the norm of the last column, without a dense matrix.

    Circular differences of the frame multiply its waves, and have the norm ``sqrt(N/d) max_k |1 - exp(i θ_k)|^ρ``;
    only the last ρ columns differ from those of ``L D^ρ``.
    """
    dim, size = frame.dim, frame.size
    last = torch.zeros(2 * order, size, dtype=torch.float64)
    for n in range(order):
        last[n, size - order + n], last[order + n, n] = 1.0, 1.0
    ends = frame.adjoint(last).mT if order else torch.zeros(dim, 0, dtype=torch.float64)
    open_end = shaped(ends[:, :order], order)
    closed = shaped(ends, order)[:, :order]
    inner = math.sqrt(size / dim) * (2 * math.sin(math.pi * (dim // 2) / size)) ** order
    correction = _gram_norm(open_end - closed) if order else 0.0
    columns = open_end.norm(dim=0)
    share = dim / size
    variation = share * ((size - order) * frame.difference_norm(order) + float(columns.sum()))
    return variation, share * (inner + correction), share * float(columns[-1]) if order else 0.0


def vector_bound_prior(steps: Float[Tensor, " v"], norms: ShapedNorms) -> Float64[Tensor, " v"]:
    """Bound ``‖x - L q‖`` for stable steps: no state beyond δ/2.

    Args:
        steps: δ of each vector.
        norms: of ``L D^ρ``.
    """
    half = steps.double() / 2 * (1 + 1e-8)  # states may pass δ/2 by rounding
    return half * min(norms.variation, norms.spectral * math.sqrt(norms.size))


def vector_bound_posterior(
    steps: Float[Tensor, " v"], peaks: Float[Tensor, " v"], energies: Float[Tensor, " v"], norms: ShapedNorms
) -> Float64[Tensor, " v"]:
    """Bound ``‖x - L q‖`` from the states that the recursion met; holds with overloads too.

    Args:
        steps: δ of each vector.
        peaks: largest |u|/δ.
        energies: Σ (u/δ)².
        norms: of ``L D^ρ``.
    """
    by_peak = peaks.double() * norms.variation
    by_energy = energies.double().sqrt() * norms.spectral
    return steps.double() * torch.minimum(by_peak, by_energy)


def published_bound(step: float, dim: int, size: int, variation: float, sums_to_zero: bool = False) -> float:
    """Return ``(δ d / 2N)(σ(F, p) + 2)`` for order 1 and the canonical dual; without the 2 for zero sum and even N.

    Args:
        step: δ.
        dim: d.
        size: N.
        variation: σ(F, p), see ``frames.unit_norm.frame_variation``.
        sums_to_zero: whether Σ e_n = 0.
    """
    boundary = 0.0 if sums_to_zero and size % 2 == 0 else 2.0
    return step * dim / (2 * size) * (variation + boundary)


# --- Layers and networks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerFacts:
    """Norms of one affine map ``W x + b`` and of its quantized twin; any upper bounds will do.

    Attributes:
        weight_norm: ‖W‖₂.
        quantized_norm: ‖Ŵ‖₂.
        weight_error: E ≥ ‖W - Ŵ‖₂.
        bias_norm: ‖b‖.
        bias_error: β ≥ ‖b - b̂‖.
    """

    weight_norm: float
    quantized_norm: float
    weight_error: float
    bias_norm: float = 0.0
    bias_error: float = 0.0


@dataclass(frozen=True)
class Spread:
    """What is known of a tensor inside a network.

    Attributes:
        radius: R ≥ its norm in the float network.
        error: e ≥ its distance from the quantized network's.
    """

    radius: float
    error: float = 0.0


def affine(facts: LayerFacts, inputs: Spread) -> Spread:
    """Pass a spread through ``W x + b``: ``‖Ŵ‖ e + E R + β``, and ``‖W‖ R + ‖b‖``."""
    return Spread(
        facts.weight_norm * inputs.radius + facts.bias_norm,
        facts.quantized_norm * inputs.error + facts.weight_error * inputs.radius + facts.bias_error,
    )


def activation(lipschitz: float, inputs: Spread) -> Spread:
    """Pass a spread through a Lipschitz activation that keeps zero."""
    return Spread(lipschitz * inputs.radius, lipschitz * inputs.error)


def add(one: Spread, other: Spread) -> Spread:
    """Spread of a sum."""
    return Spread(one.radius + other.radius, one.error + other.error)


def layer_bound(facts: LayerFacts, inputs: Spread, lipschitz: float = 1.0) -> Spread:
    """Bound one layer ``σ(W x + b)``: ``e_l ≤ L (‖Ŵ‖ e_{l-1} + E R_{l-1} + β)``."""
    return activation(lipschitz, affine(facts, inputs))


def feed_forward_bound(
    layers: Sequence[LayerFacts],
    inputs: Spread,
    lipschitz: float = 1.0,
    radii: Sequence[float] | None = None,
) -> list[Spread]:
    """Bound every layer of a feed-forward network; the last has no activation.

    Args:
        layers: in order.
        inputs: of the network.
        lipschitz: of the activation between layers.
        radii: measured norms of the inputs of each layer in the float network; a-priori products if None.

    Returns:
        The spread after each layer.
    """
    spreads = []
    for number, facts in enumerate(layers):
        if radii is not None:
            inputs = Spread(radii[number], inputs.error)
        last = number == len(layers) - 1
        inputs = layer_bound(facts, inputs, 1.0 if last else lipschitz)
        spreads.append(inputs)
    return spreads


def residual_bound(
    inner: LayerFacts,
    outer: LayerFacts,
    inputs: Spread,
    lipschitz: float = 1.0,
    hidden_radius: float | None = None,
) -> Spread:
    """Bound a residual block ``h + V σ(W h + b) + c``.

    ``e_l ≤ e_{l-1} + ‖V̂‖ L (‖Ŵ‖ e_{l-1} + E^W R_{l-1} + β) + E^V S_l + γ`` with S_l the norm of ``σ(W h + b)``.

    Args:
        inner: W and b.
        outer: V and c.
        inputs: spread of h.
        lipschitz: of σ.
        hidden_radius: measured S_l; the a-priori product if None.
    """
    hidden = layer_bound(inner, inputs, lipschitz)
    if hidden_radius is not None:
        hidden = Spread(hidden_radius, hidden.error)
    return add(inputs, affine(outer, hidden))


def spectral_bound(matrix: Float[Tensor, "o n"]) -> float:
    """An upper bound on the operator norm: exact for matrices with a side of up to ``MAX_SPECTRAL``.

    Beyond, the least of the Frobenius norm and ``sqrt(‖A‖₁ ‖A‖_∞)``.
    """
    matrix = matrix.double()
    if matrix.numel() == 0:
        return 0.0
    if min(matrix.shape) <= MAX_SPECTRAL:
        return _gram_norm(matrix)
    absolute = matrix.abs()
    mixed = math.sqrt(float(absolute.sum(0).max()) * float(absolute.sum(1).max()))
    return min(float(matrix.norm()), mixed)


def _gram_norm(matrix: Float64[Tensor, "o n"]) -> float:
    """The operator norm by the Gram matrix of the shorter side, with a slack far above its rounding errors."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    largest = float(torch.linalg.eigvalsh(short @ short.mT)[-1])
    return math.sqrt(max(largest, 0.0)) * (1 + 1e-9)
