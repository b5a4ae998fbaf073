"""The settings of a quantization run, as one frozen dataclass, and the presets.

Every choice that changes the result is a field here, is written into the checkpoint, and can be overridden for
single linears. Presets differ only in these fields, so a comparison of two of them changes exactly what the
fields say. Unknown keys are refused with the nearest known one.

Must not import quantizers, layers or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum, StrEnum
from typing import Any

from framequant.codes.activation import ActivationScaling, ActivationSpace, ActivationSpec
from framequant.codes.grid import GridKind, GridSpec, ZeroPoint, closed_loop_clip
from framequant.codes.sigma_delta import Dual, SigmaDeltaSpec, Step, Vectors, parse_dual, parse_step
from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.codes.trellis_codebook import CODEBOOK_ID, PAIR_ID
from framequant.errors import ConfigError, nearest
from framequant.frames import FrameKind

CONFIG_VERSION = 1
DEFAULT_SWEEPS = 2
OUTPUT_HADAMARD_BLOCKS = (8, 16, 32, 64, 128, 256, 512, 1024)


class CodeKind(StrEnum):
    """Which family of codes the integers belong to."""

    SCALAR = "scalar"
    TRELLIS = "trellis"
    SIGMA_DELTA = "sigma_delta"


class Allocation(StrEnum):
    """How the bits are shared out: the same rate for all, or where the model's loss feels them most."""

    UNIFORM = "uniform"
    SENSITIVITY = "sensitivity"


class Rounding(StrEnum):
    """How codes are chosen: each by itself, or with errors fed forward through the Hessian."""

    NEAREST = "nearest"
    LDLQ = "ldlq"


class Denoise(StrEnum):
    """What is done to the scales of chosen codes; see ``quantizers.denoise``."""

    NONE = "none"
    WIENER = "wiener"
    GAIN = "gain"


class ColumnOrder(StrEnum):
    """Order in which LDLQ visits columns.

    Far apart within a group of a frame with many subspaces and else as they lie; always as they lie; or by falling
    diagonal of the Hessian.
    """

    SPREAD = "spread"
    NATURAL = "natural"
    DESCENDING = "descending"


@dataclass(frozen=True)
class FrameQuantConfig:
    """Settings of one quantization run.

    Attributes:
        bits: width of a code. Scalar codes: an integer 1…8. Trellis: any multiple of 1/8 from 1 to 8.
        redundancy: r ≥ 1 of the fusion frame on the input side; the code costs ``bits · r`` per weight. The
            nearest constructible redundancy is used and reported.
        two_sided: the same redundancy on the output side too, as the paper has it; costs ``bits · r²``.
        frame: transform before the code: "fusion" (tight fusion frame after a randomized Hadamard transform),
            "hadamard" (that transform alone, r = 1), "identity" (none); "harmonic" for Sigma-Delta codes only.
        output_hadamard_block: rotate outputs by Hadamard transforms of so many outputs, a power of two from 8 to 1024,
            instead of one of all; linears whose outputs it does not divide keep that one. With 16 to 128 inference on a
            GPU ends with the product. Not for a trellis with ``output_feedback``. None for one transform.
        code: "scalar", "trellis" or "sigma_delta".
        grid: scalar codebook: "min_max", "sigma_clip", "uniform", "lloyd_max", "search".
        levels: number of scalar levels, 2…16, instead of 2**bits; 5 levels take 7/3 bits. Sigma-Delta: 2K, even,
            2…256; 2 by default.
        clip_sigmas: half range of the "sigma_clip" grid in standard deviations of a row; None for the range
            that suits error feedback, see ``codes.grid.closed_loop_clip``.
        zero_point: "symmetric", "float" (row mean) or "integer".
        group_size: columns that share a scale; None for whole rows.
        per_tensor_scale: one scale for the whole matrix instead of one per row.
        clip_coefficients: clamp coefficients to the grid's range before rounding. Without it they are clamped
            by the rounding itself, whose error feedback then repairs part of what the clamp took.
        state_bits: log2 of the number of trellis states, 8…16.
        weights_per_state: of a trellis, 1 or 2. With two, ``state_bits`` = 16 and a rate of 2 bits, a token takes two
            thirds of the time on a GPU; rates end at 4 bits then.
        tile_rows: rows of a trellis tile.
        tile_cols: columns of a trellis tile, the panel of block LDLQ.
        activation_bits: round what the codes are multiplied with to so many bits, 2…8; None for float activations.
        activation_scaling: the step of an activation: "token" (its token's largest entry), "static" (fitted on
            calibration data), "twin" (one for negative and one for positive entries, likewise).
        activation_space: "frame": coefficients T_in x are rounded; "input": the features x.
        row_factors: a byte per row of a trellis matrix for a factor that a later tuning trains.
        allocation: "uniform": every linear has ``bits``; "sensitivity" (trellis): ``bits`` is what all linears
            together take on disk per weight, any real number, and each gets the rate that serves the model best.
        rate_spread: how far these rates part, 0 to 1: the exponent of the sensitivities. 1 is the optimum if what
            calibration says of a linear held for every text; 0 gives all linears one rate.
        rate_tilt: errors of the last block are taken for so many times as harmful as calibration says, compared with
            the first block's, 0.01 to 100: what early blocks lose, later ones are trained to make good. None for 4 with
            ``train_ahead`` and for 1 without.
        rounding: "ldlq" or "nearest".
        output_feedback: feed errors also from row to row, through the second moment of output gradients. It needs
            a backward pass through the float model.
        output_damping: of that moment, a fraction of its mean diagonal.
        token_weights: exponent γ in [0, 1]: calibration tokens count with the γ-th power of their squared output
            gradient, so that tokens which the loss does not feel weigh less.
        output_block: rows that are rounded without feedback among them, a multiple of ``tile_rows``.
        column_order: "spread" (see ``frames.order``; trellis codes visit columns as they lie), "natural" or
            "descending".
        refine_sweeps: how often the codes that LDLQ chose are revisited, 0…16: each column is rounded again
            with all others known, which never raises the loss. Scalar codes only; a sweep costs two LDLQ. None
            for two sweeps where the code and the rounding allow them.
        denoise: after the codes are chosen, each row's scales are multiplied by its Wiener shrinkage ("wiener") or by
            the gain of least loss ("gain"), which costs no bits; scalar codes with scales per row. "none" for neither.
        damping: fraction of the Hessian's mean diagonal added before it is factored; raised if that fails.
        recapture: capture each group of linears after the group before it was quantized, not once per block.
        float_targets: α in [0, 1]: how far weights are corrected towards the float model's inputs.
        residual_targets: β in [0, 1]: the same for the residual stream's accumulated deviation.
        train_ahead: steps of Adam after each block, in which the blocks that are still float learn to live with the
            rounded ones, see ``model.train_ahead``; 0 for none. Takes a second model's memory, and no streaming.
        train_rate: of these steps, relative to the size of a parameter's entries.
        rounding_samples: with ``train_ahead``: rounding sees so many calibration samples, the first, and the rest
            trains only, which is cheaper; None for 1024 (``model.walk.ROUNDING_SAMPLES``). Without training it sees
            all of them.
        walk_dtype: "float32" or "float64" to run the calibration in, whatever the model's dtype; None for that.
            In float64 CPU and GPU choose the same codes.
        include: regular expressions of module names to quantize; empty for every linear inside the blocks.
            Linears outside the blocks (heads) are quantized only if named here.
        ignore: regular expressions of module names to leave in float.
        overrides: settings for single linears: a regular expression of module names and the fields to change.
        seed: of the random signs.
        frame_size_ratio: Sigma-Delta: N/d of the harmonic frame; a weight costs ``N/d · log2(levels)`` bits.
        order: Sigma-Delta: 1…3; 0 for memoryless codes in the frame.
        step: Sigma-Delta: "stable", "norm", "mse", or the step itself.
        dual: Sigma-Delta: the dual frame that decodes, "canonical" or "sobolev".
        vectors: Sigma-Delta: whether "rows" or "columns" of the weight are expanded in the frame.
        random_signs: Sigma-Delta: whether coordinates get random signs before the frame; the paper has none, and
            weights that resemble their neighbours then need a larger step.
        quantize_bias: Sigma-Delta: whether biases are quantized too.
        flip_passes: Sigma-Delta: passes of the post-pass that flips codes; 0 for none.
    """

    bits: float = 2
    redundancy: float = 1.125
    two_sided: bool = False
    frame: FrameKind = FrameKind.FUSION
    output_hadamard_block: int | None = None
    code: CodeKind = CodeKind.SCALAR
    grid: GridKind = GridKind.SIGMA_CLIP
    levels: int | None = None
    clip_sigmas: float | None = None
    zero_point: ZeroPoint = ZeroPoint.SYMMETRIC
    group_size: int | None = None
    per_tensor_scale: bool = False
    clip_coefficients: bool = False
    state_bits: int = 12
    weights_per_state: int = 1
    tile_rows: int = 16
    tile_cols: int = 16
    activation_bits: int | None = None
    activation_scaling: ActivationScaling = ActivationScaling.TOKEN
    activation_space: ActivationSpace = ActivationSpace.FRAME
    row_factors: bool = False
    allocation: Allocation = Allocation.UNIFORM
    rate_spread: float = 1.0
    rate_tilt: float | None = None
    rounding: Rounding = Rounding.LDLQ
    output_feedback: bool = False
    output_damping: float = 0.1
    output_block: int = 64
    token_weights: float = 0.0
    column_order: ColumnOrder = ColumnOrder.SPREAD
    refine_sweeps: int | None = None
    denoise: Denoise = Denoise.NONE
    damping: float = 0.01
    recapture: bool = True
    float_targets: float = 0.5
    residual_targets: float = 0.5
    train_ahead: int = 0
    train_rate: float = 2e-3
    rounding_samples: int | None = None
    walk_dtype: str | None = None
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    frame_size_ratio: float = 8.0
    order: int = 1
    step: Step | float = Step.MSE
    dual: Dual = Dual.CANONICAL
    vectors: Vectors = Vectors.ROWS
    random_signs: bool = True
    quantize_bias: bool = True
    flip_passes: int = 0

    def __post_init__(self) -> None:
        """Coerce strings to enums and check every field.

        Raises:
            ConfigError: a value is of the wrong type, out of range, or contradicts another.
        """
        for name, enum in _ENUMS.items():
            object.__setattr__(self, name, _coerce(name, enum, getattr(self, name)))
        for name in ("include", "ignore"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        self._check_types()
        self._check_ranges()
        self._check_contradictions()
        self._check_sigma_delta()
        for pattern in (*self.include, *self.ignore, *self.overrides):
            _check_pattern(pattern)
        for pattern, changes in self.overrides.items():
            _check_override(pattern, changes)
        self.code_spec()
        if self.activation_spec() is not None and self.code is CodeKind.SIGMA_DELTA:
            raise ConfigError(
                "activation_bits needs code = 'scalar' or 'trellis'; leave it out for Sigma-Delta codes."
            )

    def _check_types(self) -> None:
        for name in (
            *("two_sided", "per_tensor_scale", "clip_coefficients", "recapture", "output_feedback"),
            *("row_factors", "random_signs", "quantize_bias"),
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected true or false.")
        for name in (
            *(
                "state_bits",
                "weights_per_state",
                "tile_rows",
                "tile_cols",
                "output_block",
                "seed",
                "order",
                "flip_passes",
            ),
            "train_ahead",
        ):
            if not _is_int(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected an integer.")
        for name in ("levels", "group_size", "refine_sweeps", "output_hadamard_block", "rounding_samples"):
            if getattr(self, name) is not None and not _is_int(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected an integer or nothing.")
        for name in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} = {value!r}: expected a number.")

    def _check_ranges(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not low <= value <= high:
                raise ConfigError(f"{name} = {value}: expected a value from {low:g} to {high:g}.")
        for name in ("tile_rows", "tile_cols"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected a positive integer.")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size = {self.group_size}: expected a positive integer.")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: expected a non-negative integer.")

    def _check_contradictions(self) -> None:
        if self.walk_dtype not in (None, "float32", "float64"):
            raise ConfigError(
                f"walk_dtype = {self.walk_dtype!r}.{nearest(str(self.walk_dtype), ('float32', 'float64'))}"
            )
        if self.redundancy > 1 and self.frame is not FrameKind.FUSION:
            raise ConfigError(
                f"redundancy = {self.redundancy} needs frame = 'fusion'; frame = {self.frame.value!r} has redundancy 1."
            )
        self._check_output_frame()
        if self.rounding_samples is not None and not self.train_ahead:
            raise ConfigError(
                f"rounding_samples = {self.rounding_samples} leaves the other samples to train_ahead, which is 0: give "
                "train_ahead, or fewer samples."
            )
        if self.code is CodeKind.SCALAR and self.levels is None and self.bits != int(self.bits):
            raise ConfigError(
                f"bits = {self.bits}: a scalar code has a whole number of bits. "
                f"Use bits = {int(self.bits)} with redundancy = {self.bits / int(self.bits):.4g}, or code = 'trellis'."
            )
        if self.code is CodeKind.TRELLIS and self.column_order is ColumnOrder.DESCENDING:
            raise ConfigError(
                "column_order = 'descending' needs code = 'scalar': trellis tiles are adjacent columns."
            )
        if self.output_block < 1 or (self.code is CodeKind.TRELLIS and self.output_block % self.tile_rows):
            raise ConfigError(
                f"output_block = {self.output_block}: expected a multiple of tile_rows = {self.tile_rows}."
            )
        if self.code is CodeKind.SCALAR and self.shares_bits:
            raise ConfigError(
                f"allocation = {self.allocation.value!r} needs code = 'trellis', whose rates are fractions."
            )
        if self.denoise is not Denoise.NONE and (self.code is not CodeKind.SCALAR or self.per_tensor_scale):
            raise ConfigError(f"denoise = {self.denoise.value!r} needs a scalar code with scales per row.")
        if self.weights_per_state != 1 and self.code is not CodeKind.TRELLIS:
            raise ConfigError(
                f"weights_per_state = {self.weights_per_state} needs code = 'trellis'; only its codes have states."
            )
        if self.code is CodeKind.SCALAR and self.row_factors:
            raise ConfigError("row_factors = true needs code = 'trellis'; a scalar code has scales per row.")
        if self.refine_sweeps and self.code is CodeKind.TRELLIS:
            raise ConfigError(
                f"refine_sweeps = {self.refine_sweeps} needs code = 'scalar': sweeps move single columns."
            )
        if self.refine_sweeps and self.rounding is Rounding.NEAREST:
            raise ConfigError(
                f"refine_sweeps = {self.refine_sweeps} needs rounding = 'ldlq': 'nearest' takes no Hessian."
            )

    def _check_output_frame(self) -> None:
        block = self.output_hadamard_block
        if self.frame is FrameKind.BLOCK_HADAMARD:
            raise ConfigError(
                "frame = 'block_hadamard' is for the output side only: use frame = 'fusion' and output_hadamard_block."
            )
        if block is None:
            return
        if block not in OUTPUT_HADAMARD_BLOCKS:
            raise ConfigError(
                f"output_hadamard_block = {block}: expected one of {', '.join(map(str, OUTPUT_HADAMARD_BLOCKS))}."
            )
        if self.frame not in (FrameKind.FUSION, FrameKind.HADAMARD) or (
            self.two_sided and self.redundancy > 1
        ):
            raise ConfigError(
                f"output_hadamard_block = {block} needs frame = 'fusion' or 'hadamard' and an output side without "
                "redundancy; leave two_sided = false."
            )
        if self.code is CodeKind.TRELLIS and self.output_feedback:
            raise ConfigError(
                f"output_hadamard_block = {block} with output_feedback = true: a block's rows lie within those that "
                "get no feedback from each other, which costs a tenth of the loss. Use one of them, or a scalar code."
            )

    def _check_sigma_delta(self) -> None:
        object.__setattr__(self, "step", parse_step(self.step))
        object.__setattr__(self, "dual", parse_dual(self.dual, self.order))
        if (self.code is CodeKind.SIGMA_DELTA) != (self.frame is FrameKind.HARMONIC):
            raise ConfigError(
                f"code = {self.code.value!r} with frame = {self.frame.value!r}: code = 'sigma_delta' and "
                "frame = 'harmonic' need each other; --preset sigma-delta sets both."
            )
        if self.frame_size_ratio < 1:
            raise ConfigError(
                f"frame_size_ratio = {self.frame_size_ratio:g}: fewer vectors than dimensions cannot be a frame; the "
                "least ratio is 1 for odd dimensions and 1 + 1/d for even ones. Use 2 or more."
            )
        for pattern, changes in self.overrides.items():
            if isinstance(changes, Mapping) and changes.get("code", self.code) != self.code:
                kinds = {str(changes["code"]), self.code.value}
                if CodeKind.SIGMA_DELTA.value in kinds:
                    raise ConfigError(
                        f"override {pattern!r}: Sigma-Delta needs no calibration data and other codes do, so one run "
                        "cannot do both; ignore these linears instead."
                    )
        if self.code is CodeKind.SIGMA_DELTA and self.bits not in (2, math.log2(self.levels or 2)):
            raise ConfigError(
                f"bits = {self.bits}: Sigma-Delta codes have levels; for {self.bits:g} bits a code use levels = "
                f"{round(2**self.bits)}."
            )

    def code_spec(self) -> GridSpec | TrellisSpec | SigmaDeltaSpec:
        """The code that these settings describe.

        Raises:
            ConfigError: the code does not exist.
        """
        if self.code is CodeKind.TRELLIS:
            bits = round(8 * self.bits) / 8 if self.shares_bits else self.bits
            return TrellisSpec(
                self.state_bits,
                rate_pattern(bits, self.weights_per_state),
                self.tile_rows,
                self.tile_cols,
                PAIR_ID if self.weights_per_state == 2 else CODEBOOK_ID,
                row_factors=self.row_factors,
            )
        if self.code is CodeKind.SIGMA_DELTA:
            return SigmaDeltaSpec(2 if self.levels is None else self.levels, self.order, self.vectors)
        levels = self.levels if self.levels is not None else 2 ** int(self.bits)
        return GridSpec(
            kind=self.grid,
            num_levels=levels,
            zero_point=self.zero_point,
            clip_sigmas=self.clip_sigmas if self.clip_sigmas is not None else closed_loop_clip(levels),
            group_size=self.group_size,
            per_tensor=self.per_tensor_scale,
        )

    def activation_spec(self) -> ActivationSpec | None:
        """How activations are rounded; None for float activations.

        Raises:
            ConfigError: no such grid exists.
        """
        if self.activation_bits is None:
            return None
        return ActivationSpec(self.activation_bits, self.activation_scaling, self.activation_space)

    def for_linear(self, name: str) -> FrameQuantConfig | None:
        """Settings for one linear: every override whose pattern is found in ``name``, in order.

        Returns:
            The settings, or None if an override says ``skip: true``.
        """
        config = self
        for pattern, changes in self.overrides.items():
            if re.search(pattern, name):
                if changes.get("skip"):
                    return None
                config = replace(config, **{key: value for key, value in changes.items() if key != "skip"})
        return config

    def fixes_code(self, name: str) -> bool:
        """Whether an override says which code or rate a linear has, so that no allocation chooses it."""
        keys = {"bits", "code", "levels", "allocation"}
        return any(
            re.search(pattern, name) and keys & set(changes) for pattern, changes in self.overrides.items()
        )

    @property
    def sweeps(self) -> int:
        """How many refining sweeps are made; see ``refine_sweeps``."""
        if self.refine_sweeps is not None:
            return self.refine_sweeps
        return DEFAULT_SWEEPS if self.code is CodeKind.SCALAR and self.rounding is Rounding.LDLQ else 0

    @property
    def is_data_free(self) -> bool:
        """Whether quantizing needs no calibration data."""
        return self.code is CodeKind.SIGMA_DELTA

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass through the float model comes before the walk."""
        return self.shares_bits or self.output_feedback or self.token_weights > 0

    @property
    def shares_bits(self) -> bool:
        """Whether ``bits`` is a budget on disk that the linears share."""
        return self.allocation is not Allocation.UNIFORM

    @property
    def carries_float_stream(self) -> bool:
        """Whether the walk must carry the float model's activations beside the quantized ones."""
        return self.float_targets > 0 or self.residual_targets > 0

    @property
    def quant_method(self) -> str:
        """The name under which transformers finds our quantizer, for ``from_pretrained(quantization_config=…)``."""
        return "framequant"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form with a version; ``from_dict`` inverts it."""
        data = {key: value.value if isinstance(value, Enum) else value for key, value in asdict(self).items()}
        data["include"], data["ignore"] = list(self.include), list(self.ignore)
        data["overrides"] = {pattern: dict(changes) for pattern, changes in self.overrides.items()}
        return {"version": CONFIG_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrameQuantConfig:
        """Rebuild a config from ``to_dict``'s form or from YAML; a ``preset`` key names the defaults.

        Raises:
            ConfigError: unknown key or version, or a bad value.
        """
        values = dict(data)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ConfigError(f"config version {version!r}: this framequant reads version {CONFIG_VERSION}.")
        name = values.pop("preset", None)
        check_keys(values)
        return preset(name, **values) if name is not None else cls(**values)


_ENUMS: dict[str, type[Enum]] = {
    "frame": FrameKind,
    "code": CodeKind,
    "grid": GridKind,
    "zero_point": ZeroPoint,
    "rounding": Rounding,
    "allocation": Allocation,
    "column_order": ColumnOrder,
    "denoise": Denoise,
    "activation_scaling": ActivationScaling,
    "activation_space": ActivationSpace,
    "vectors": Vectors,
}

_OPTIONAL = {"clip_sigmas", "refine_sweeps", "rate_tilt", "rounding_samples"}

_RANGES: dict[str, tuple[float, float]] = {
    "bits": (1, 8),
    "weights_per_state": (1, 2),
    "redundancy": (1, 8),
    "clip_sigmas": (0.1, 16),
    "refine_sweeps": (0, 16),
    "damping": (0, 10),
    "output_damping": (0, 100),
    "token_weights": (0, 1),
    "rate_spread": (0, 1),
    "rate_tilt": (0.01, 100),
    "train_ahead": (0, 10_000),
    "train_rate": (0, 1),
    "rounding_samples": (1, 1_000_000),
    "float_targets": (0, 1),
    "residual_targets": (0, 1),
    "frame_size_ratio": (0, 4096),
    "flip_passes": (0, 1000),
}

_TRELLIS: dict[str, Any] = {
    "code": "trellis",
    "bits": 2.25,
    "redundancy": 1.0,
    "allocation": "sensitivity",
    "rate_spread": 0.5,
    "output_feedback": True,
    "token_weights": 0.5,
}

# The paper does not say whether the 2σ clip comes before the feedback or is the range of its grid. Clamping
# first is the same algorithm with a larger loss (set clip_coefficients), so the preset takes the grid's range.
#: Every preset as the fields in which it differs from the defaults of ``FrameQuantConfig``.
PRESETS: dict[str, dict[str, Any]] = {
    "framequant": _TRELLIS,
    "framequant-trained": {
        **_TRELLIS,
        "state_bits": 14,
        "train_ahead": 32,
        "float_targets": 1.0,
        "residual_targets": 1.0,
    },
    "framequant-scalar": {},
    "framequant-paper": {
        "two_sided": True,
        "zero_point": "float",
        "clip_sigmas": 2.0,
        "refine_sweeps": 0,
        "recapture": False,
        "float_targets": 0.0,
        "residual_targets": 0.0,
    },
    "quip": {
        "redundancy": 1.0,
        "frame": "hadamard",
        "per_tensor_scale": True,
        "clip_sigmas": 2.4,
        "refine_sweeps": 0,
        "recapture": False,
        "float_targets": 0.0,
        "residual_targets": 0.0,
    },
    "gptq": {
        "redundancy": 1.0,
        "frame": "identity",
        "grid": "min_max",
        "zero_point": "integer",
        "refine_sweeps": 0,
        "recapture": False,
        "float_targets": 0.0,
        "residual_targets": 0.0,
    },
    "rtn": {
        "redundancy": 1.0,
        "frame": "identity",
        "grid": "min_max",
        "zero_point": "integer",
        "refine_sweeps": 0,
        "rounding": "nearest",
        "recapture": False,
        "float_targets": 0.0,
        "residual_targets": 0.0,
    },
    "sigma-delta": {
        "redundancy": 1.0,
        "frame": "harmonic",
        "code": "sigma_delta",
        "levels": 2,
        "rounding": "nearest",
        "recapture": False,
        "float_targets": 0.0,
        "residual_targets": 0.0,
    },
}


def preset(name: str, **changes: Any) -> FrameQuantConfig:
    """The config of a preset, with changes on top.

    Args:
        name: one of ``PRESETS``.
        changes: fields of ``FrameQuantConfig``.

    Raises:
        ConfigError: unknown preset or field, or a bad value.

    Examples:
        >>> preset("gptq", bits=3).frame.value
        'identity'
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}.{nearest(name, PRESETS)}")
    check_keys(changes)
    return FrameQuantConfig(**{**PRESETS[name], **changes})


def check_keys(values: Mapping[str, Any]) -> None:
    """Refuse keys that are no fields of ``FrameQuantConfig``, naming the nearest one.

    Raises:
        ConfigError: an unknown key.
    """
    known = [entry.name for entry in fields(FrameQuantConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), known)}")


def _coerce(name: str, enum: type[Enum], value: Any) -> Enum:
    try:
        return enum(value)
    except ValueError:
        choices = [member.value for member in enum]
        raise ConfigError(f"{name} = {value!r}.{nearest(str(value), choices)}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}.") from error


def _check_override(pattern: str, changes: Mapping[str, Any]) -> None:
    forbidden = {
        *("include", "ignore", "overrides", "seed", "recapture", "walk_dtype", "skip"),
        *("train_ahead", "train_rate", "rounding_samples", "rate_spread", "rate_tilt"),
    }
    if not isinstance(changes, Mapping):
        raise ConfigError(f"override {pattern!r}: expected a mapping of settings, found {changes!r}.")
    check_keys({key: value for key, value in changes.items() if key != "skip"})
    for key in sorted((set(changes) & forbidden) - {"skip"}):
        raise ConfigError(f"override {pattern!r}: {key!r} holds for a whole run and cannot be overridden.")
