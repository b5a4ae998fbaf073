"""What is stored for one linear: its shape, its two frames and its code, without any tensor.

A ``LinearSpec`` is everything needed to rebuild an empty layer of the right shape before its bytes are read,
and to say what each byte means. It is written to and read from ``quantization_config`` in ``config.json``;
reading validates every field, because a checkpoint is untrusted input. Specs of one model repeat a lot, so
they are written once each, as *schemes*, and a linear names its scheme and its two sign seeds.

Must not import layers, models or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from framequant.codes.activation import ActivationSpec
from framequant.codes.grid import GridSpec
from framequant.codes.sigma_delta import SigmaDeltaSpec
from framequant.codes.trellis import TrellisSpec
from framequant.errors import CheckpointError, FrameQuantError
from framequant.frames import FrameSpec

#: Largest number of features of one side of a linear that a checkpoint may claim.
MAX_FEATURES = 1 << 24

CodeSpec = GridSpec | TrellisSpec | SigmaDeltaSpec

#: How ``config.json`` names the codes.
_CODE_TYPES: dict[str, type[CodeSpec]] = {
    "scalar": GridSpec,
    "trellis": TrellisSpec,
    "sigma_delta": SigmaDeltaSpec,
}


@dataclass(frozen=True)
class LinearSpec:
    """Shape, frames and code of one quantized linear ``y = T_outᵀ D̃ T_in x + b``.

    Attributes:
        in_features: number of input features d_in.
        out_features: number of output features d_out.
        frame_in: analysis operator T_in acting on the input features.
        frame_out: operator T_out acting on the output features; its synthesis ends the layer.
        code: what the stored integers mean.
        activation: how activations are rounded before the product; None for float activations.
    """

    in_features: int
    out_features: int
    frame_in: FrameSpec
    frame_out: FrameSpec
    code: CodeSpec
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        """Check that the frames fit the shape.

        Raises:
            CheckpointError: a frame acts on another dimension than the linear has.
        """
        for name, features, frame in (
            ("in_features", self.in_features, self.frame_in),
            ("out_features", self.out_features, self.frame_out),
        ):
            if (
                not isinstance(features, int)
                or isinstance(features, bool)
                or not 1 <= features <= MAX_FEATURES
            ):
                raise CheckpointError(f"{name} = {features!r}: expected an integer from 1 to {MAX_FEATURES}.")
            if frame.dim != features:
                raise CheckpointError(f"{name} = {features}, but its frame acts on dimension {frame.dim}.")
        if isinstance(self.code, SigmaDeltaSpec) and 0 < self.code.bias_size < self.out_features:
            raise CheckpointError(
                f"bias_size = {self.code.bias_size} vectors cannot span R^{self.out_features}."
            )

    @property
    def num_weights(self) -> int:
        """Number of original weights, the denominator of bits per weight."""
        return self.in_features * self.out_features

    @property
    def coefficient_shape(self) -> tuple[int, int]:
        """Rows and columns of the coefficient matrix D (m_out, m_in)."""
        return self.frame_out.num_coefficients, self.frame_in.num_coefficients

    @property
    def redundancy(self) -> float:
        """True redundancy r_in · r_out."""
        rows, cols = self.coefficient_shape
        return rows * cols / self.num_weights

    def scheme(self) -> LinearSpec:
        """The spec with its seeds set to zero: what linears of one kind have in common."""
        return self.with_seeds(0, 0)

    def with_seeds(self, seed_in: int, seed_out: int) -> LinearSpec:
        """A copy with other sign seeds."""
        return replace(
            self,
            frame_in=replace(self.frame_in, seed=seed_in),
            frame_out=replace(self.frame_out, seed=seed_out),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``from_dict`` inverts it."""
        kind = next(name for name, code in _CODE_TYPES.items() if isinstance(self.code, code))
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "frame_in": self.frame_in.to_dict(),
            "frame_out": self.frame_out.to_dict(),
            "code": {"type": kind, **self.code.to_dict()},
            **({} if self.activation is None else {"activation": self.activation.to_dict()}),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "scheme") -> LinearSpec:
        """Rebuild a spec from ``to_dict``'s form.

        Args:
            data: untrusted parsed JSON.
            where: the key that holds it, for messages.

        Raises:
            CheckpointError: a field is missing, unknown, of another type or out of range.
        """
        expected = {"in_features", "out_features", "frame_in", "frame_out", "code"}
        if not isinstance(data, dict) or set(data) - {"activation"} != expected:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(f"{where}: expected the keys {sorted(expected)}, found {found}.")
        try:
            return cls(
                in_features=data["in_features"],
                out_features=data["out_features"],
                frame_in=FrameSpec.from_dict(data["frame_in"]),
                frame_out=FrameSpec.from_dict(data["frame_out"]),
                code=_code_from_dict(data["code"]),
                activation=ActivationSpec.from_dict(data["activation"]) if "activation" in data else None,
            )
        except (FrameQuantError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{where}: {error}") from error


def _code_from_dict(data: Any) -> CodeSpec:
    if not isinstance(data, dict):
        raise CheckpointError(f"code: expected a mapping, found {type(data).__name__}.")
    fields = dict(data)
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in _CODE_TYPES:
        raise CheckpointError(f"code: unknown type {kind!r}; this version reads {', '.join(_CODE_TYPES)}.")
    return _CODE_TYPES[kind].from_dict(fields)
