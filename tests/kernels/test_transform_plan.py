"""The factors that the kernels are given, multiplied out in float64, are the frame's transform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framequant.frames import FrameOperator, build_frame, choose_frame
from framequant.kernels.transform_plan import (
    MAX_ELEMENTS,
    TransformPlan,
    half_numbers,
    lane_sign_words,
    sign_words,
    transform_plan,
)
from framequant.model.allocation import FILL


def applied(plan: TransformPlan, x: Tensor, signs: bool) -> Tensor:
    """What a kernel computes, the signs aside where they come last."""
    first, second, third_in, third_out = plan.sizes
    m0, m1, m2 = (matrix.double() for matrix in plan.matrices)
    t = (x * plan.signs if signs else x).reshape(-1, first, second, third_in)
    t = torch.einsum(
        "ia,bajk,jl,km->bilm", m0[:first, :first], t, m1[:second, :second], m2[:third_in, :third_out]
    )
    return t.reshape(len(x), -1) * plan.norm


def check(frame: FrameOperator) -> bool:
    plans = [transform_plan(frame, analysis, "cpu") for analysis in (True, False)]
    if None in plans:
        assert plans == [None, None]
        return False
    x = torch.randn(3, frame.dim, dtype=torch.float64)
    z = frame.analysis(x)
    torch.testing.assert_close(
        applied(plans[0], x, True), z, rtol=0, atol=2e-3
    )  # halves of a block's entries
    torch.testing.assert_close(applied(plans[1], z, False) * plans[1].signs, x, rtol=0, atol=4e-3)
    for plan in plans:
        assert plan.padded[0] * plan.padded[1] * max(plan.padded[2:]) <= MAX_ELEMENTS
    return True


@pytest.mark.parametrize("dim", [576, 1001, 1024, 2560, 4096, 5120, 8192, 11008, 14336])
@pytest.mark.parametrize("redundancy", [1.0, 1.125])
def test_usual_frames(dim: int, redundancy: float) -> None:
    assert check(build_frame(choose_frame(dim, redundancy, seed=1))) or (dim, redundancy) == (1001, 1.125)


@pytest.mark.parametrize(
    ("dim", "least"),
    [(576, 2), (1536, 2), (2560, 3), (4096, 4), (5120, 4), (8192, 4), (11008, 4), (14336, 2)],
)
def test_frames_that_use_up_a_budget(dim: int, least: int) -> None:
    """Groups of up to 128 coordinates where the dimension ends with powers of two; no banded frames."""
    covered = [check(build_frame(choose_frame(dim, redundancy, seed=1))) for redundancy in FILL]
    assert sum(covered) == least


@pytest.mark.parametrize("count", [1, 16, 32])
def test_signs_as_bits(count: int) -> None:
    signs = torch.where(torch.rand(count * 256) < 0.5, -1, 1).to(torch.int8)
    words = sign_words(signs, 256)
    assert words.dtype == torch.int32
    bits = (words.long()[None] >> torch.arange(count)[:, None]) & 1
    assert torch.equal(1 - 2 * bits.reshape(-1), signs.long())


@pytest.mark.parametrize("size", [4096, 8192])
def test_signs_of_halves_as_bits(size: int) -> None:
    signs = torch.where(torch.rand(size) < 0.5, -1, 1).to(torch.int8)
    words, numbers = lane_sign_words(signs, 256), half_numbers(size, 256)
    assert torch.equal(words[:256], sign_words(signs, 256))
    assert torch.equal(numbers[numbers >= 0].sort().values, torch.arange(size))  # each one once
    bits = (words[256:, None].long() >> torch.arange(32)) & 1
    assert torch.equal(bits, torch.where(numbers >= 0, signs[numbers] < 0, 0).long())


def test_analyses_of_one_program_have_signs_as_bits() -> None:
    for dim, bits in ((4096, True), (8192, True), (2048, False), (11008, False)):
        plan = transform_plan(build_frame(choose_frame(dim, 1.125, seed=1)), True, "cpu")
        assert plan is not None
        if bits:
            assert torch.equal(plan.lane_signs, lane_sign_words(plan.signs, 256))
        else:
            assert plan.lane_signs is plan.signs or torch.equal(plan.lane_signs, plan.signs)
