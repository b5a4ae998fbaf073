"""Scalar grids: known errors of Gaussian coefficients, fitting, encoding, decoding, odd rows."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framequant.codes.grid import (
    Grid,
    GridKind,
    GridSpec,
    ZeroPoint,
    clip_to_grid,
    decode,
    encode,
    fit_grid,
    gaussian_error,
    levels,
)
from framequant.errors import CheckpointError, ConfigError, NumericalError

COUNTS = [*range(2, 17), 32, 64, 128, 256]
COMBINATIONS = [
    (kind, zero)
    for kind in GridKind
    for zero in ZeroPoint
    if not (kind is GridKind.LLOYD_MAX and zero is ZeroPoint.INTEGER)
]
every_combination = pytest.mark.parametrize(("kind", "zero_point"), COMBINATIONS)


def gaussian(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def every_value(grid: Grid) -> Tensor:
    """All decoded values of each row of a grid with one group, shape (rows, levels), float64."""
    codes = torch.arange(grid.spec.num_levels, dtype=torch.uint8).expand(grid.scales.shape[0], -1)
    return decode(codes, grid, dtype=torch.float64)


def squared_error(values: Tensor, spec: GridSpec) -> float:
    grid = fit_grid(values, spec)
    return float((decode(encode(values, grid), grid) - values).square().mean())


# --- The unit Gaussian ---


@pytest.mark.parametrize(
    ("kind", "zero_point", "expected"),
    [
        (GridKind.SIGMA_CLIP, ZeroPoint.INTEGER, 0.17139),
        (GridKind.SIGMA_CLIP, ZeroPoint.FLOAT, 0.15449),
        (GridKind.UNIFORM, ZeroPoint.FLOAT, 0.11885),
        (GridKind.LLOYD_MAX, ZeroPoint.FLOAT, 0.11748),
    ],
)
def test_gaussian_error_at_two_bits(kind: GridKind, zero_point: ZeroPoint, expected: float) -> None:
    assert gaussian_error(GridSpec(kind, 4, zero_point)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "zero_point"), [c for c in COMBINATIONS if c[0] in ("sigma_clip", "uniform")]
)
def test_gaussian_error_is_what_samples_show(kind: GridKind, zero_point: ZeroPoint) -> None:
    spec = GridSpec(kind, 5, zero_point, scale_dtype="float32")
    sample = gaussian(64, 4096)
    assert squared_error(sample, spec) == pytest.approx(gaussian_error(spec), rel=0.01)


def test_gaussian_error_needs_a_range_from_the_deviation() -> None:
    with pytest.raises(ConfigError, match="Gaussian error"):
        gaussian_error(GridSpec(GridKind.SEARCH, 4))


def test_uniform_step_is_the_best_clip() -> None:
    best = gaussian_error(GridSpec(GridKind.UNIFORM, 4))
    clip = 0.9957 * 1.5
    assert gaussian_error(GridSpec(GridKind.SIGMA_CLIP, 4, clip_sigmas=clip)) == pytest.approx(best, abs=1e-8)
    for other in (clip * 0.99, clip * 1.01):
        assert gaussian_error(GridSpec(GridKind.SIGMA_CLIP, 4, clip_sigmas=other)) > best


@pytest.mark.parametrize(
    ("num_levels", "positive"),
    [
        (2, [math.sqrt(2 / math.pi)]),
        (3, [0.0, 1.2240]),
        (4, [0.4528, 1.5104]),
        (8, [0.2451, 0.7560, 1.3439, 2.1520]),
    ],
)
def test_lloyd_max_levels_of_the_literature(num_levels: int, positive: list[float]) -> None:
    values = levels(GridSpec(GridKind.LLOYD_MAX, num_levels))
    assert values[num_levels // 2 :].tolist() == pytest.approx(positive, abs=1e-4)


@pytest.mark.parametrize("num_levels", COUNTS)
def test_lloyd_max_is_a_fixed_point_that_beats_uniform(num_levels: int) -> None:
    values = levels(GridSpec(GridKind.LLOYD_MAX, num_levels))
    assert torch.equal(values, -values.flip(0))
    assert torch.equal(values, values.float().double())
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)
    ends = torch.cat([values.new_tensor([-20.0]), (values[1:] + values[:-1]) / 2, values.new_tensor([20.0])])
    density = normal.log_prob(ends).exp()
    centroids = (density[:-1] - density[1:]) / normal.cdf(ends).diff()
    torch.testing.assert_close(values, centroids, atol=2**-16, rtol=0)
    lloyd, uniform = (gaussian_error(GridSpec(k, num_levels)) for k in (GridKind.LLOYD_MAX, GridKind.UNIFORM))
    assert lloyd <= uniform + 1e-9
    assert lloyd <= math.pi * math.sqrt(3) / 2 / num_levels**2  # the high-rate limit, reached from below


# --- Specs ---


@every_combination
def test_spec_survives_json(kind: GridKind, zero_point: ZeroPoint) -> None:
    spec = GridSpec(kind, 8, zero_point, 1.75, group_size=64, scale_dtype="float16")
    assert GridSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sigma_clop"}, "Did you mean 'sigma_clip'"),
        ({"zero_point": "int"}, "'integer'"),
        ({"num_levels": 17}, "num_levels"),
        ({"num_levels": 512}, "num_levels"),
        ({"num_levels": True}, "num_levels"),
        ({"num_levels": 4.0}, "num_levels"),
        ({"clip_sigmas": 0.0}, "clip_sigmas"),
        ({"clip_sigmas": math.nan}, "clip_sigmas"),
        ({"clip_sigmas": "2"}, "clip_sigmas"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 64, "per_tensor": True}, "contradict"),
        ({"per_tensor": 1}, "per_tensor"),
        ({"scale_dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"scale_dtype": ["bfloat16"]}, "scale_dtype"),
        ({"kind": "lloyd_max", "zero_point": "integer"}, "lloyd_max"),
        ({"clip_sigma": 2.0}, "Did you mean 'clip_sigmas'"),
    ],
)
def test_impossible_specs_are_refused(values: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"kind": "sigma_clip", "num_levels": 4, "zero_point": "float"}
    with pytest.raises(ConfigError, match=message):
        GridSpec.from_dict(good | values)


def test_spec_without_levels_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the key 'num_levels'"):
        GridSpec.from_dict({"kind": "uniform"})


# --- Fitting ---


def test_two_sigma_clip_at_two_bits() -> None:
    values = gaussian(8, 256) * 0.02 + 0.003
    grid = fit_grid(values, GridSpec(GridKind.SIGMA_CLIP, 4, scale_dtype="float32"))
    mean, sigma = values.mean(1, keepdim=True), values.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(grid.scales, 4 * sigma / 3)
    expected = mean + torch.tensor([-2.0, -2 / 3, 2 / 3, 2.0]) * sigma
    torch.testing.assert_close(every_value(grid).float(), expected, atol=1e-4 * 0.02, rtol=2e-3)


def test_integer_zero_puts_the_levels_where_published_code_has_them() -> None:
    values = gaussian(1, 4096)
    values = (values - values.mean()) / values.std(correction=0)
    grid = fit_grid(values + 1e-4, GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.INTEGER))
    assert grid.zero_points is not None
    assert float(grid.zero_points) in (1.0, 2.0)
    mirrored = 1 if float(grid.zero_points) == 2.0 else -1
    expected = sorted(mirrored * v for v in (-8 / 3, -4 / 3, 0.0, 4 / 3))
    assert every_value(grid)[0].tolist() == pytest.approx(expected, rel=2**-8)


@every_combination
def test_stored_tensors_are_what_rounding_uses(kind: GridKind, zero_point: ZeroPoint) -> None:
    spec = GridSpec(kind, 6, zero_point, group_size=20)
    values = gaussian(5, 50) + 0.3
    grid = fit_grid(values, spec)
    assert grid.scales.shape == (5, 3)
    assert grid.stored_scales().dtype == torch.bfloat16
    stored_zero = grid.stored_zero_points()
    restored = Grid.from_stored(spec, grid.stored_scales(), stored_zero)
    assert torch.equal(restored.scales, grid.scales)
    assert torch.equal(restored.levels, grid.levels)
    if zero_point is ZeroPoint.SYMMETRIC:
        assert grid.zero_points is None
        assert stored_zero is None
    else:
        assert stored_zero is not None
        assert grid.zero_points is not None
        assert stored_zero.dtype == (torch.int16 if zero_point is ZeroPoint.INTEGER else torch.bfloat16)
        assert torch.equal(stored_zero.float(), grid.zero_points)
    codes = encode(values, grid)
    assert torch.equal(codes, encode(values, restored))
    assert torch.equal(decode(codes, grid), decode(codes, restored))


@pytest.mark.parametrize("zero_point", ZeroPoint)
@pytest.mark.parametrize("num_levels", [2, 3, 16, 256])
def test_min_max_error_is_half_a_step(zero_point: ZeroPoint, num_levels: int) -> None:
    values = gaussian(4, 64)
    grid = fit_grid(values, GridSpec(GridKind.MIN_MAX, num_levels, zero_point, scale_dtype="float32"))
    error = (decode(encode(values, grid), grid) - values).abs()
    slack = {  # rounding the zero point shifts the ends of the range
        ZeroPoint.SYMMETRIC: 1e-4,
        ZeroPoint.FLOAT: num_levels * 2**-9,
        ZeroPoint.INTEGER: 0.5,
    }
    assert bool((error <= grid.scales * (0.501 + slack[zero_point])).all())


@pytest.mark.parametrize("zero_point", ZeroPoint)
@pytest.mark.parametrize("num_levels", [4, 5, 8])
def test_search_is_never_worse_than_min_max(zero_point: ZeroPoint, num_levels: int) -> None:
    values = gaussian(16, 128).pow(3)
    searched, plain = (
        fit_grid(values, GridSpec(kind, num_levels, zero_point, group_size=32))
        for kind in (GridKind.SEARCH, GridKind.MIN_MAX)
    )
    errors = [
        (decode(encode(values, g), g) - values).square().unflatten(1, (4, 32)).sum(2)
        for g in (searched, plain)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    assert errors[0].sum() < 0.97 * errors[1].sum()


@every_combination
def test_one_scale_per_tensor(kind: GridKind, zero_point: ZeroPoint) -> None:
    values = gaussian(6, 40)
    grid = fit_grid(values, GridSpec(kind, 8, zero_point, per_tensor=True))
    flat = fit_grid(values.reshape(1, -1), GridSpec(kind, 8, zero_point))
    assert grid.scales.shape == (1, 1)
    assert torch.equal(grid.scales, flat.scales)
    assert torch.equal(encode(values, grid).reshape(1, -1), encode(values.reshape(1, -1), flat))


@every_combination
def test_groups_are_fitted_on_their_own(kind: GridKind, zero_point: ZeroPoint) -> None:
    values = gaussian(3, 28) * torch.logspace(-2, 2, 28)
    grid = fit_grid(values, GridSpec(kind, 4, zero_point, group_size=12))
    for group, columns in enumerate([slice(0, 12), slice(12, 24), slice(24, 28)]):
        alone = fit_grid(values[:, columns], GridSpec(kind, 4, zero_point))
        assert torch.equal(grid.scales[:, group], alone.scales[:, 0])
        assert torch.equal(encode(values, grid)[:, columns], encode(values[:, columns], alone))


@every_combination
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7, 1e-30, -1e30, 1e-42, 2.0**-120])
@pytest.mark.parametrize("num_levels", [2, 4, 5])
def test_rows_without_spread(kind: GridKind, zero_point: ZeroPoint, constant: float, num_levels: int) -> None:
    values = torch.full((2, 9), constant)
    grid = fit_grid(values, GridSpec(kind, num_levels, zero_point))
    decoded = decode(encode(values, grid), grid)
    assert bool((grid.scales > 0).all())
    assert bool((grid.stored_scales() > 0).all())
    assert bool(torch.isfinite(decoded).all())
    if zero_point is not ZeroPoint.SYMMETRIC:
        torch.testing.assert_close(decoded, values, rtol=2**-7, atol=num_levels * 1.2e-38)
    elif constant == 0:
        assert float(decoded.abs().max()) < 1e-37


@settings(deadline=None, max_examples=60)
@given(
    combination=st.sampled_from(COMBINATIONS),
    num_levels=st.sampled_from(COUNTS),
    exponent=st.integers(-130, 120),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_any_scale_and_offset_gives_a_valid_grid(
    combination: tuple[GridKind, ZeroPoint],
    num_levels: int,
    exponent: int,
    offset: float,
    dtype: str,
    seed: int,
) -> None:
    values = (gaussian(3, 17, seed) + offset).mul(2.0 ** min(exponent, 100))
    grid = fit_grid(values, GridSpec(combination[0], num_levels, combination[1], scale_dtype=dtype))
    stored_zero = grid.stored_zero_points()
    if stored_zero is not None:
        assert torch.equal(stored_zero.float(), grid.zero_points)
    decoded = every_value(grid)
    assert bool(torch.isfinite(decoded).all())
    assert bool((decoded.diff(dim=1) > 0).all())
    nearest = (decoded[:, None] - values[..., None].double()).abs().amin(2)
    error = (decode(encode(values.double(), grid), grid, dtype=torch.float64) - values).abs()
    largest = decoded.abs().amax(1, keepdim=True)
    assert bool((error <= nearest + 1e-9 * largest).all())


def test_float16_scales_do_not_underflow() -> None:
    grid = fit_grid(gaussian(2, 32) * 1e-12, GridSpec(GridKind.UNIFORM, 4, scale_dtype="float16"))
    assert bool((grid.stored_scales() > 0).all())


def test_scale_beyond_its_dtype_is_refused() -> None:
    with pytest.raises(NumericalError, match="float16"):
        fit_grid(gaussian(2, 32) * 1e9, GridSpec(GridKind.UNIFORM, 4, scale_dtype="float16"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coefficients_that_are_not_finite_are_refused(bad: float) -> None:
    values = gaussian(2, 8)
    values[1, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        fit_grid(values, GridSpec(GridKind.UNIFORM, 4))


@pytest.mark.parametrize("bad", [torch.zeros(2, 0), torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64)])
def test_other_tensors_are_refused(bad: Tensor) -> None:
    with pytest.raises(ConfigError, match="floating-point matrix"):
        fit_grid(bad, GridSpec(GridKind.UNIFORM, 4))


def test_damaged_stored_tensors_are_refused() -> None:
    spec = GridSpec(GridKind.UNIFORM, 4)
    ones = torch.ones(2, 1)
    with pytest.raises(CheckpointError, match="zero points"):
        Grid.from_stored(spec, ones, None)
    with pytest.raises(CheckpointError, match="shape"):
        Grid.from_stored(spec, ones, torch.ones(2, 2))
    with pytest.raises(CheckpointError, match="positive"):
        Grid.from_stored(spec, ones * 0, ones)
    with pytest.raises(CheckpointError, match="finite"):
        Grid.from_stored(spec, ones, ones * math.nan)
    with pytest.raises(CheckpointError, match="takes no zero points"):
        Grid.from_stored(GridSpec(GridKind.UNIFORM, 4, ZeroPoint.SYMMETRIC), ones, ones)


# --- Encoding and decoding ---


@every_combination
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_levels_encode_to_their_codes(kind: GridKind, zero_point: ZeroPoint, dtype: torch.dtype) -> None:
    values = gaussian(7, 33).to(dtype)
    grid = fit_grid(values, GridSpec(kind, 16, zero_point))
    codes = torch.arange(16, dtype=torch.uint8).expand(7, -1)
    decoded = decode(codes, grid, dtype=dtype)
    assert decoded.dtype == dtype
    encoded = encode(decoded, grid)
    assert encoded.dtype == torch.uint8
    assert torch.equal(encoded, codes)


@every_combination
def test_one_column_at_a_time_equals_all_at_once(kind: GridKind, zero_point: ZeroPoint) -> None:
    values = gaussian(5, 30)
    grid = fit_grid(values, GridSpec(kind, 8, zero_point, group_size=8))
    codes = encode(values, grid)
    decoded = decode(codes, grid)
    for column in range(30):
        one = encode(values[:, column : column + 1], grid, column)
        assert torch.equal(one, codes[:, column : column + 1])
        assert torch.equal(decode(one, grid, column), decoded[:, column : column + 1])
    part = encode(values[:, 5:21], grid, 5)
    assert torch.equal(part, codes[:, 5:21])


def test_arguments_are_left_alone_and_strides_do_not_matter() -> None:
    values = gaussian(12, 5).T
    for kind in GridKind:
        grid = fit_grid(values, GridSpec(kind, 4))
        before = [values.clone(), grid.scales.clone(), grid.levels.clone()]
        codes = encode(values, grid)
        assert torch.equal(codes, encode(values.contiguous(), grid))
        decode(codes, grid)
        clip_to_grid(values, grid)
        for old, new in zip(before, [values, grid.scales, grid.levels], strict=True):
            assert torch.equal(old, new)


@every_combination
def test_clip_leaves_codes_as_they_are(kind: GridKind, zero_point: ZeroPoint) -> None:
    values = gaussian(6, 64, dtype=torch.float64)
    grid = fit_grid(values, GridSpec(kind, 8, zero_point, group_size=24))
    clipped = clip_to_grid(values, grid)
    assert clipped.dtype == values.dtype
    assert torch.equal(encode(clipped, grid), encode(values, grid))
    top = torch.full((6, 64), 7, dtype=torch.uint8)
    ends = [decode(codes, grid, dtype=torch.float64) for codes in (top - 7, top)]
    assert bool((clipped >= ends[0] - 1e-6).all())
    assert bool((clipped <= ends[1] + 1e-6).all())


def test_values_far_outside_take_the_end_codes() -> None:
    grid = fit_grid(gaussian(2, 16), GridSpec(GridKind.SIGMA_CLIP, 256, ZeroPoint.FLOAT))
    codes = encode(torch.tensor([[-1e30, 1e30], [-1e38, 1e38]]), grid)
    assert codes.tolist() == [[0, 255], [0, 255]]
