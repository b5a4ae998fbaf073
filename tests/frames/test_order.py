from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import framequant as fq
from framequant.frames import FrameKind, FrameSpec, build_frame, choose_frame
from framequant.frames.order import golden_stride, spread_order
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import quantize_group


@pytest.mark.parametrize("period", [1, 2, 3, 16, 53, 77, 100, 125])
def test_a_stride_visits_the_whole_period(period):
    stride = golden_stride(period)
    assert math.gcd(stride, period) == 1
    assert len({i * stride % period for i in range(period)}) == period


@pytest.mark.parametrize(("dim", "redundancy"), [(192, 1.3), (192, 1.1), (576, 1.2), (1536, 1.05), (90, 1.3)])
def test_every_coefficient_is_visited_once_group_by_group(dim, redundancy):
    spec = choose_frame(dim, redundancy)
    order = spread_order(spec)
    assert order.sort().values.tolist() == list(range(spec.num_coefficients))
    size = 2 * spec.num_subspaces
    groups = order.view(-1, size) // size
    assert (groups == groups[:, :1]).all()


def test_first_visited_coefficients_of_a_group_determine_the_others_stably():
    """As they lie, what is visited last follows from the rest with errors magnified beyond any use."""
    spec = choose_frame(192, 1.3)
    basis = build_frame(spec).as_matrix()
    worst = [
        float(torch.linalg.svdvals(basis[positions[: spec.dim]])[-1])
        for positions in (torch.arange(spec.num_coefficients), spread_order(spec))
    ]
    assert worst[0] < 1e-6
    assert worst[1] > 0.01


@pytest.mark.parametrize(
    "spec", [choose_frame(192, 1.125), choose_frame(192, 1.0), FrameSpec(FrameKind.IDENTITY, 8)]
)
def test_other_frames_are_visited_as_they_lie(spec):
    assert spread_order(spec) is None


def test_quality_rises_with_redundancy_only_in_this_order():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 192, generator=generator)
    inputs = torch.randn(512, 192, generator=generator) * torch.linspace(2, 0.05, 192)
    losses = {}
    for order in ("natural", "spread"):
        for redundancy in (1.125, 1.3):
            config = fq.preset("framequant-paper", two_sided=False, redundancy=redundancy)
            moments = Moments(192)
            moments.add(inputs)
            found = quantize_group(
                {"linear": weight}, moments, {"linear": replace(config, column_order=order)}, "group"
            )
            losses[order, redundancy] = found["linear"].loss.relative
    assert losses["spread", 1.125] == losses["natural", 1.125]
    assert losses["spread", 1.3] < losses["spread", 1.125]
    assert losses["natural", 1.3] > 1.5 * losses["spread", 1.3]
