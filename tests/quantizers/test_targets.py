from __future__ import annotations

import torch

from framequant.quantizers.targets import float_target


def _data(tokens: int = 4000):
    g = torch.Generator().manual_seed(0)
    floating = torch.randn(tokens, 12, generator=g, dtype=torch.float64)
    quantized = floating @ (torch.eye(12, dtype=torch.float64) + 0.2 * torch.randn(12, 12, generator=g)) + 0.1
    weight = torch.randn(5, 12, generator=g, dtype=torch.float64)
    stream = quantized[:, :5] * 0.3 + 0.1 * torch.randn(tokens, 5, generator=g, dtype=torch.float64)
    hessian = quantized.T @ quantized / tokens
    drift = (floating - quantized).T @ quantized / tokens
    residual = stream.T @ quantized / tokens
    return floating, quantized, weight, stream, hessian, drift, residual


def test_full_strength_is_the_least_squares_solution():
    floating, quantized, weight, stream, hessian, drift, residual = _data()
    wanted = floating @ weight.T + stream
    solution = torch.linalg.lstsq(quantized, wanted).solution.T
    target = float_target(weight, hessian, drift, residual, 1.0, 1.0, damping=1e-12)
    assert torch.allclose(target, solution, atol=1e-8)


def test_each_half_is_off_at_zero():
    *_, hessian, drift, residual = _data()
    weight = _data()[2]
    assert float_target(weight, hessian, drift, residual, 0.0, 0.0) is weight
    assert float_target(weight, hessian, None, None, 1.0, 1.0) is weight
    only = float_target(weight, hessian, drift, residual, 0.0, 1.0, damping=1e-12)
    assert torch.allclose((only - weight) @ hessian, residual, atol=1e-9)


def test_strength_interpolates():
    *_, hessian, drift, residual = _data()
    weight = _data()[2]
    half = float_target(weight, hessian, drift, residual, 0.5, 0.5)
    full = float_target(weight, hessian, drift, residual, 1.0, 1.0)
    assert torch.allclose(half - weight, 0.5 * (full - weight), atol=1e-12)
