"""Refinement by coordinate descent: never worse, at rest where no code can be changed for the better."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
from framequant.config import FrameQuantConfig
from framequant.errors import ConfigError, NumericalError
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import Moments, damped, feedback_factor
from framequant.quantizers.refine import refine_codes
from framequant.quantizers.rounding import proxy_loss, round_ldlq, round_nearest
from framequant.quantizers.weight import quantize_group

SPECS = [
    GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.UNIFORM, 5, ZeroPoint.FLOAT, group_size=16),
    GridSpec(GridKind.LLOYD_MAX, 4),
]


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients, and a damped Hessian whose eigenvalues fall over four decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    hessian = (basis * torch.logspace(0, -4, columns, dtype=torch.float64)) @ basis.T
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), damped(hessian, 0.01)


def naive_sweep(
    target: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor, coder: ScalarCoder
) -> torch.Tensor:
    rounded = rounded.clone()
    for j in range(target.shape[1]):
        gradient = (rounded - target) @ hessian[:, j]
        rounded[:, j] = coder.quantize((rounded[:, j] - gradient / hessian[j, j])[:, None], j)[:, 0]
    return rounded


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind.value)
@pytest.mark.parametrize("columns", [1, 30, 150])
def test_a_sweep_equals_its_definition(columns: int, spec: GridSpec, backend: str) -> None:
    target, hessian = problem(11, columns, 0)
    coder, other = ScalarCoder([target], spec, backend), ScalarCoder([target], spec)
    rounded = round_ldlq(target, feedback_factor(hessian, 0).upper, coder)
    before = rounded.clone()
    refined = refine_codes(target, rounded, hessian, coder, 1)
    assert torch.equal(refined, naive_sweep(target, rounded, hessian, other))
    assert torch.equal(coder.tensors()[0]["packed_codes"], other.tensors()[0]["packed_codes"])
    assert torch.equal(rounded, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 150), st.sampled_from(SPECS), st.booleans(), st.integers(0, 10_000))
def test_no_sweep_raises_the_loss(rows: int, columns: int, spec: GridSpec, ldlq: bool, seed: int) -> None:
    target, hessian = problem(rows, columns, seed)
    coder = ScalarCoder([target], spec)
    rounded = (
        round_ldlq(target, feedback_factor(hessian, 0).upper, coder) if ldlq else round_nearest(target, coder)
    )
    losses = [proxy_loss(rounded - target, hessian)]
    for _ in range(4):
        rounded = refine_codes(target, rounded, hessian, coder, 1)
        losses.append(proxy_loss(rounded - target, hessian))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))


def test_it_lowers_the_loss_of_ldlq() -> None:
    target, hessian = problem(64, 200, 0)
    coder = ScalarCoder([target], SPECS[0])
    rounded = round_ldlq(coder.clip(target), feedback_factor(hessian, 0).upper, coder)
    refined = refine_codes(target, rounded, hessian, coder, 3)
    assert proxy_loss(refined - target, hessian) < 0.97 * proxy_loss(rounded - target, hessian)


def test_it_comes_to_rest_where_no_single_code_can_improve() -> None:
    target, hessian = problem(4, 20, 3)
    coder = ScalarCoder([target], SPECS[0])
    rounded = refine_codes(target, round_nearest(target, coder), hessian, coder, 100)
    assert torch.equal(refine_codes(target, rounded, hessian, coder, 5), rounded)
    error = rounded - target
    for row in range(4):
        base = error[row] @ hessian @ error[row]
        for column in range(20):
            for level in rounded[row].unique():
                trial = error[row].clone()
                trial[column] = level - target[row, column]
                assert trial @ hessian @ trial >= base - 1e-12


def test_no_sweeps_and_diagonal_hessians_change_nothing() -> None:
    target, hessian = problem(9, 40, 0)
    coder = ScalarCoder([target], SPECS[1])
    rounded = round_nearest(target, coder)
    assert torch.equal(refine_codes(target, rounded, hessian, coder, 0), rounded)
    diagonal = torch.diag(hessian.diagonal())
    diagonal[3, 3] = 0  # no activation at all
    assert torch.equal(refine_codes(target, rounded, diagonal, coder, 3), rounded)


def test_what_is_not_finite_is_an_error() -> None:
    target, hessian = problem(3, 5, 0)
    coder = ScalarCoder([target], SPECS[0])
    rounded = round_nearest(target, coder)
    with pytest.raises(NumericalError, match="refinement"):
        refine_codes(target, rounded, hessian * torch.nan, coder, 1)


@pytest.mark.parametrize("order", ["natural", "descending"])
def test_the_setting_lowers_the_loss_of_a_linear(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator)
    inputs = torch.randn(256, 48, generator=generator) @ mixing
    moments = Moments(48)
    moments.add(inputs)
    weights = {"a": torch.randn(24, 48, generator=generator), "b": torch.randn(16, 48, generator=generator)}
    results = []
    for sweeps in (0, 3):
        config = FrameQuantConfig(refine_sweeps=sweeps, column_order=order)
        results.append(quantize_group(weights, moments, dict.fromkeys(weights, config), "g"))
    plain, refined = results
    assert sum(r.loss.proxy for r in refined.values()) < sum(r.loss.proxy for r in plain.values())
    for name in weights:
        assert plain[name].tensors["scales"].equal(refined[name].tensors["scales"])
        assert not plain[name].tensors["packed_codes"].equal(refined[name].tensors["packed_codes"])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"refine_sweeps": 17}, "from 0 to 16"),
        ({"refine_sweeps": -1}, "from 0 to 16"),
        ({"refine_sweeps": 1.5}, "an integer"),
        ({"refine_sweeps": True}, "an integer"),
        ({"refine_sweeps": 1, "code": "trellis"}, "needs code = 'scalar'"),
        ({"refine_sweeps": 1, "rounding": "nearest"}, "needs rounding = 'ldlq'"),
    ],
)
def test_settings_that_cannot_be(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrameQuantConfig(**settings_)
