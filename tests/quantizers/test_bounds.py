"""Every bound holds in at least 10 000 random cases, and says when it is vacuous."""

import itertools
import math

import pytest
import torch

from framequant.frames import DualStage, HarmonicFrame
from framequant.frames.duals import shaped
from framequant.frames.unit_norm import frame_variation, random_frame, tetris_frame
from framequant.quantizers import bounds
from framequant.quantizers.bounds import (
    Bound,
    LayerFacts,
    ShapedNorms,
    Spread,
    feed_forward_bound,
    layer_bound,
    published_bound,
    residual_bound,
    spectral_bound,
    vector_bound_posterior,
    vector_bound_prior,
)
from framequant.quantizers.sigma_delta import SigmaDelta

CASES = 10_000
STAGES = {
    "even": DualStage(HarmonicFrame(10, 40)),
    "even, odd N": DualStage(HarmonicFrame(10, 41)),
    "odd": DualStage(HarmonicFrame(9, 40, seed=2)),
    "random": DualStage(random_frame(8, 24)),
    "tetris": DualStage(tetris_frame(6, 20)),
    "sobolev": DualStage(HarmonicFrame(10, 40), 1),
    "sobolev 2": DualStage(HarmonicFrame(10, 40), 2),
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(("order", "levels"), [(0, 4), (1, 2), (1, 6), (2, 4), (3, 8)])
def test_vector_bounds(name: str, order: int, levels: int) -> None:
    stage = STAGES[name]
    if stage.dual_order not in (0, order):
        pytest.skip("a Sobolev dual goes with its order")
    dual = "sobolev" if stage.dual_order else "canonical"
    x = gaussian(CASES, stage.dim) * torch.logspace(-2, 2, CASES, dtype=torch.float64)[:, None]
    norms = ShapedNorms.of(stage, order)
    worst = 0.0
    for step, passes in (("stable", 0), ("mse", 0), ("norm", 2)):
        found = SigmaDelta(order, levels, step, dual, passes).quantize(x, stage)
        prior = vector_bound_prior(found.stable_steps, norms)
        posterior = vector_bound_posterior(found.steps(stage), found.peaks, found.energies, norms)
        assert int((found.errors > prior).sum()) == 0
        assert int((found.errors > posterior * (1 + 1e-9)).sum()) == 0
        worst = max(worst, float((found.errors / prior).max()))
    assert worst > 0.02  # a bound a hundred times too large would pass anything


@pytest.mark.parametrize("step", [0.2, 0.8])
def test_posterior_bound_holds_with_overloads(step: float) -> None:
    stage = STAGES["even"]
    found = SigmaDelta(1, 2, step).quantize(gaussian(CASES, 10), stage)
    assert int(found.overloads.sum()) > CASES
    assert not bool(torch.isfinite(found.stable_steps).all())
    norms = ShapedNorms.of(stage, 1)
    bound = vector_bound_posterior(found.steps(stage), found.peaks, found.energies, norms)
    assert int((found.errors > bound * (1 + 1e-9)).sum()) == 0


@pytest.mark.parametrize("name", ["even", "even, odd N", "odd", "random", "tetris"])
def test_the_published_bound(name: str) -> None:
    frame = STAGES[name].frame
    found = SigmaDelta(1, 2, "stable").quantize(gaussian(CASES, frame.dim), STAGES[name])
    variation = frame_variation(frame.as_matrix())
    zero = isinstance(frame, HarmonicFrame) and frame.sums_to_zero
    for error, step in zip(found.errors.tolist(), found.steps(STAGES[name]).tolist(), strict=True):
        assert error <= published_bound(step, frame.dim, frame.size, variation, zero)
    if name == "even":
        assert published_bound(1.0, 10, 40, 5.0, True) == pytest.approx(10 / 80 * 5)
        assert published_bound(1.0, 10, 41, 5.0, True) == pytest.approx(10 / 82 * 7)


@pytest.mark.parametrize(("dim", "size"), [(10, 40), (9, 40), (10, 41), (64, 256), (7, 8)])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_norms_without_a_dense_matrix(
    dim: int, size: int, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DualStage(HarmonicFrame(dim, size, seed=3))
    dense = ShapedNorms.of(stage, order)
    monkeypatch.setattr(bounds, "MAX_DENSE", 0)
    fast = ShapedNorms.of(stage, order)
    assert fast.variation == pytest.approx(dense.variation, rel=1e-9)
    assert dense.spectral <= fast.spectral * (1 + 1e-8)
    assert fast.spectral < 3 * dense.spectral
    matrix = shaped(stage.frame.as_matrix().T * (dim / size), order)
    assert dense.spectral == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=1e-6)


def test_the_last_state_vanishes_for_zero_sum_frames_with_even_n() -> None:
    frame = HarmonicFrame(10, 40)
    found = SigmaDelta(1, 2, "stable").quantize(gaussian(500, 10), DualStage(frame))
    steps = found.steps(DualStage(frame))
    total = ((found.codes.double() - 0.5) * steps[:, None]).sum(1)
    assert float((total / steps).abs().max()) < 1e-9  # Σ (c - q) = u_N, and Σ c = 0


# --- Layers and networks: random networks, random inputs ----------------------------------------------------

NETWORKS, INPUTS = 100, 100


def quantized(
    weight: torch.Tensor, levels: int, ratio: int, step: str
) -> tuple[torch.Tensor, LayerFacts, LayerFacts]:
    """Ŵ, and facts a priori and a posteriori."""
    stage = DualStage(HarmonicFrame(weight.shape[1], ratio * weight.shape[1] // 2 * 2 + 2))
    found = SigmaDelta(1, levels, step).quantize(weight, stage)
    values = (found.codes.double() - (levels - 1) / 2) * found.scales.double()[:, None]
    restored = stage.synthesis(values)
    prior_error = float(vector_bound_prior(found.stable_steps, ShapedNorms.of(stage, 1)).norm())
    norm = spectral_bound(weight)
    prior = LayerFacts(norm, norm + prior_error, prior_error)
    return restored, prior, LayerFacts(norm, spectral_bound(restored), spectral_bound(weight - restored))


def with_bias(facts: LayerFacts, bias: torch.Tensor, error: torch.Tensor) -> LayerFacts:
    return LayerFacts(
        facts.weight_norm, facts.quantized_norm, facts.weight_error, float(bias.norm()), float(error.norm())
    )


class Affine:
    """A random affine map and its quantized twin."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        self.weight = gaussian(outputs, inputs, seed=seed) / inputs**0.5
        self.bias = gaussian(outputs, seed=seed + 1) / 4
        noise = gaussian(outputs, seed=seed + 2) / 50
        step = "stable" if seed % 2 else "mse"
        self.rounded, prior, posterior = quantized(self.weight, 2 + 2 * (seed % 3), 2 + seed % 5, step)
        self.rounded_bias = self.bias + noise
        self.prior, self.posterior = (with_bias(facts, self.bias, noise) for facts in (prior, posterior))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias

    def run_rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.rounded.T + self.rounded_bias


def test_layer_bounds() -> None:
    cases = tight = 0
    for seed in range(NETWORKS):
        layer = Affine(6 + seed % 5, 4 + seed % 7, 10 * seed)
        x = gaussian(INPUTS, layer.weight.shape[1], seed=seed)
        moved = x + 0.1 * gaussian(*x.shape, seed=seed + 1)
        errors = (torch.relu(layer.run(x)) - torch.relu(layer.run_rounded(moved))).norm(dim=1)
        for facts in (layer.prior, layer.posterior):
            for n in range(INPUTS):
                inputs = Spread(float(x[n].norm()), float((x[n] - moved[n]).norm()))
                bound = layer_bound(facts, inputs)
                assert errors[n] <= bound.error
                assert torch.relu(layer.run(x[n])).norm() <= bound.radius
                cases += 1
                tight += bool(errors[n] > 0.2 * bound.error)
    assert cases >= 2 * CASES
    assert tight > 100


def test_feed_forward_bounds() -> None:
    cases = vacuous = 0
    for seed in range(NETWORKS):
        widths = [8, 6 + seed % 4, 9, 5, 4][: 3 + seed % 3]
        layers = [Affine(a, b, 100 * seed + i) for i, (a, b) in enumerate(itertools.pairwise(widths))]
        x = gaussian(INPUTS, widths[0], seed=seed)
        exact, rounded, radii = x, x, []
        for number, layer in enumerate(layers):
            radii.append(exact.norm(dim=1))
            exact, rounded = layer.run(exact), layer.run_rounded(rounded)
            if number < len(layers) - 1:
                exact, rounded = torch.relu(exact), torch.relu(rounded)
        errors = (exact - rounded).norm(dim=1)
        for n in range(INPUTS):
            start = Spread(float(x[n].norm()))
            prior = feed_forward_bound([layer.prior for layer in layers], start)[-1]
            posterior = feed_forward_bound(
                [layer.posterior for layer in layers], start, radii=[float(r[n]) for r in radii]
            )[-1]
            assert errors[n] <= posterior.error <= prior.error
            assert exact[n].norm() <= prior.radius
            cases += 1
            flag = Bound(torch.tensor(prior.error), torch.tensor(float(exact[n].norm()))).vacuous
            vacuous += bool(flag)
    assert cases >= CASES
    assert vacuous > 0  # a-priori bounds of networks are vacuous more often than not, and say so


def test_residual_bounds() -> None:
    cases = 0
    for seed in range(NETWORKS):
        width, hidden = 6 + seed % 3, 5 + seed % 6
        blocks = [
            (Affine(width, hidden, 1000 * seed + 10 * i), Affine(hidden, width, 1000 * seed + 10 * i + 5))
            for i in range(1 + seed % 3)
        ]
        x = gaussian(INPUTS, width, seed=seed)
        exact, rounded = x, x
        priors = [Spread(float(line.norm())) for line in x]
        posteriors = list(priors)
        for inner, outer in blocks:
            inside = torch.tanh(inner.run(exact))
            for n in range(INPUTS):
                priors[n] = residual_bound(inner.prior, outer.prior, priors[n])
                measured = Spread(float(exact[n].norm()), posteriors[n].error)
                posteriors[n] = residual_bound(
                    inner.posterior, outer.posterior, measured, hidden_radius=float(inside[n].norm())
                )
            exact = exact + outer.run(inside)
            rounded = rounded + outer.run_rounded(torch.tanh(inner.run_rounded(rounded)))
        errors = (exact - rounded).norm(dim=1)
        for n in range(INPUTS):
            assert errors[n] <= posteriors[n].error <= priors[n].error
            assert exact[n].norm() <= priors[n].radius
            cases += 1
    assert cases >= CASES


@pytest.mark.parametrize("limit", [0, 1024])
def test_spectral_bounds_are_upper_bounds(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_SPECTRAL", limit)
    for seed in range(50):
        matrix = gaussian(3 + seed % 7, 2 + seed % 11, seed=seed)
        exact = float(torch.linalg.matrix_norm(matrix, ord=2))
        assert exact <= spectral_bound(matrix)
        assert spectral_bound(matrix) < 3 * exact
    assert spectral_bound(torch.zeros(0, 3)) == 0.0
    assert spectral_bound(torch.zeros(2, 3)) == 0.0


def test_bounds_as_figures() -> None:
    bound = Bound(torch.tensor([0.5, 3.0]), torch.tensor([1.0, 2.0]))
    assert bound.vacuous.tolist() == [False, True]
    assert bound.to_dict() == {"value": 3.0, "reference": 2.0, "vacuous": True}
    assert Bound(torch.empty(0), torch.empty(0)).to_dict()["vacuous"] is False
    assert math.isinf(Bound(torch.tensor(math.inf), torch.tensor(1.0)).to_dict()["value"])
