"""LDLQ against its definition, and what must not change its codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
from framequant.errors import NumericalError
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.rounding import FeedbackCoder, proxy_loss, round_ldlq, round_nearest

SPECS = [
    GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.UNIFORM, 5, ZeroPoint.FLOAT, group_size=16),
    GridSpec(GridKind.LLOYD_MAX, 4),
]
SEEDS = st.integers(0, 10_000)


class Panels:
    """A coder of panels without feedback of its own: the general path of ``round_ldlq``."""

    def __init__(self, coder: ScalarCoder, panel: int = 1) -> None:
        self.coder, self.panel = coder, panel

    def quantize(self, columns: torch.Tensor, first: int) -> torch.Tensor:
        return self.coder.quantize(columns, first)


def correlated(columns: int, seed: int) -> torch.Tensor:
    """A Hessian whose eigenvalues fall over four decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.logspace(0, -4, columns, dtype=torch.float64)) @ basis.T


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_ldlq(
    coefficients: torch.Tensor, upper: torch.Tensor, coder: ScalarCoder, order: list[int]
) -> torch.Tensor:
    work, rounded = coefficients.clone(), torch.empty_like(coefficients)
    for i, column in enumerate(order):
        rounded[:, column] = coder.quantize(work[:, column, None], column)[:, 0]
        error = (work[:, column] - rounded[:, column]) / upper[i, i]
        work[:, order[i + 1 :]] -= torch.outer(error, upper[i, i + 1 :])
    return rounded


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind.value)
@pytest.mark.parametrize("columns", [7, 150, 256])
def test_equals_column_by_column(columns: int, spec: GridSpec, permuted: bool, backend: str) -> None:
    coefficients, hessian = matrix(9, columns, 0), correlated(columns, 1)
    order = torch.arange(columns)
    if permuted:
        order = torch.argsort(hessian.diagonal(), descending=True)
    upper = feedback_factor(hessian[order][:, order], 0.01).upper
    expected = naive_ldlq(coefficients, upper, ScalarCoder([coefficients], spec), order.tolist())
    fast = ScalarCoder([coefficients], spec, backend)
    assert isinstance(fast, FeedbackCoder)
    general = ScalarCoder([coefficients], spec)
    for coder, stored in ((fast, fast), (Panels(general), general)):
        rounded = round_ldlq(coefficients, upper, coder, order if permuted else None)
        assert torch.equal(rounded, expected)
        again = ScalarCoder([coefficients], spec)
        again.quantize(rounded, 0)
        assert torch.equal(stored.tensors()[0]["packed_codes"], again.tensors()[0]["packed_codes"])


def test_panels_feed_back_between_them_only() -> None:
    """With a panel as wide as the matrix nothing is fed back; with panels of four the loss lies between."""
    coefficients, hessian = matrix(32, 64, 0), correlated(64, 1)
    upper = feedback_factor(hessian, 0.01).upper
    losses = []
    for panel in (1, 4, 64):
        coder = Panels(ScalarCoder([coefficients], SPECS[0]), panel)
        rounded = round_ldlq(coefficients, upper, coder)
        losses.append(proxy_loss(rounded - coefficients, hessian))
    assert torch.equal(rounded, round_nearest(coefficients, ScalarCoder([coefficients], SPECS[0])))
    assert losses[0] < losses[1] < losses[2]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 140), st.sampled_from(SPECS), SEEDS)
def test_diagonal_hessian_means_nearest(rows: int, columns: int, spec: GridSpec, seed: int) -> None:
    coefficients = matrix(rows, columns, seed)
    diagonal = torch.diag(matrix(1, columns, seed + 1)[0].abs() + 0.1)
    rounded = round_ldlq(
        coefficients, feedback_factor(diagonal, 0.01).upper, ScalarCoder([coefficients], spec)
    )
    assert torch.equal(rounded, round_nearest(coefficients, ScalarCoder([coefficients], spec)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 140), st.sampled_from(SPECS), st.integers(-20, 20), SEEDS)
def test_scale_of_the_hessian_changes_no_code(columns: int, spec: GridSpec, exponent: int, seed: int) -> None:
    """Powers of four: the factor is scaled exactly, so are the codes exact."""
    coefficients, hessian = matrix(8, columns, seed), correlated(columns, seed)
    results = [
        round_ldlq(
            coefficients, feedback_factor(scale * hessian, 0.01).upper, ScalarCoder([coefficients], spec)
        )
        for scale in (1.0, 4.0**exponent)
    ]
    assert torch.equal(*results)


@settings(max_examples=15, deadline=None)
@given(st.integers(30, 200), st.sampled_from(SPECS), SEEDS)
def test_feedback_pays_on_correlated_inputs(columns: int, spec: GridSpec, seed: int) -> None:
    coefficients, hessian = matrix(48, columns, seed), correlated(columns, seed)
    coder = ScalarCoder([coefficients], spec)
    coefficients = coder.clip(coefficients)
    ldlq = round_ldlq(coefficients, feedback_factor(hessian, 0.01).upper, coder)
    plain = round_nearest(coefficients, ScalarCoder([coefficients], spec))
    assert proxy_loss(ldlq - coefficients, hessian) <= proxy_loss(plain - coefficients, hessian)


def test_stacked_matrices_are_rounded_as_alone() -> None:
    parts, hessian = [matrix(5, 40, 0), 3 * matrix(9, 40, 1)], correlated(40, 2)
    upper = feedback_factor(hessian, 0.01).upper
    for spec in (*SPECS, GridSpec(GridKind.MIN_MAX, 4, per_tensor=True)):
        together = round_ldlq(torch.cat(parts), upper, ScalarCoder(parts, spec))
        alone = [round_ldlq(part, upper, ScalarCoder([part], spec)) for part in parts]
        assert torch.equal(together, torch.cat(alone))


def test_what_is_not_finite_is_an_error() -> None:
    coefficients = matrix(3, 5, 0)
    coder = ScalarCoder([coefficients], SPECS[0])
    with pytest.raises(NumericalError, match="NaN or infinity"):
        round_ldlq(coefficients * torch.nan, torch.eye(5, dtype=torch.float64), coder)


def test_order_needs_single_columns() -> None:
    coefficients = matrix(3, 8, 0)
    coder = Panels(ScalarCoder([coefficients], SPECS[0]), 4)
    with pytest.raises(ValueError, match="single columns"):
        round_ldlq(coefficients, torch.eye(8, dtype=torch.float64), coder, torch.arange(8))
