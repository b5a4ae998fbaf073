"""Scalar codebooks: what the integers mean, ``coefficient = scale * (level[code] - zero_point)``.

Levels and zero points are in *code units*, where the step of a uniform grid is 1; scales carry the unit of
the coefficients. A row is an output channel, a group is a run of columns that shares a scale. Everything that
``fit_grid`` returns is already rounded to what the file holds, so that the codes are chosen against the very
grid that will decode them. Rounding with error feedback lives in ``quantizers``, bytes in ``packing``; this
module imports only torch, numpy and our errors.

References:
    Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory, 1982. Max, "Quantizing for minimum
    distortion", IRE Trans. Inf. Theory, 1960. Adepu, Zeng, Zhang, Singh, ICML 2024, arXiv 2403.06082, for the
    clip at two standard deviations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from framequant.errors import CheckpointError, ConfigError, NumericalError, nearest

_E = TypeVar("_E", bound=Enum)
_SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LARGEST_OFFSET = 2.0**14  # a zero point of at most this many steps fits int16 with room for the levels
_SEARCH_FRACTIONS = [1.0 - i / 80 for i in range(65)]  # of the min-max range, down to a fifth


class GridKind(StrEnum):
    """How the range of a grid follows from the coefficients."""

    MIN_MAX = "min_max"  # from the smallest to the largest coefficient
    SIGMA_CLIP = "sigma_clip"  # clip_sigmas standard deviations around the mean
    UNIFORM = "uniform"  # the uniform step of least squared error for a Gaussian
    LLOYD_MAX = "lloyd_max"  # the levels of least squared error for a Gaussian
    SEARCH = "search"  # min-max, shrunk per group to least squared error on the coefficients


class ZeroPoint(StrEnum):
    """Where a grid is centred, and what is stored for it."""

    SYMMETRIC = "symmetric"  # at 0; nothing stored
    FLOAT = "float"  # at the mean (min-max: mid-range); a bfloat16 in code units
    INTEGER = "integer"  # there too, rounded so that 0 lies on the grid of steps; an int16


@dataclass(frozen=True)
class GridSpec:
    """Everything that determines a grid but the coefficients.

    Attributes:
        kind: How the range is found.
        num_levels: Number of code values, 2 to 16 or a power of two up to 256.
        zero_point: Where the grid is centred.
        clip_sigmas: Half of the range of ``SIGMA_CLIP``, in standard deviations.
        group_size: Columns that share a scale, the last group may be shorter; None for whole rows.
        per_tensor: One scale for the whole matrix.
        scale_dtype: Storage dtype of the scales: bfloat16, float16 or float32.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """

    kind: GridKind
    num_levels: int
    zero_point: ZeroPoint = ZeroPoint.FLOAT
    clip_sigmas: float = 2.0
    group_size: int | None = None
    per_tensor: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(GridKind, "kind", self.kind))
        object.__setattr__(self, "zero_point", _member(ZeroPoint, "zero_point", self.zero_point))
        if not _is_int(self.num_levels) or self.num_levels not in (*range(2, 17), 32, 64, 128, 256):
            raise ConfigError(
                f"num_levels={self.num_levels!r} is not possible; use 2 to 16, or 32, 64, 128 or 256."
            )
        is_number = _is_int(self.clip_sigmas) or isinstance(self.clip_sigmas, float)
        if not (is_number and math.isfinite(self.clip_sigmas) and self.clip_sigmas > 0):
            raise ConfigError(
                f"clip_sigmas={self.clip_sigmas!r} must be a positive number; the paper uses 2."
            )
        if self.group_size is not None and (not _is_int(self.group_size) or self.group_size < 1):
            raise ConfigError(
                f"group_size={self.group_size!r} must be a positive integer, or None for whole rows."
            )
        if not isinstance(self.per_tensor, bool):
            raise ConfigError(f"per_tensor={self.per_tensor!r} must be true or false.")
        if self.per_tensor and self.group_size is not None:
            raise ConfigError("per_tensor and group_size contradict each other; set one of them.")
        if str(self.scale_dtype) not in _SCALE_DTYPES:
            hint = nearest(str(self.scale_dtype), _SCALE_DTYPES)
            raise ConfigError(f"scale_dtype={self.scale_dtype!r} is not possible.{hint}")
        if self.kind is GridKind.LLOYD_MAX and self.zero_point is ZeroPoint.INTEGER:
            raise ConfigError(
                "lloyd_max levels are no integers, so there is no integer zero point; use float or symmetric."
            )

    @property
    def is_uniform(self) -> bool:
        """Whether neighbouring levels all are one step apart."""
        return self.kind is not GridKind.LLOYD_MAX

    @property
    def first_level(self) -> float:
        """The lowest level of a uniform grid, in code units."""
        return 0.0 if self.zero_point is ZeroPoint.INTEGER else -(self.num_levels - 1) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridSpec:
        """Build a spec from what ``to_dict`` returned.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not possible.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown key {key!r} in a grid.{nearest(str(key), known)}")
        for key in ("kind", "num_levels"):
            if key not in values:
                raise ConfigError(f"A grid needs the key {key!r}.")
        return cls(**values)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _member(enum: type[_E], name: str, value: object) -> _E:
    try:
        return enum(value)
    except ValueError:
        options = [str(member.value) for member in enum]
        raise ConfigError(f"{name}={value!r} is not possible.{nearest(str(value), options)}") from None


@dataclass
class Grid:
    """A fitted grid. The tensors are float32 and hold only values that their storage dtypes represent.

    Attributes:
        spec: What was asked for.
        levels: Levels in code units, ascending, of shape (num_levels,).
        scales: Coefficient units per code unit, positive, of shape (rows, groups), or (1, 1) per tensor.
        zero_points: In code units, shaped as ``scales``; None for a symmetric grid.
    """

    spec: GridSpec
    levels: Float32[Tensor, " levels"]
    scales: Float32[Tensor, "rows groups"]
    zero_points: Float32[Tensor, "rows groups"] | None

    def stored_scales(self) -> Float[Tensor, "rows groups"]:
        """Return the scales in their storage dtype; lossless."""
        return self.scales.to(_SCALE_DTYPES[self.spec.scale_dtype])

    def stored_zero_points(self) -> Tensor | None:
        """Return the zero points as int16 or bfloat16, or None; lossless."""
        if self.zero_points is None:
            return None
        integer = self.spec.zero_point is ZeroPoint.INTEGER
        return self.zero_points.to(torch.int16 if integer else torch.bfloat16)

    @classmethod
    def from_stored(cls, spec: GridSpec, scales: Tensor, zero_points: Tensor | None) -> Grid:
        """Rebuild a grid from its stored tensors; the inverse of the two methods above.

        Raises:
            CheckpointError: A zero point is missing or superfluous, shapes differ, or a value is impossible.
        """
        if (zero_points is None) != (spec.zero_point is ZeroPoint.SYMMETRIC):
            verb = "lacks its" if zero_points is None else "takes no"
            raise CheckpointError(f"A {spec.zero_point.value} grid {verb} zero points; the file is damaged.")
        if scales.ndim != 2 or (zero_points is not None and zero_points.shape != scales.shape):
            raise CheckpointError("Scales and zero points of a grid must both have the shape (rows, groups).")
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise CheckpointError("Scales of a grid must be positive and finite; the file is damaged.")
        if zero_points is not None and not bool(torch.isfinite(zero_points).all()):
            raise CheckpointError("Zero points of a grid must be finite; the file is damaged.")
        levels_ = levels(spec).to(scales.device, torch.float32)
        return cls(spec, levels_, scales.float(), None if zero_points is None else zero_points.float())


def levels(spec: GridSpec) -> Float64[Tensor, " levels"]:
    """Return the levels in code units, ascending; every value is exact in float32.

    Uniform grids count from 0 with an integer zero point and are centred at 0 otherwise. ``LLOYD_MAX`` gives
    the centroids of a unit Gaussian.

    Args:
        spec: The grid.

    Returns:
        A new float64 tensor of shape (num_levels,) on the CPU.
    """
    if not spec.is_uniform:
        return torch.tensor(_lloyd_max_levels(spec.num_levels), dtype=torch.float64)
    return torch.arange(spec.num_levels, dtype=torch.float64) + spec.first_level


# --- The unit Gaussian ------------------------------------------------------------------------------------


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _mass(low: Tensor, high: Tensor) -> Tensor:
    """Probability of [low, high], from whichever tail is nearer, so that thin cells keep their digits."""
    flip = low + high < 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    return (torch.erfc(a / math.sqrt(2)) - torch.erfc(b / math.sqrt(2))) / 2


def _cells(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return both ends of the cell of numbers nearest to each point; 40 stands for infinity."""
    inner = (points[1:] + points[:-1]) / 2
    end = torch.full((1,), 40.0, dtype=points.dtype)
    return torch.cat([-end, inner]), torch.cat([inner, end])


@functools.cache
def _lloyd_max_levels(num_levels: int) -> tuple[float, ...]:
    """Return the least-squares levels of a unit Gaussian, as multiples of 2**-16.

    Solves ``c = centroid(cell(c))`` by Newton's method, whose matrix is tridiagonal and diagonally dominant
    because the density is log-concave; it starts from the quantiles of N(0, 3), the high-rate point density.
    Multiples of 2**-16 are exact in float32 and far coarser than the last digits in which machines differ.
    """
    probabilities = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    points = math.sqrt(3) * torch.special.ndtri(probabilities)
    for _ in range(40):
        low, high = _cells(points)
        mass = _mass(low, high)
        centroids = (_density(low) - _density(high)) / mass
        below = _density(low) * (centroids - low) / mass / 2
        above = _density(high) * (high - centroids) / mass / 2
        jacobian = torch.diag(1 - below - above) - torch.diag(below[1:], -1) - torch.diag(above[:-1], 1)
        step = torch.linalg.solve(jacobian, points - centroids)
        points = points - step
        if float(step.abs().max()) < 1e-13:
            break
    symmetric = (points - points.flip(0)) / 2
    return tuple((torch.round(symmetric * 2**16) / 2**16).tolist())


@functools.cache
def _uniform_step(num_levels: int) -> float:
    """Return the step of the centred uniform grid of least squared error for a unit Gaussian.

    Where the derivative of the error by the step s vanishes, ``E[k x] = s E[k²]`` for the rounded x = s k;
    the left side is the sum of the density over the cell boundaries. Found by bisection.
    """
    units = torch.arange(num_levels, dtype=torch.float64) - (num_levels - 1) / 2
    low, high = 0.0, 2.0
    while high - low > 1e-15:
        step = (low + high) / 2
        left, right = _cells(units * step)
        slope = _density(right[:-1]).sum() - step * (_mass(left, right) * units**2).sum()
        low, high = (step, high) if float(slope) > 0 else (low, step)
        if step in (low, high) and math.nextafter(low, high) >= high:
            break
    return (low + high) / 2


def closed_loop_clip(num_levels: int) -> float:
    """Return the half range of a uniform grid that suits rounding with error feedback, in standard deviations.

    Feedback widens what is rounded, so the grid of least open-loop error is too narrow. The range is that of
    ``UNIFORM`` times ``1 + 1 / (2 n)``: the loss after LDLQ on four linears of SmolLM2 was within 1 % of the
    best range tried for 2, 4, 8 and 16 levels (best near 1.0, 1.68, 2.15 and 2.5).

    Args:
        num_levels: n, at least 2.

    Examples:
        >>> round(closed_loop_clip(4), 3)
        1.68
    """
    return _uniform_step(num_levels) * (num_levels - 1) / 2 * (1 + 1 / (2 * num_levels))


def _sigmas_per_step(spec: GridSpec) -> float:
    """Return the scale of a grid per standard deviation of the coefficients."""
    if spec.kind is GridKind.LLOYD_MAX:
        return 1.0
    if spec.kind is GridKind.UNIFORM:
        return _uniform_step(spec.num_levels)
    return 2 * spec.clip_sigmas / (spec.num_levels - 1)


def gaussian_error(spec: GridSpec) -> float:
    """Return the expected squared error per coefficient drawn from N(0, 1).

    Coefficients are rounded to the nearest level of the grid that their true mean and deviation give, before
    any rounding of scales. Integrated cell by cell with 64 Gauss-Legendre nodes.

    Args:
        spec: A grid whose range follows from the standard deviation.

    Returns:
        The error relative to the variance.

    Raises:
        ConfigError: ``MIN_MAX`` and ``SEARCH`` depend on the sample, not on the distribution.

    Examples:
        >>> round(gaussian_error(GridSpec(GridKind.UNIFORM, 4)), 4)
        0.1188
    """
    if spec.kind in (GridKind.MIN_MAX, GridKind.SEARCH):
        raise ConfigError(
            f"A {spec.kind.value} grid has no Gaussian error: its range follows from the sample. "
            "Use sigma_clip, uniform or lloyd_max."
        )
    zero = round((spec.num_levels - 1) / 2) if spec.zero_point is ZeroPoint.INTEGER else 0
    values = (levels(spec).numpy() - zero) * _sigmas_per_step(spec)
    ends = np.clip(np.concatenate([[-12.0], (values[1:] + values[:-1]) / 2, [12.0]]), -12.0, 12.0)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    half = np.diff(ends)[:, None] / 2
    x = ends[:-1, None] + half * (1 + nodes)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return float((half * weights * density * (x - values[:, None]) ** 2).sum())


# --- Fitting ----------------------------------------------------------------------------------------------


def fit_grid(coefficients: Float[Tensor, "rows cols"], spec: GridSpec) -> Grid:
    """Fit scales and zero points to a matrix of coefficients.

    The deviation is the population's, taken about the centre of the grid: about 0 where it is symmetric. A
    row or group without spread gets a valid grid too: the step is at least 2**-14 of the distance of its
    centre from 0, and at least the smallest normal float32 (the smallest float16, where scales are so).

    Args:
        coefficients: Finite values, of any floating dtype.
        spec: The grid wanted.

    Returns:
        The grid, on the device of the coefficients, already rounded to the storage dtypes.

    Raises:
        ConfigError: Not a non-empty floating-point matrix.
        NumericalError: A coefficient is not finite, or a scale is too large for its storage dtype.

    Cost:
        A few passes over the matrix, 65 times as many for ``SEARCH``; temporaries of its size.
    """
    if coefficients.ndim != 2 or not coefficients.is_floating_point() or not coefficients.numel():
        raise ConfigError(
            f"fit_grid needs a non-empty floating-point matrix, got {coefficients.dtype} of shape "
            f"{tuple(coefficients.shape)}."
        )
    values = coefficients if coefficients.dtype == torch.float64 else coefficients.float()
    fitted = [_fit(part, spec) for part in _by_group(values, spec)]
    scales = torch.cat([scale for scale, _ in fitted], dim=1)
    zero_points = None
    if spec.zero_point is not ZeroPoint.SYMMETRIC:
        zero_points = torch.cat([zero for _, zero in fitted if zero is not None], dim=1)
    return Grid(spec, levels(spec).to(values.device, torch.float32), scales, zero_points)


def _by_group(values: Tensor, spec: GridSpec) -> list[Float[Tensor, "rows groups columns"]]:
    """View the matrix as groups of equal size, then the shorter last group where there is one."""
    if spec.per_tensor:
        return [values.reshape(1, 1, -1)]
    size = spec.group_size or values.shape[1]
    whole = values.shape[1] // size * size
    parts = [values[:, :whole].reshape(values.shape[0], -1, size), values[:, None, whole:]]
    return [part for part in parts if part.numel()]


def _fit(values: Float[Tensor, "rows groups columns"], spec: GridSpec) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points of all groups; squares are safe from overflow by a power of two."""
    peak = values.abs().amax(dim=2)
    if not bool(torch.isfinite(peak).all()):
        raise NumericalError("The coefficients contain NaN or infinity; no grid fits them.")
    unit = torch.exp2(torch.frexp(peak).exponent.clamp(min=-125).to(values.dtype))
    centre, step = _centre_and_step(values / unit[..., None], spec)
    return _store(centre * unit, step * unit, spec)


def _centre_and_step(values: Float[Tensor, "rows groups columns"], spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Return the centre and the scale of the ideal grid of each group, in the unit of the values."""
    if spec.kind in (GridKind.MIN_MAX, GridKind.SEARCH):
        low, high = values.amin(dim=2), values.amax(dim=2)
        if spec.zero_point is ZeroPoint.SYMMETRIC:
            high = torch.maximum(high, -low)
            low = -high
        elif spec.zero_point is ZeroPoint.INTEGER:
            low, high = low.clamp(max=0), high.clamp(min=0)
        centre, step = (low + high) / 2, (high - low) / (spec.num_levels - 1)
        return _search(values, centre, step, spec) if spec.kind is GridKind.SEARCH else (centre, step)
    if spec.zero_point is ZeroPoint.SYMMETRIC:
        sigma, centre = values.square().mean(dim=2).sqrt(), torch.zeros_like(values[..., 0])
    else:
        sigma, centre = torch.std_mean(values, dim=2, correction=0)
    return centre, sigma * _sigmas_per_step(spec)


def _search(values: Tensor, centre: Tensor, step: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Shrink each range towards 0 (float zero point: towards the mean) to the least squared error."""
    anchor = values.mean(dim=2) if spec.zero_point is ZeroPoint.FLOAT else torch.zeros_like(centre)
    best = torch.full_like(centre, torch.inf)
    best_centre, best_step = centre, step
    for fraction in _SEARCH_FRACTIONS:
        new_centre, new_step = torch.lerp(anchor, centre, fraction), step * fraction
        error = _rounded(values, *_store(new_centre, new_step, spec), spec).sub_(values).square_().sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        best_centre = torch.where(better, new_centre, best_centre)
        best_step = torch.where(better, new_step, best_step)
    return best_centre, best_step


def _rounded(values: Tensor, scales: Tensor, zero_points: Tensor | None, spec: GridSpec) -> Tensor:
    """Return the values of the nearest levels, for whole groups (rows, groups, columns) of a uniform grid."""
    scales = scales[..., None]
    zero_points = None if zero_points is None else zero_points[..., None]
    units = _uniform_codes(values, scales, zero_points, spec).add_(spec.first_level)
    return (units if zero_points is None else units.sub_(zero_points)).mul_(scales)


def _store(centre: Tensor, step: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor | None]:
    """Round scale and zero point to what the file holds; the zero point follows from the rounded scale."""
    dtype = _SCALE_DTYPES[spec.scale_dtype]
    smallest = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    scales = torch.maximum(step, centre.abs() / _LARGEST_OFFSET).clamp(min=smallest).to(dtype).float()
    if not bool(torch.isfinite(scales).all()):
        raise NumericalError(
            f"A scale exceeds {torch.finfo(dtype).max:.4g}, the largest {spec.scale_dtype}; rescale the "
            "coefficients or choose another scale_dtype."
        )
    if spec.zero_point is ZeroPoint.SYMMETRIC:
        return scales, None
    offset = centre.to(torch.float64) / scales
    if spec.zero_point is ZeroPoint.FLOAT:
        return scales, (-offset).to(torch.bfloat16).float()
    return scales, torch.round((spec.num_levels - 1) / 2 - offset).clamp(-32768, 32767).float()


# --- Encoding and decoding --------------------------------------------------------------------------------


def clip_to_grid(coefficients: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "rows cols"]:
    """Clamp coefficients to the outermost levels of their grid, the paper's step before rounding.

    With ``SIGMA_CLIP`` these lie ``clip_sigmas`` deviations about the mean, up to the rounding of the stored
    scale and zero point: with an integer zero point by up to half a step.

    Args:
        coefficients: The matrix that the grid was fitted to, or one of its shape.
        grid: The fitted grid.

    Returns:
        A new tensor of the same dtype.
    """
    scales, zero_points = _columns(grid, 0, coefficients.shape[1])
    ends = [grid.levels[i] if zero_points is None else grid.levels[i] - zero_points for i in (0, -1)]
    low, high = (end * scales for end in ends)
    return torch.minimum(torch.maximum(coefficients, low), high).to(coefficients.dtype)


def encode(
    values: Float[Tensor, "rows columns"], grid: Grid, first_column: int = 0
) -> UInt8[Tensor, "rows columns"]:
    """Return the code of the level nearest to each value.

    Ties go to the even code on uniform grids, to the lower one otherwise; values beyond the grid to its ends.

    Args:
        values: Consecutive columns of the matrix, one or more; finite.
        grid: The fitted grid.
        first_column: Index of the first of them in the matrix, which decides their group.

    Returns:
        A new tensor of codes below ``num_levels``.
    """
    scales, zero_points = _columns(grid, first_column, values.shape[1])
    if grid.spec.is_uniform:
        return _uniform_codes(values, scales, zero_points, grid.spec).to(torch.uint8)
    units = values / scales
    if zero_points is not None:
        units = units + zero_points
    middles = ((grid.levels[1:] + grid.levels[:-1]) / 2).to(units.dtype)
    return torch.bucketize(units.contiguous(), middles, out_int32=True).to(torch.uint8)


def decode(
    codes: UInt8[Tensor, "rows columns"],
    grid: Grid,
    first_column: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows columns"]:
    """Return the values that codes stand for: ``scale * (level[code] - zero_point)``.

    Args:
        codes: Consecutive columns of codes, each below ``num_levels``.
        grid: The fitted grid.
        first_column: Index of the first of them in the matrix, which decides their group.
        dtype: Of the result. The arithmetic is float64 for float64, else float32, rounded once at the end.

    Returns:
        A new tensor.
    """
    scales, zero_points = _columns(grid, first_column, codes.shape[1])
    working = torch.float64 if dtype == torch.float64 else torch.float32
    if grid.spec.is_uniform:
        units = codes.to(working) + grid.spec.first_level
    else:
        units = grid.levels.to(working)[codes.to(torch.int32)]
    if zero_points is not None:
        units -= zero_points
    return (units * scales).to(dtype)


def _columns(grid: Grid, first_column: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points that broadcast over ``count`` columns; views where one group suffices."""
    size = grid.spec.group_size
    if size is None:
        return grid.scales, grid.zero_points
    first, last = first_column // size, (first_column + count - 1) // size
    if first == last:
        chosen: slice | Tensor = slice(first, first + 1)
    else:
        chosen = torch.arange(first_column, first_column + count, device=grid.scales.device) // size
    return grid.scales[:, chosen], None if grid.zero_points is None else grid.zero_points[:, chosen]


def _uniform_codes(values: Tensor, scales: Tensor, zero_points: Tensor | None, spec: GridSpec) -> Tensor:
    """Return the codes of a uniform grid, still as floats: round, then clamp to the code range."""
    units = values / scales
    units += -spec.first_level if zero_points is None else zero_points - spec.first_level
    return units.round_().clamp_(0, spec.num_levels - 1)
