"""Tight fusion frames as used: projectors, existence in real sizes, order, tightness in large dimensions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import FrameError
from framequant.frames import FusionFrame, choose_frame, tight_fusion_frame_exists
from framequant.frames.spectral_tetris import Step

TIGHT = {"rtol": 0.0, "atol": 1e-12}

FRAMES = [
    (16, 5, 4, Step.BLOCK),
    (24, 3, 8, Step.BLOCK),
    (26, 6, 8, Step.BANDED),
    (40, 7, 12, Step.BANDED),
    (26, 5, 8, Step.NAIMARK),
    (14, 5, 8, Step.SPATIAL),
    (6, 3, 4, Step.SPATIAL),
]
every_frame = pytest.mark.parametrize(("dim", "count", "size", "step"), FRAMES)


@every_frame
def test_every_construction_is_covered(dim: int, count: int, size: int, step: Step) -> None:
    assert FusionFrame(dim, count, size).steps[0] is step


@every_frame
def test_subspace_projectors(dim: int, count: int, size: int, step: Step) -> None:
    frame = FusionFrame(dim, count, size)
    matrix = frame.as_matrix()
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for subspace in range(count):
        basis = matrix[frame.subspace_indices(subspace)] * frame.redundancy**0.5
        torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), **TIGHT)
        projector = basis.T @ basis
        torch.testing.assert_close(projector @ projector, projector, **TIGHT)
        assert abs(projector.trace() - size) < 1e-12
        total += projector
    torch.testing.assert_close(total, frame.redundancy * torch.eye(dim, dtype=torch.float64), **TIGHT)


@every_frame
def test_indices_partition_the_coefficients_group_major(dim: int, count: int, size: int, step: Step) -> None:
    frame = FusionFrame(dim, count, size)
    indices = torch.stack([frame.subspace_indices(j) for j in range(count)])
    assert sorted(indices.flatten().tolist()) == list(range(count * size))
    expected = torch.arange(count * size).reshape(size // 2, count, 2).transpose(0, 1).reshape(count, size)
    assert torch.equal(indices, expected)
    for bad in (-1, count):
        with pytest.raises(FrameError, match="subspace"):
            frame.subspace_indices(bad)


@pytest.mark.parametrize("half_dim", range(1, 10))
def test_constructor_succeeds_exactly_when_the_frame_exists(half_dim: int) -> None:
    for half_l in range(1, half_dim + 1):
        for k in range(1, 2 * half_dim + 2):
            if tight_fusion_frame_exists(k, half_l, half_dim):
                matrix = FusionFrame(2 * half_dim, k, 2 * half_l).as_matrix()
                torch.testing.assert_close(matrix.T @ matrix, torch.eye(2 * half_dim).double(), **TIGHT)
            else:
                with pytest.raises(FrameError, match="nearest that exists"):
                    FusionFrame(2 * half_dim, k, 2 * half_l)


@settings(deadline=None, max_examples=60)
@given(dim=st.integers(2, 90), data=st.data())
def test_sparse_forms_equal_their_dense_matrix(dim: int, data: st.DataObject) -> None:
    half_l = data.draw(st.integers(1, max(dim // 4, 1)))
    k = -(-((dim + 1) // 2) // half_l) + data.draw(st.integers(2, 9))
    frame = FusionFrame(dim, k, 2 * half_l)
    assert len(frame.steps) == 1
    matrix = frame.as_matrix()
    x = torch.randn(3, dim, dtype=torch.float64)
    c = torch.randn(3, k * 2 * half_l, dtype=torch.float64)
    torch.testing.assert_close(frame.analysis(x), x @ matrix.T, **TIGHT)
    torch.testing.assert_close(frame.synthesis(c), c @ matrix, **TIGHT)
    torch.testing.assert_close(frame.synthesis(frame.analysis(x)), x, **TIGHT)


def test_group_reads_consecutive_coordinates_through_one_block() -> None:
    matrix = FusionFrame(24, 4, 8).as_matrix()
    block = matrix[:8, :6]
    torch.testing.assert_close(matrix, torch.kron(torch.eye(4).double(), block), rtol=0, atol=0)


def largest_tightness_error(frame: FusionFrame) -> float:
    """Largest entry of ``T^T T - I``, without forming T."""
    worst = 0.0
    for chunk in torch.arange(frame.dim).split(256):
        unit = torch.zeros(len(chunk), frame.dim, dtype=torch.float64)
        unit[torch.arange(len(chunk)), chunk] = 1.0
        worst = max(worst, (frame.synthesis(frame.analysis(unit)) - unit).abs().max().item())
    return worst


DIMS = [576, 768, 1000, 1536, 4096, pytest.param(11008, marks=pytest.mark.slow)]
REDUNDANCIES = [1.05, 1.1, 1.25, 1.3]


@pytest.mark.parametrize("redundancy", REDUNDANCIES)
@pytest.mark.parametrize("dim", DIMS)
def test_tightness_at_the_sizes_of_models(dim: int, redundancy: float) -> None:
    spec = choose_frame(dim, redundancy)
    frame = FusionFrame(dim, spec.num_subspaces, spec.subspace_dim)
    assert largest_tightness_error(frame) <= 1e-11


BANDED = [
    (576, 11, 68),
    (768, 10, 100),
    (1536, 23, 74),
    (4096, 23, 196),
    pytest.param(11008, 22, 552, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dim", "count", "size"), BANDED)
def test_tightness_of_banded_frames_at_the_sizes_of_models(dim: int, count: int, size: int) -> None:
    frame = FusionFrame(dim, count, size)
    assert frame.steps == (Step.BANDED,)
    assert largest_tightness_error(frame) <= 1e-11


@pytest.mark.parametrize(("dim", "count", "size"), [(576, 6, 128), (1000, 6, 214)])
def test_dense_complements_of_some_size(dim: int, count: int, size: int) -> None:
    frame = FusionFrame(dim, count, size)
    assert len(frame.steps) > 1
    assert largest_tightness_error(frame) <= 1e-11


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((576, 9, 63), "nearest that exists has 9 subspaces of dimension 64"),  # odd
        ((8, 2, 2), "nearest that exists has"),  # fewer coefficients than coordinates
        ((8, 4, 0), "out of range"),
        ((0, 4, 2), "out of range"),
        ((8, -4, -2), "out of range"),
        ((22, 4, 8), "nearest that exists has"),
    ],
)
def test_what_does_not_exist_is_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        FusionFrame(*sizes)
