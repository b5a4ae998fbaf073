"""One linear, from its float weight and bias to stored Sigma-Delta codes, with its errors and bounds.

The counterpart of ``weight.py`` without calibration data: rows or columns of W are expanded in a harmonic frame and
quantized, the bias in the harmonic frame of R^out. Must not import layers or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.codes.packing import pack_codes
from framequant.codes.sigma_delta import SigmaDeltaSpec, Vectors, code_values
from framequant.config import FrameQuantConfig
from framequant.errors import FrameError, NumericalError
from framequant.frames import DualStage, FrameKind, FrameSpec, derive_seed, frame_size, harmonic_stage
from framequant.quantizers.bounds import (
    Bound,
    LayerFacts,
    ShapedNorms,
    spectral_bound,
    vector_bound_posterior,
    vector_bound_prior,
)
from framequant.quantizers.equal_bits import nearest_at_equal_bits
from framequant.quantizers.sigma_delta import Expansion, SigmaDelta
from framequant.quantizers.weight import SEED_BITS, LinearLoss, QuantizedWeight
from framequant.spec import LinearSpec
from framequant.storage import bias_frame


@dataclass(frozen=True)
class DataFreeResult:
    """One quantized linear.

    Attributes:
        quantized: spec, tensors and loss (against an identity Hessian: squared weight error).
        prior: norms known before quantizing, for network bounds; None where no step tried was stable.
        posterior: the same from the quantized weight.
        details: JSON-ready figures for the report.
    """

    quantized: QuantizedWeight
    prior: LayerFacts | None
    posterior: LayerFacts
    details: dict[str, Any]


def quantizer_of(config: FrameQuantConfig) -> SigmaDelta:
    """The quantizer that a config describes."""
    levels = 2 if config.levels is None else config.levels
    return SigmaDelta(config.order, levels, config.step, config.dual, config.flip_passes)


def linear_spec(
    config: FrameQuantConfig, in_features: int, out_features: int, has_bias: bool, name: str
) -> LinearSpec:
    """The spec of a linear: the harmonic frame on the side whose vectors are expanded, the identity on the other.

    Raises:
        FrameError: no harmonic frame of this ratio exists for the dimension.
    """
    dual = quantizer_of(config).dual_order
    code = config.code_spec()
    assert isinstance(code, SigmaDeltaSpec)
    rows = config.vectors is Vectors.ROWS
    dim = in_features if rows else out_features
    try:
        size = frame_size(dim, config.frame_size_ratio)
        if has_bias and config.quantize_bias:
            code = replace(code, bias_size=frame_size(out_features, config.frame_size_ratio))
    except FrameError as error:
        raise FrameError(f"{name}: {error}") from error
    seed = derive_seed(config.seed, name, "vectors") & ((1 << SEED_BITS) - 1) if config.random_signs else 0
    harmonic = FrameSpec(FrameKind.HARMONIC, dim, size, 1, seed, dual)
    plain = FrameSpec(FrameKind.IDENTITY, out_features if rows else in_features)
    return LinearSpec(in_features, out_features, *((harmonic, plain) if rows else (plain, harmonic)), code)


def quantize_linear(
    weight: Float[Tensor, "o n"], bias: Float[Tensor, " o"] | None, config: FrameQuantConfig, name: str
) -> DataFreeResult:
    """Quantize one linear.

    Args:
        weight: W (out_features, in_features).
        bias: b, or None.
        config: settings of this linear.
        name: for messages.

    Raises:
        NumericalError: NaN or infinity in the weight or bias; the linear is named.
        FrameError: no frame of the ratio exists.
    """
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{name}: its {what} contains NaN or infinity; the model file is damaged.")
    quantizer = quantizer_of(config)
    spec = linear_spec(config, weight.shape[1], weight.shape[0], bias is not None, name)
    assert isinstance(spec.code, SigmaDeltaSpec)
    rows = spec.code.vectors is Vectors.ROWS
    weight = weight.double()
    vectors = weight if rows else weight.mT
    stage = harmonic_stage(spec.frame_in if rows else spec.frame_out)
    expansion = quantizer.quantize(vectors, stage)
    tensors = _tensors(expansion, quantizer.levels, rows)
    restored = _restored(expansion, quantizer.levels, stage)
    change = (vectors - restored) if rows else (vectors - restored).mT
    details = _figures(quantizer, expansion, stage, vectors)
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / weight.numel()
    details["nearest_at_equal_bits"] = nearest_at_equal_bits(weight, bits)
    prior_bias, bias_error = _quantize_bias(bias, quantizer, spec, tensors, details)

    facts = LayerFacts(
        weight_norm=spectral_bound(weight),
        quantized_norm=spectral_bound(weight - change),
        weight_error=spectral_bound(change),
        bias_norm=0.0 if bias is None else float(bias.double().norm()),
        bias_error=bias_error,
    )
    prior = _prior_facts(facts, expansion, stage, quantizer, prior_bias)
    _describe_layer(details, prior, facts, weight)
    squared, total = float(change.square().sum()), float(weight.square().sum())
    loss = LinearLoss(squared, squared / total if total > 0 else 0.0, 0.0, 0.0, 0)
    return DataFreeResult(QuantizedWeight(spec, tensors, loss), prior, facts, details)


def _tensors(expansion: Expansion, levels: int, rows: bool) -> dict[str, Tensor]:
    codes = expansion.codes if rows else expansion.codes.mT.contiguous()
    scales = expansion.scales[:, None] if rows else expansion.scales[None, :]
    return {"packed_codes": pack_codes(codes, levels), "scales": scales.contiguous()}


def _restored(expansion: Expansion, levels: int, stage: DualStage) -> Float[Tensor, "v d"]:
    """L q, a few vectors at a time."""
    count = max((1 << 23) // stage.num_coefficients, 1)
    parts = zip(expansion.codes.split(count), expansion.scales.double().split(count), strict=True)
    return torch.cat(
        [stage.synthesis(code_values(codes, levels, torch.float64) * s[:, None]) for codes, s in parts]
    )


def _quantize_bias(
    bias: Tensor | None,
    quantizer: SigmaDelta,
    spec: LinearSpec,
    tensors: dict[str, Tensor],
    details: dict[str, Any],
) -> tuple[float, float]:
    """Add the bias's tensors and figures; returns its error bound a priori (maybe infinite) and its measured error."""
    assert isinstance(spec.code, SigmaDeltaSpec)
    if bias is None or not spec.code.bias_size:
        return 0.0, 0.0
    stage = harmonic_stage(bias_frame(spec))
    expansion = quantizer.quantize(bias.double()[None], stage)
    tensors["packed_bias"] = pack_codes(expansion.codes, quantizer.levels)
    tensors["bias_scale"] = expansion.scales[:, None].contiguous()
    norm, error = float(bias.double().norm()), float(expansion.errors[0])
    details["bias_relative_error"] = error / norm if norm > 0 else 0.0
    norms = ShapedNorms.of(stage, quantizer.order)
    return float(vector_bound_prior(expansion.stable_steps, norms)[0]), error


def _figures(
    quantizer: SigmaDelta, expansion: Expansion, stage: DualStage, vectors: Tensor
) -> dict[str, Any]:
    """Overloads and the bounds of single vectors."""
    norms, steps = ShapedNorms.of(stage, quantizer.order), expansion.steps(stage)
    lengths = vectors.norm(dim=1)
    posterior = vector_bound_posterior(steps, expansion.peaks, expansion.energies, norms)
    vector: dict[str, Any] = {
        "measured": float(expansion.errors.max()),
        "a_posteriori": Bound(posterior, lengths).to_dict(),
    }
    prior = vector_bound_prior(expansion.stable_steps, norms)
    if bool(torch.isfinite(prior).all()):
        vector["a_priori"] = Bound(prior, lengths).to_dict()
    return {
        "overloads": int(expansion.overloads.sum()),
        "coefficients": expansion.codes.numel(),
        "largest_state": float(expansion.peaks.max()),
        "vector_bounds": vector,
    }


def _prior_facts(
    facts: LayerFacts, expansion: Expansion, stage: DualStage, quantizer: SigmaDelta, bias_error: float
) -> LayerFacts | None:
    each = vector_bound_prior(expansion.stable_steps, ShapedNorms.of(stage, quantizer.order))
    error = float(each.norm())  # ‖·‖₂ ≤ ‖·‖_F
    if not math.isfinite(error + bias_error):
        return None
    return LayerFacts(facts.weight_norm, facts.weight_norm + error, error, facts.bias_norm, bias_error)


def _describe_layer(
    details: dict[str, Any], prior: LayerFacts | None, posterior: LayerFacts, weight: Tensor
) -> None:
    """Bounds on ``‖(W - Ŵ) x‖`` for unit inputs, beside ‖W‖: vacuous where the whole output may be lost."""
    reference = torch.tensor(posterior.weight_norm, dtype=torch.float64)
    layer = {"a_posteriori": Bound(torch.tensor(posterior.weight_error).double(), reference).to_dict()}
    if prior is not None:
        layer["a_priori"] = Bound(torch.tensor(prior.weight_error).double(), reference).to_dict()
    details["layer_bounds"] = layer
