"""Harmonic frames: the FFT against the definition, the laws, variation of any order, sizes that do not exist."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import DualStage, FrameKind, FrameSpec, HarmonicFrame, build_frame, frame_size
from framequant.frames.harmonic import smallest_size
from framequant.frames.unit_norm import check_frame, frame_variation

TIGHT = {"rtol": 0.0, "atol": 1e-12}
SIZES = [(1, 1), (1, 4), (2, 3), (3, 3), (5, 12), (6, 13), (10, 80), (7, 7), (64, 130), (33, 100)]
sizes = pytest.mark.parametrize(("dim", "size"), SIZES)
any_size = st.integers(1, 24).flatmap(
    lambda dim: st.tuples(st.just(dim), st.integers(smallest_size(dim), 4 * dim + 3))
)


@settings(max_examples=60, deadline=None)
@given(any_size, st.integers(0, 5))
def test_unit_norm_tight_and_zero_sum(sizes: tuple[int, int], seed: int) -> None:
    dim, size = sizes
    frame = HarmonicFrame(dim, size, seed)
    checks = check_frame(frame.as_matrix())
    assert max(checks.norm_defect, checks.tightness_defect) < 1e-12
    # For odd d the constant 1/sqrt(d) adds up to N/sqrt(d).
    expected = 0.0 if dim % 2 == 0 else size / math.sqrt(dim)
    assert checks.sum_norm == pytest.approx(expected, abs=1e-10)
    assert frame.sums_to_zero == (dim % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(any_size, st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_fft_is_the_dense_product(sizes: tuple[int, int], seed: int, draw: int) -> None:
    dim, size = sizes
    frame, generator = HarmonicFrame(dim, size, seed), torch.Generator().manual_seed(draw)
    x = torch.randn(2, 3, dim, generator=generator, dtype=torch.float64)
    c = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    matrix = frame.as_matrix()
    torch.testing.assert_close(frame.analysis(x), x @ matrix.T, **TIGHT)
    torch.testing.assert_close(frame.adjoint(c), c @ matrix, rtol=0, atol=1e-11)
    torch.testing.assert_close(frame.synthesis(frame.analysis(x)), x, **TIGHT)
    torch.testing.assert_close(frame.kernel(), matrix @ matrix[0], **TIGHT)


def test_float32_stays_near_float64() -> None:
    frame = HarmonicFrame(768, 6144, seed=3)
    x = torch.randn(4, 768, dtype=torch.float64)
    found = frame.analysis(x.float())
    assert found.dtype == torch.float32
    assert float((found - frame.analysis(x)).abs().max()) < 1e-5


def test_tight_in_a_large_dimension() -> None:
    frame = HarmonicFrame(4096, 32768)
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((frame.synthesis(frame.analysis(x)) - x).abs().max()) < 1e-12


@sizes
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_variation_in_closed_form(dim: int, size: int, order: int) -> None:
    frame = HarmonicFrame(dim, size, seed=1)
    assert frame.variation(order) == pytest.approx(frame_variation(frame.as_matrix(), order), abs=1e-9)


def test_variation_of_order_one_tends_to_its_limit() -> None:
    # ‖e_j - e_{j+1}‖ tends to (2 pi / N) sqrt((2/d) Σ k²), so σ to 2 pi sqrt((2/d) Σ k²), whatever N.
    limit = 2 * math.pi * math.sqrt(2 / 20 * sum(k * k for k in range(1, 11)))
    assert HarmonicFrame(20, 20_000).variation() == pytest.approx(limit, rel=1e-3)
    with pytest.raises(FrameError, match="order"):
        frame_variation(torch.eye(3), 0)


@sizes
@pytest.mark.parametrize("dual_order", [0, 1, 2])
def test_the_operator_of_a_spec(dim: int, size: int, dual_order: int) -> None:
    spec = FrameSpec(FrameKind.HARMONIC, dim, size, 1, seed=5, dual_order=dual_order)
    assert FrameSpec.from_dict(spec.to_dict()) == spec
    frame = build_frame(spec)
    matrix = frame.as_matrix()
    assert matrix.shape == (size, dim) == (frame.num_coefficients, frame.dim)
    x, c = torch.randn(3, dim, dtype=torch.float64), torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(frame.analysis(x), x @ matrix.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(frame.synthesis(c), c @ matrix, rtol=1e-10, atol=1e-10)
    if dual_order == 0:
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(dim, dtype=torch.float64), **TIGHT)
    parseval = HarmonicFrame(dim, size, seed=5).as_matrix() * math.sqrt(dim / size)
    restored = frame.synthesis(x @ parseval.T)
    torch.testing.assert_close(restored, x, rtol=1e-9, atol=1e-9)


def test_old_frames_are_written_as_before() -> None:
    assert "dual_order" not in FrameSpec(FrameKind.HADAMARD, 8).to_dict()
    with pytest.raises(FrameError, match="dual_order"):
        FrameSpec(FrameKind.HADAMARD, 8, dual_order=1)


@pytest.mark.parametrize(
    ("dim", "size", "message"),
    [
        (8, 7, r"N = 7 vectors cannot span R\^8; the nearest harmonic frame has N = 9"),
        (8, 8, "N = d = 8 is impossible for even d.*nearest harmonic frame has N = 9"),
        (7, 6, "nearest harmonic frame has N = 7"),
        (0, 6, "dim >= 1"),
        (2, 1 << 25, "too large"),
    ],
)
def test_impossible_sizes(dim: int, size: int, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        HarmonicFrame(dim, size)


@pytest.mark.parametrize(
    ("dim", "ratio", "expected"),
    [(784, 8, 6272), (10, 1.01, 12), (5, 1.5, 8), (5, 1, 5), (7, 1.01, 7), (6, 1.6, 10)],
)
def test_frame_size(dim: int, ratio: float, expected: int) -> None:
    size = frame_size(dim, ratio)
    assert size == expected
    assert HarmonicFrame(dim, size).size == size


@pytest.mark.parametrize(
    ("dim", "ratio", "message"),
    [
        (8, 0.5, "below 1.*N = 9"),
        (8, 1, "nearest harmonic frame has N = 9"),
        (8, math.nan, "ratio"),
        (3, 0.9, "N = 3"),
    ],
)
def test_impossible_ratios(dim: int, ratio: float, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        frame_size(dim, ratio)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_subspaces": 8, "subspace_dim": 1},
        {"num_subspaces": 16, "subspace_dim": 2},
        {"num_subspaces": 16, "subspace_dim": 1, "dual_order": 4},
        {"num_subspaces": 1 << 25, "subspace_dim": 1},
    ],
)
def test_hostile_specs_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(FrameError):
        FrameSpec.from_dict({"kind": "harmonic", "dim": 8, **fields})


def test_stage_says_what_it_costs() -> None:
    assert DualStage(HarmonicFrame(64, 512)).multiply_adds < 64 * 512
    assert DualStage(HarmonicFrame(64, 512), 1).multiply_adds == 64 * 512
