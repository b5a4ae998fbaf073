import pytest
import torch

import framequant as fq
from framequant.codes.grid import GridKind, GridSpec, decode, encode, fit_grid
from framequant.errors import ConfigError
from framequant.frames import build_frame, choose_frame
from framequant.quantizers.denoise import (
    consistent_reconstruction,
    metric_gains,
    wiener_error,
    wiener_filter,
    wiener_gains,
)
from framequant.quantizers.rounding import proxy_loss
from tests.model.architectures import make, output

GENERATOR = torch.Generator().manual_seed(5)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class RandomFrame:
    """A Parseval frame without any structure."""

    def __init__(self, dim, size):
        self.matrix = torch.linalg.qr(randn(size, dim))[0]

    def analysis(self, vectors):
        return vectors @ self.matrix.T

    def synthesis(self, coefficients):
        return coefficients @ self.matrix


def metric(dim):
    root = randn(dim, 3 * dim)
    return root @ root.T / dim


def test_the_gain_has_least_loss():
    exact, hessian = randn(6, 24), metric(24)
    rounded = exact + 0.4 * randn(6, 24)
    gains = metric_gains(exact, rounded, hessian)
    best = proxy_loss(gains[:, None] * rounded - exact, hessian)
    for step in (-1e-3, 1e-3):
        assert proxy_loss((gains + step)[:, None] * rounded - exact, hessian) > best
    assert best <= proxy_loss(rounded - exact, hessian)
    assert torch.equal(
        metric_gains(exact, torch.zeros_like(exact), hessian), torch.ones(6, dtype=torch.float64)
    )


def test_the_wiener_gain_shrinks_independent_noise_as_theory_says():
    exact = randn(4, 20000)
    rounded = exact + 0.5 * randn(4, 20000)
    gains = wiener_gains(exact, rounded)
    assert torch.allclose(gains, torch.full_like(gains, 1 / 1.25), rtol=0.02)
    error = (gains[:, None] * rounded - exact).square().mean()
    assert float(error) == pytest.approx(0.25 / 1.25, rel=0.03)


def test_the_filter_reaches_its_closed_form_and_beats_synthesis():
    frame = build_frame(choose_frame(24, 1.5, seed=3))
    signal = metric(24)
    vectors = randn(20000, 24) @ torch.linalg.cholesky(signal).T
    noisy = frame.analysis(vectors) + 1.5 * randn(20000, frame.analysis(vectors[:1]).shape[1])
    found = wiener_filter(frame, noisy, signal, 2.25)
    error = float((found - vectors).square().sum(1).mean())
    assert error == pytest.approx(wiener_error(signal, 2.25), rel=0.03)
    assert error < float((frame.synthesis(noisy) - vectors).square().sum(1).mean())
    assert wiener_error(signal, 0.0) == 0.0


def test_consistent_vectors_lie_in_their_cells_and_are_nearer_at_high_redundancy():
    frame = RandomFrame(16, 64)
    vectors = randn(40, 16)
    exact = frame.analysis(vectors)
    step = 0.25
    low = (exact / step).floor() * step
    found = consistent_reconstruction(frame, low, low + step, low + step / 2, iterations=2000)
    again = frame.analysis(found)
    assert float((low - again).clamp(min=0).max() + (again - low - step).clamp(min=0).max()) < 0.02 * step
    linear = frame.synthesis(low + step / 2)
    assert (found - vectors).square().mean() < (linear - vectors).square().mean()


@pytest.mark.parametrize("kind", ["wiener", "gain"])
def test_the_setting_survives_saving_and_costs_nothing(kind, tmp_path):
    losses, sizes = {}, set()
    for denoise in ("none", kind):
        model, data = make("llama")
        config = fq.FrameQuantConfig(
            denoise=denoise, float_targets=0.0, residual_targets=0.0, refine_sweeps=0, grid="min_max"
        )
        report = fq.quantize_(model, data, config)
        losses[denoise] = report.linears[0].proxy_loss
        sizes.add(report.bits_per_weight)
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(output(fq.load(tmp_path / "out"), data), output(model, data))
    assert len(sizes) == 1
    assert losses["none"] != losses[kind]
    if kind == "gain":
        assert losses[kind] < 1.001 * losses["none"]  # scales are stored with eight bits of mantissa


def test_a_centroid_grid_is_hurt_by_shrinkage():
    values = randn(8, 4096)
    grid = fit_grid(values, GridSpec(GridKind.LLOYD_MAX, 4))
    rounded = decode(encode(values, grid), grid, dtype=torch.float64)
    shrunk = wiener_gains(values, rounded)[:, None] * rounded
    assert (shrunk - values).square().mean() > (rounded - values).square().mean()


def test_codes_without_row_scales_refuse_it():
    for changes in ({"code": "trellis", "redundancy": 1.0}, {"per_tensor_scale": True}):
        with pytest.raises(ConfigError, match="scalar code with scales per row"):
            fq.FrameQuantConfig(denoise="gain", **changes)
