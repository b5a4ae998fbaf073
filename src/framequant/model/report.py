"""What a run did: its settings, every linear's figures, and how much of the model is quantized.

Plain data that goes to ``framequant_report.json`` and back; pages and tables are made from it alone.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from framequant.codes.sigma_delta import SigmaDeltaSpec
from framequant.frames import FrameKind, FrameSpec
from framequant.quantizers.weight import QuantizedWeight
from framequant.spec import LinearSpec
from framequant.storage import num_bytes

REPORT_VERSION = 1


@dataclass
class LinearReport:
    """Figures of one linear.

    Attributes:
        name: qualified module name.
        in_features, out_features: shape of the original weight.
        frame_in, frame_out: what the frames are, in words.
        code: what the code is, in words.
        redundancy: true r_in · r_out.
        bytes: bytes of each stored part, "frame" being its entry in ``config.json``.
        bits_per_weight: 8 × all these bytes over the number of original weights.
        proxy_loss: tr(E H Eᵀ) against the target on the calibration data.
        relative_loss: that over tr(W H Wᵀ).
        target_change: squared relative distance of the target from the weight.
        damping: fraction of the mean diagonal used, after escalation.
        escalations: how often the damping had to be raised.
        tokens: calibration tokens seen; 0 means that an identity Hessian was used, but for experts whose
            ``details["hessian"]`` says otherwise.
        residual_correction: whether the residual stream's deviation was corrected.
        seconds: time spent on this linear's group, divided by the number of its members.
        details: what only some codes have: Sigma-Delta's overloads, bounds and nearest rounding at equal bits.
    """

    name: str
    in_features: int
    out_features: int
    frame_in: str
    frame_out: str
    code: str
    redundancy: float
    bytes: dict[str, int]
    bits_per_weight: float
    proxy_loss: float
    relative_loss: float
    target_change: float
    damping: float
    escalations: int
    tokens: int
    residual_correction: bool
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """Number of original weights."""
        return self.in_features * self.out_features


@dataclass
class QuantizationReport:
    """A whole run.

    Attributes:
        config: settings, as ``FrameQuantConfig.to_dict`` gives them.
        linears: one entry per quantized linear, in order of the walk.
        skipped: linears inside the blocks that stayed float, with the reason.
        model: class name and parameter counts.
        environment: versions, device, dtype, threads.
        allocation: what each linear was given of a bit budget, see ``allocation.Shares``; empty without one.
        warnings: what a reader should know.
        seconds: wall-clock time of the walk.
        trained_ahead: steps and rate of training between blocks, samples trained on and those of them that rounding
            saw, the mean loss after each block, and the seconds; empty without it.
        tuning: what tuning did, as ``TuningReport.to_dict`` gives it; empty without tuning.
        bounds: of the whole network's error, where they are known (Sigma-Delta).
    """

    config: dict[str, Any]
    linears: list[LinearReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trained_ahead: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Measured bits per original weight over all quantized linears."""
        weights = sum(entry.num_weights for entry in self.linears)
        return 8 * sum(sum(entry.bytes.values()) for entry in self.linears) / max(weights, 1)

    @property
    def redundancy(self) -> float:
        """True redundancy, averaged over weights."""
        weights = sum(entry.num_weights for entry in self.linears)
        return sum(entry.redundancy * entry.num_weights for entry in self.linears) / max(weights, 1)

    @property
    def coverage(self) -> float:
        """Share of the weights of the blocks' linears and fused experts that is quantized."""
        weights = sum(entry.num_weights for entry in self.linears)
        return weights / max(self.model.get("block_linear_weights", weights), weights, 1)

    @property
    def parameter_share(self) -> float:
        """Share of all parameters of the model, embeddings and head included, that is quantized."""
        weights = sum(entry.num_weights for entry in self.linears)
        return weights / max(self.model.get("parameters", weights), weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``from_dict`` inverts it."""
        return {
            "version": REPORT_VERSION,
            "summary": {
                "bits_per_weight": self.bits_per_weight,
                "redundancy": self.redundancy,
                "coverage": self.coverage,
                "parameter_share": self.parameter_share,
                "quantized_linears": len(self.linears),
                "quantized_weights": sum(entry.num_weights for entry in self.linears),
            },
            **asdict(self),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationReport:
        """Rebuild a report from ``to_dict``'s form."""
        values = {key: value for key, value in data.items() if key not in ("version", "summary")}
        values["linears"] = [LinearReport(**entry) for entry in values["linears"]]
        return cls(**values)


def linear_report(
    name: str, result: QuantizedWeight, tokens: int, residual_correction: bool, seconds: float
) -> LinearReport:
    """Make the entry of one linear."""
    spec = result.spec
    parts = stored_bytes(name, spec, result.tensors)
    return LinearReport(
        name=name,
        in_features=spec.in_features,
        out_features=spec.out_features,
        frame_in=describe_frame(spec.frame_in),
        frame_out=describe_frame(spec.frame_out),
        code=describe_code(spec),
        redundancy=spec.redundancy,
        bytes=parts,
        bits_per_weight=8 * sum(parts.values()) / spec.num_weights,
        proxy_loss=result.loss.proxy,
        relative_loss=result.loss.relative,
        target_change=result.loss.target_change,
        damping=result.loss.damping,
        escalations=result.loss.escalations,
        tokens=tokens,
        residual_correction=residual_correction,
        seconds=seconds,
        details={} if result.loss.gain == 1.0 else {"scales_shrunk_by": result.loss.gain},
    )


def stored_bytes(name: str, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each stored part of a linear, "frame" being its entry in ``config.json``."""
    return {**num_bytes(tensors), "frame": len(json.dumps(config_entry(name, spec))) - 1}


def recount(entry: LinearReport, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> None:
    """Bring an entry's code and bytes up to date with what the linear stores now."""
    entry.code = describe_code(spec)
    entry.bytes = stored_bytes(entry.name, spec, tensors)
    entry.bits_per_weight = 8 * sum(entry.bytes.values()) / spec.num_weights


def config_entry(name: str, spec: LinearSpec, scheme: int = 0) -> dict[str, list[int]]:
    """A linear's entry in ``config.json``: the number of its scheme and its two sign seeds."""
    return {name: [scheme, spec.frame_in.seed, spec.frame_out.seed]}


def describe_frame(frame: FrameSpec) -> str:
    """A frame in words."""
    if frame.kind is FrameKind.HARMONIC:
        dual = f" sobolev dual of order {frame.dual_order}" if frame.dual_order else ""
        return f"harmonic N={frame.num_subspaces} N/d={frame.redundancy:.4f}{dual}"
    if frame.kind is FrameKind.FUSION:
        return f"fusion k={frame.num_subspaces} l={frame.subspace_dim} r={frame.redundancy:.4f}"
    if frame.kind is FrameKind.BLOCK_HADAMARD:
        return f"block_hadamard b={frame.subspace_dim}"
    return frame.kind.value


def describe_code(spec: LinearSpec) -> str:
    """A code, and how activations are rounded, in words."""
    activation = spec.activation
    if activation is None:
        return _describe_code(spec)
    place = "frame coefficients" if activation.space == "frame" else "features"
    return f"{_describe_code(spec)}; {place} in {activation.bits} bits, step per {activation.scaling}"


def _describe_code(spec: LinearSpec) -> str:
    code = spec.code
    if isinstance(code, SigmaDeltaSpec):
        kind = f"sigma-delta order {code.order}" if code.order else "memoryless in the frame"
        return f"{code.num_levels} levels, {kind}, {code.vectors.value}"
    if hasattr(code, "num_levels"):
        scope = "tensor" if code.per_tensor else f"{code.group_size} columns" if code.group_size else "row"
        return f"{code.num_levels} levels, {code.kind.value}, scale per {scope}"
    factors = ", a factor per row" if code.row_factors else ""
    pairs = ", two weights a state" if code.per_state == 2 else ""
    tiles = f"tiles {code.tile_rows}x{code.tile_cols}"
    return f"trellis 2^{code.state_bits}{pairs}, rates {code.rates}, {tiles}{factors}"


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Versions and machine, for the report."""
    import torch

    versions = {}
    for package in ("framequant", "torch", "transformers", "timm", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": device,
        "device_name": name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
