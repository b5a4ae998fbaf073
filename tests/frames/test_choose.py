"""The chosen frame meets the request, is sparse, and is found at once."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import FrameKind, FusionFrame, build_frame, choose_frame
from framequant.frames.spectral_tetris import Step

DIMS = [192, 576, 768, 1000, 1536, 2048, 3072, 4096, 5120, 8192, 11008, 14336, 28672]


@pytest.mark.parametrize("redundancy", [1.05, 1.1, 1.125, 1.2, 1.25, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("dim", DIMS)
def test_true_redundancy_is_close_and_the_frame_block_diagonal(dim: int, redundancy: float) -> None:
    spec = choose_frame(dim, redundancy, seed=5)
    assert spec.kind is FrameKind.FUSION
    assert spec.redundancy >= 1.0
    assert abs(spec.redundancy / redundancy - 1.0) <= 0.005
    assert (dim // 2) % (spec.subspace_dim // 2) == 0
    assert spec.seed == 5


@pytest.mark.parametrize(
    ("dim", "redundancy", "sizes"),
    [
        (576, 1.125, (9, 72)),
        (1024, 1.125, (9, 128)),
        (4096, 1.25, (5, 1024)),
        (1000, 1.1, (11, 100)),
        (1000, 1.05, (21, 50)),
        (4096, 1.05, (67, 64)),
        (11008, 1.1, (95, 128)),
    ],
)
def test_known_choices(dim: int, redundancy: float, sizes: tuple[int, int]) -> None:
    spec = choose_frame(dim, redundancy)
    assert (spec.num_subspaces, spec.subspace_dim) == sizes


@pytest.mark.parametrize("dim", [1, 7, 4096])
@pytest.mark.parametrize("redundancy", [1, 1.0, 1.004])
def test_no_redundancy_is_a_plain_transform(dim: int, redundancy: float) -> None:
    spec = choose_frame(dim, redundancy, seed=3)
    assert spec.kind is FrameKind.HADAMARD
    assert (spec.redundancy, spec.seed) == (1.0, 3)


@settings(deadline=None, max_examples=100)
@given(dim=st.integers(1, 300), redundancy=st.floats(1.0, 8.0))
def test_every_choice_can_be_built_and_is_sparse(dim: int, redundancy: float) -> None:
    spec = choose_frame(dim, redundancy)
    assert spec.redundancy >= 1.0
    if spec.kind is FrameKind.FUSION:
        frame = FusionFrame(dim, spec.num_subspaces, spec.subspace_dim)
        assert frame.steps in ((Step.BLOCK,), (Step.BANDED,))
    assert build_frame(spec).num_coefficients == spec.num_coefficients


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6, 9])
def test_tiny_dimensions_get_the_nearest(dim: int) -> None:
    for redundancy in (1.02, 1.1, 1.3, 1.6, 2.0, 3.1, 8.0):
        error = abs(choose_frame(dim, redundancy).redundancy - redundancy)
        half = (dim + 1) // 2
        divisors = [size for size in range(1, half + 1) if half % size == 0]
        offered = {2 * k * size / dim for size in divisors for k in range(max(half // size, 2), 99)}
        assert error <= min(abs(true - redundancy) for true in offered | {1.0}) + 1e-12


def test_search_is_fast() -> None:
    start = time.perf_counter()
    for redundancy in (1.01, 1.05, 1.1, 1.3, 4.0):
        choose_frame(28672, redundancy)
        choose_frame(28669, redundancy)
    assert time.perf_counter() - start < 10 * 0.05


def test_exact_tolerance_zero() -> None:
    assert choose_frame(1024, 1.125, tolerance=0.0).redundancy == 1.125


@pytest.mark.parametrize("redundancy", [0.99, 8.01, -1.0, math.nan, math.inf])
def test_redundancy_out_of_range(redundancy: float) -> None:
    with pytest.raises(FrameError, match="redundancy"):
        choose_frame(64, redundancy)


def test_other_arguments_out_of_range() -> None:
    with pytest.raises(FrameError, match="dim"):
        choose_frame(0, 1.1)
    with pytest.raises(FrameError, match="seed"):
        choose_frame(64, 1.1, seed=-1)
    for tolerance in (-0.1, 0.6, math.nan):
        with pytest.raises(FrameError, match="tolerance"):
            choose_frame(64, 1.1, tolerance=tolerance)
