"""Sigma-Delta quantization: steps, duals, slopes over N, the post-pass, nearest rounding at equal bits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.sigma_delta import code_values
from framequant.errors import ConfigError, NumericalError
from framequant.frames import DualStage, HarmonicFrame
from framequant.frames.unit_norm import low_variation_order, random_frame, tetris_frame
from framequant.quantizers import sigma_delta
from framequant.quantizers.equal_bits import equal_levels, nearest_at_equal_bits, round_to_nearest
from framequant.quantizers.flips import LAGS, MoveCosts, flip_codes
from framequant.quantizers.sigma_delta import SigmaDelta, stored_scales


def gaussian(vectors: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vectors, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(quantizer: SigmaDelta, x: torch.Tensor, stage: DualStage) -> float:
    return float(quantizer.quantize(x, stage).errors.square().sum() / x.square().sum())


STAGES = {
    "harmonic": DualStage(HarmonicFrame(24, 96, seed=1)),
    "odd": DualStage(HarmonicFrame(15, 61)),
    "random": DualStage(random_frame(24, 96)),
    "tetris": DualStage(tetris_frame(24, 96)),
    "sobolev": DualStage(HarmonicFrame(24, 96), 1),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("step", ["stable", "norm", "mse", 1.5])
@pytest.mark.parametrize("passes", [0, 3])
def test_errors_are_those_of_the_stored_codes(name: str, step: str | float, passes: int) -> None:
    stage = STAGES[name]
    x = gaussian(40, stage.dim)
    x[7] = 0
    dual = "sobolev" if stage.dual_order else "canonical"
    found = SigmaDelta(1, 4, step, dual, passes).quantize(x, stage)
    values = code_values(found.codes, 4, torch.float64) * found.scales.double()[:, None]
    # Decoded with the dense oracle, not with the fast transform.
    restored = values @ stage.as_matrix()
    torch.testing.assert_close(found.errors, (x - restored).norm(dim=1), rtol=1e-8, atol=1e-9)
    assert found.scales.dtype == torch.bfloat16
    if step in ("stable", "norm"):
        assert int(found.overloads.sum()) == 0
    if not isinstance(step, float):
        assert float(found.errors[7]) == 0.0


def test_steps_in_order_of_size_and_error() -> None:
    x, stage = gaussian(100, 64), DualStage(HarmonicFrame(64, 512))
    by_step = {step: SigmaDelta(step=step).quantize(x, stage) for step in ("stable", "norm", "mse")}
    assert bool((by_step["stable"].steps(stage) <= by_step["norm"].steps(stage)).all())
    assert bool((by_step["mse"].errors <= by_step["stable"].errors).all())
    # A stable step is the least: |c| <= δ/2 for one bit, within the precision of the stored scale.
    largest = stage.frame.analysis(x).abs().amax(1)
    half = by_step["stable"].steps(stage) / 2
    assert bool((half >= largest * (1 - 1e-12)).all())
    assert bool((half <= largest * (1 + 2.0**-6)).all())
    assert float(SigmaDelta(step=3.0).quantize(x, stage).steps(stage).sub(3).abs().max()) < 3 * 2.0**-7


def test_sigma_delta_beats_memoryless_codes_in_the_same_frame() -> None:
    x, stage = gaussian(50, 64), DualStage(HarmonicFrame(64, 512))
    memoryless = relative(SigmaDelta(order=0, levels=2), x, stage)
    first = relative(SigmaDelta(order=1, levels=2), x, stage)
    assert first < memoryless / 5
    second = relative(SigmaDelta(2, 4, dual="sobolev"), x, DualStage(HarmonicFrame(64, 512), 2))
    assert second < relative(SigmaDelta(1, 4), x, stage)


def test_random_signs_help_vectors_that_resemble_their_neighbours() -> None:
    x = gaussian(30, 128) + 1
    plain, signed = (DualStage(HarmonicFrame(128, 512, seed)) for seed in (0, 1))
    assert relative(SigmaDelta(), x, signed) < relative(SigmaDelta(), x, plain) / 2


def test_the_order_of_a_frame_matters() -> None:
    x, frame = gaussian(200, 8), random_frame(8, 64)
    ordered = frame.reordered(low_variation_order(frame.as_matrix()))
    assert relative(SigmaDelta(), x, DualStage(ordered)) < 0.9 * relative(SigmaDelta(), x, DualStage(frame))


RATIOS = (6, 12, 24, 48)


@pytest.mark.parametrize(
    ("order", "levels", "dual", "slope"),
    [
        (1, 2, "canonical", -1.5),
        (1, 8, "canonical", -1.5),
        (1, 2, "sobolev", -1.5),
        (2, 4, "sobolev", -2.5),
        (3, 8, "sobolev", -3.5),
        (3, 8, "canonical", -1.0),
    ],
)
def test_slopes_of_the_error_over_n(order: int, levels: int, dual: str, slope: float) -> None:
    x = gaussian(300, 16)
    x = x / x.norm(dim=1, keepdim=True)
    quantizer = SigmaDelta(order, levels, "norm", dual)
    errors = []
    for ratio in RATIOS:
        stage = DualStage(HarmonicFrame(16, 16 * ratio), quantizer.dual_order)
        errors.append(float(quantizer.quantize(x, stage).errors.square().mean().sqrt()))
    assert np.polyfit(np.log(RATIOS), np.log(errors), 1)[0] == pytest.approx(slope, abs=0.15)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, stage = gaussian(30, 16), DualStage(HarmonicFrame(16, 64))
    whole = SigmaDelta(passes=4).quantize(x, stage)
    monkeypatch.setitem(sigma_delta.CHUNK, "cpu", 64 * 7)
    parts = SigmaDelta(passes=4).quantize(x, stage)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_scales_are_rounded_upwards_where_a_bound_rests_on_them() -> None:
    scales = torch.rand(1000, dtype=torch.float64) + 0.001
    up = stored_scales(scales, round_up=True).double()
    assert bool((up >= scales).all())
    assert bool((up <= scales * (1 + 2.0**-7)).all())
    with pytest.raises(NumericalError, match="beyond"):
        stored_scales(torch.tensor([1e300], dtype=torch.float64), round_up=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantizer", [SigmaDelta(), SigmaDelta(2, 4, dual="sobolev"), SigmaDelta(passes=10)])
def test_gpu_is_as_good_as_cpu(quantizer: SigmaDelta) -> None:
    x = gaussian(200, 96)
    stage = DualStage(HarmonicFrame(96, 768, seed=1), quantizer.dual_order)
    slow, fast = quantizer.quantize(x, stage), quantizer.quantize(x.cuda(), stage)
    # Last bits of the FFT differ, and with them some codes; the errors must not.
    assert float(fast.errors.square().sum()) == pytest.approx(float(slow.errors.square().sum()), rel=0.02)
    assert torch.equal(slow.scales, fast.scales.cpu())
    values = (
        code_values(fast.codes.cpu(), quantizer.levels, torch.float64) * fast.scales.cpu().double()[:, None]
    )
    torch.testing.assert_close(
        (x - stage.synthesis(values)).norm(dim=1), fast.errors.cpu(), rtol=1e-9, atol=1e-12
    )


def test_bad_input() -> None:
    stage = DualStage(HarmonicFrame(4, 8))
    with pytest.raises(NumericalError, match="NaN"):
        SigmaDelta().quantize(torch.full((1, 4), math.nan), stage)
    with pytest.raises(ConfigError, match="dual order 0"):
        SigmaDelta(dual="sobolev").quantize(torch.ones(1, 4), stage)
    with pytest.raises(ConfigError, match="passes"):
        SigmaDelta(passes=-1)
    with pytest.raises(ConfigError, match="unstable"):
        SigmaDelta(order=3, levels=4)


# --- The post-pass ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(STAGES)), st.sampled_from([2, 4, 6]), st.integers(0, 12), st.integers(0, 2**31))
def test_flips_never_raise_an_error(name: str, levels: int, passes: int, seed: int) -> None:
    stage = STAGES[name]
    x = gaussian(5, stage.dim, seed)
    codes = torch.randint(
        levels, (5, stage.num_coefficients), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    scales = torch.full((5,), 0.4).to(torch.bfloat16)

    def errors(c: torch.Tensor) -> torch.Tensor:
        return (x - stage.synthesis(code_values(c, levels, torch.float64) * scales.double()[:, None])).norm(
            dim=1
        )

    better = flip_codes(codes, x, scales, levels, stage, passes)
    assert better.dtype == torch.uint8
    assert int(better.max()) < levels
    assert bool((errors(better) <= errors(codes) * (1 + 1e-12)).all())
    if passes == 0:
        assert torch.equal(better, codes)


def test_flips_find_the_best_codes_of_a_tiny_frame() -> None:
    # Two dimensions, six vectors: all 64 one-bit codes can be tried. No move is left that helps.
    stage = DualStage(HarmonicFrame(2, 6))
    x = gaussian(40, 2)
    found = SigmaDelta(passes=50).quantize(x, stage)
    every = torch.tensor(np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T).to(torch.uint8)
    for line in range(40):
        scale = found.scales[line : line + 1]
        decoded = stage.synthesis(code_values(every, 2, torch.float64) * scale.double())
        errors = (x[line] - decoded).norm(dim=1)
        reached = (every == found.codes[line]).all(1).nonzero().item()
        changes = (every != found.codes[line]).sum(1)
        singles = errors[changes == 1]
        opposite = (every.int() - found.codes[line].int()).sum(1) == 0
        pairs = errors[(changes == 2) & opposite]
        assert errors[reached] <= torch.cat([singles, pairs]).min() + 1e-9


@pytest.mark.parametrize(("ratio", "gain"), [(2, 1.8), (4, 2.5), (8, 4)])
def test_flips_pay(ratio: int, gain: float) -> None:
    x, stage = gaussian(40, 64), DualStage(HarmonicFrame(64, 64 * ratio))
    assert relative(SigmaDelta(passes=40), x, stage) < relative(SigmaDelta(), x, stage) / gain


def test_costs_from_the_kernel_are_those_of_the_vectors() -> None:
    stage = STAGES["harmonic"]
    costs = MoveCosts.of(stage, torch.device("cpu"))
    rows = stage.as_matrix()
    torch.testing.assert_close(costs.single.expand(96), rows.square().sum(1))
    assert len(costs.pairs) == LAGS
    for lag, cost in enumerate(costs.pairs, start=1):
        torch.testing.assert_close(cost.expand(96 - lag), (rows[:-lag] - rows[lag:]).square().sum(1))


# --- Nearest rounding at equal bits -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "columns", "levels"),
    [(2.0, 1 << 20, 3), (2.25, 64, 4), (1.0, 8, 0), (8.03, 784, 257), (40, 784, 65536)],
)
def test_equal_levels(bits: float, columns: int, levels: int) -> None:
    assert equal_levels(bits, columns) == levels
    if levels:
        assert math.log2(levels) + 16 / columns <= bits + 1e-6


def test_nearest_rounding_is_near_the_optimal_uniform_grid() -> None:
    weight = gaussian(200, 256)
    for levels, optimum in ((4, 0.1188), (16, 0.01154)):
        error = (weight - round_to_nearest(weight, levels)).square().mean()
        assert optimum * 0.95 < float(error) < optimum * 1.08
    figures = nearest_at_equal_bits(weight, 4.1)
    assert figures["levels"] == 16
    assert figures["bits_per_weight"] == pytest.approx(4 + 16 / 256)
    assert nearest_at_equal_bits(weight, 0.5)["relative_error"] == 1.0
    assert nearest_at_equal_bits(torch.zeros(3, 4), 6)["relative_error"] == 0.0
