"""Frames other than the harmonic, duals, orderings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import HarmonicFrame
from framequant.frames.duals import canonical_dual, shaped, sobolev_dual
from framequant.frames.unit_norm import (
    DenseFrame,
    check_frame,
    frame_variation,
    low_variation_order,
    random_frame,
    tetris_frame,
)

TIGHT = {"rtol": 0.0, "atol": 1e-10}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 1000))
def test_random_frames_are_unit_norm_and_tight(dim: int, more: int, seed: int) -> None:
    frame = random_frame(dim, dim + more, seed)
    checks = check_frame(frame.as_matrix())
    assert max(checks.norm_defect, checks.tightness_defect) < 1e-11
    x = torch.randn(3, dim, dtype=torch.float64)
    torch.testing.assert_close(frame.synthesis(frame.analysis(x)), x, **TIGHT)


def test_random_frames_follow_their_seed() -> None:
    assert torch.equal(random_frame(5, 12, 3).as_matrix(), random_frame(5, 12, 3).as_matrix())
    assert not torch.allclose(random_frame(5, 12, 3).as_matrix(), random_frame(5, 12, 4).as_matrix())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 16), st.integers(0, 40))
def test_tetris_frames_are_unit_norm_and_tight(dim: int, more: int) -> None:
    frame = tetris_frame(dim, 2 * dim + more)
    checks = check_frame(frame.as_matrix())
    assert max(checks.norm_defect, checks.tightness_defect) < 1e-12
    assert int((frame.as_matrix() != 0).sum(1).max()) <= 2  # Spectral Tetris is sparse


@pytest.mark.parametrize(
    ("dim", "size", "near"), [(5, 4, "N = 5"), (5, 7, "N = 5"), (5, 9, "N = 10"), (0, 3, "N = 0")]
)
def test_tetris_frames_that_do_not_exist(dim: int, size: int, near: str) -> None:
    with pytest.raises(FrameError, match=f"nearest is {near}"):
        tetris_frame(dim, size)


def test_vectors_that_are_no_frame_are_refused() -> None:
    with pytest.raises(FrameError, match="cannot span"):
        random_frame(5, 4)
    with pytest.raises(FrameError, match="norms miss 1"):
        DenseFrame(2 * torch.eye(3))
    with pytest.raises(FrameError, match="tightness"):
        DenseFrame(torch.eye(3)[[0, 1, 2, 2]])
    with pytest.raises(FrameError, match="last axis"):
        random_frame(4, 6).analysis(torch.ones(2, 5))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "frame", [HarmonicFrame(12, 40), HarmonicFrame(7, 31, 2), random_frame(9, 30), tetris_frame(6, 25)]
)
def test_duals(frame: HarmonicFrame | DenseFrame, order: int) -> None:
    matrix = frame.as_matrix()
    dual = sobolev_dual(matrix, order)
    torch.testing.assert_close(dual @ matrix, torch.eye(frame.dim, dtype=torch.float64), rtol=0, atol=1e-8)
    canonical = canonical_dual(matrix)
    torch.testing.assert_close(canonical, matrix.T * (frame.dim / frame.size), **TIGHT)
    if order == 0:
        torch.testing.assert_close(dual, canonical, **TIGHT)
    # Least Frobenius and operator norm of L D^ρ among all duals: here, against the canonical and a random one.
    generator = torch.Generator().manual_seed(order)
    noise = torch.randn(dual.shape, generator=generator, dtype=torch.float64)
    other = dual + 0.1 * (noise - noise @ matrix @ canonical)
    torch.testing.assert_close(other @ matrix, dual @ matrix, rtol=0, atol=1e-8)
    for kind in ("fro", 2):
        best = torch.linalg.matrix_norm(shaped(dual, order), ord=kind)
        for rival in (canonical, other):
            assert best <= torch.linalg.matrix_norm(shaped(rival, order), ord=kind) * (1 + 1e-9)


def test_shaped_is_the_product_with_differences() -> None:
    dual = torch.randn(3, 8, dtype=torch.float64)
    difference = torch.eye(8, dtype=torch.float64) - torch.diag(torch.ones(7, dtype=torch.float64), -1)
    torch.testing.assert_close(shaped(dual, 2), dual @ difference @ difference, **TIGHT)


def test_vectors_that_do_not_span_have_no_dual() -> None:
    with pytest.raises(FrameError, match="do not span"):
        sobolev_dual(torch.ones(2, 3), 1)
    with pytest.raises(FrameError, match="too badly"):
        canonical_dual(torch.ones(4, 3))


@pytest.mark.parametrize("frame", [random_frame(3, 60), random_frame(16, 100, 5), tetris_frame(20, 70)])
def test_orderings_lower_the_variation(frame: DenseFrame) -> None:
    matrix = frame.as_matrix()
    order = low_variation_order(matrix)
    assert torch.equal(order.sort().values, torch.arange(frame.size))
    assert frame_variation(matrix[order]) < 0.95 * frame_variation(matrix)
    assert torch.equal(frame.reordered(order).as_matrix(), matrix[order])


def test_a_shuffled_circle_is_put_back_in_order() -> None:
    circle = HarmonicFrame(2, 40)
    shuffled = circle.as_matrix()[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    found = frame_variation(shuffled[low_variation_order(shuffled)])
    assert found == pytest.approx(circle.variation(), rel=1e-9)


def test_too_many_vectors_to_order() -> None:
    with pytest.raises(FrameError, match="too many"):
        low_variation_order(torch.ones(9000, 2))
