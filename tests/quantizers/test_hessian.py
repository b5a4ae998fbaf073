from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from framequant.errors import NumericalError
from framequant.quantizers import hessian as hessian_module
from framequant.quantizers.hessian import Moments, damped, feedback_factor


def _spd(n: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def test_moments_are_means_over_all_batches():
    x = torch.randn(50, 7, dtype=torch.float64)
    y = torch.randn(50, 7, dtype=torch.float64)
    deviation = torch.randn(50, 3, dtype=torch.float64)
    moments = Moments(7)
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(x[part], y[part])
        moments.add_residual("o", deviation[part], x[part])
    assert torch.allclose(moments.hessian(), x.T @ x / 50, atol=1e-14)
    assert torch.allclose(moments.drift(), (y - x).T @ x / 50, atol=1e-14)
    assert torch.allclose(moments.residual("o"), deviation.T @ x / 50, atol=1e-14)
    assert moments.residual("other") is None


def test_no_token_gives_the_identity():
    assert torch.equal(Moments(4).hessian(), torch.eye(4, dtype=torch.float64))


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = _spd(30)
    factor = feedback_factor(hessian, 0.01)
    assert torch.equal(factor.upper, factor.upper.triu())
    product = factor.upper.T @ factor.upper @ damped(hessian, 0.01)
    assert torch.allclose(product, torch.eye(30, dtype=torch.float64), atol=1e-10)
    assert factor.escalations == 0


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_damping_rises_by_itself_when_the_hessian_is_singular(rank):
    x = torch.randn(rank, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = feedback_factor(x.T @ x, 0.0)
    assert torch.isfinite(factor.upper).all()
    if rank:
        assert factor.escalations > 0
        assert factor.damping > 0


def test_an_indefinite_hessian_needs_more_damping_and_says_so():
    hessian = _spd(6) - 0.5 * torch.eye(6, dtype=torch.float64)
    assert feedback_factor(hessian, 0.01).escalations > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_are_named(value):
    hessian = _spd(4)
    hessian[1, 2] = value
    with pytest.raises(NumericalError, match=r"blocks\.3\.fc1.*NaN or infinity"):
        feedback_factor(hessian, 0.01, "blocks.3.fc1")


def test_scaling_the_hessian_scales_the_factor():
    hessian = _spd(9)
    one, four = feedback_factor(hessian, 0.01).upper, feedback_factor(4 * hessian, 0.01).upper
    assert torch.allclose(one, 2 * four, rtol=1e-12)


@pytest.mark.parametrize("n", [9, 64, 65])
def test_factors_by_pieces_are_those_of_the_whole(monkeypatch, n):
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    matrix = x.T @ x
    whole = feedback_factor(matrix, 0.01).upper
    monkeypatch.setattr(hessian_module, "SMALL", 8)
    monkeypatch.setattr(hessian_module, "PIECE_ROWS", 5)
    made = []

    def make():
        made.append(matrix.clone())
        return made[-1]

    pieces = feedback_factor(make, 0.01).upper
    assert torch.allclose(pieces, whole, rtol=1e-12, atol=1e-14)  # solved by pieces: the last bits differ
    assert not torch.equal(made[0], matrix)  # it was overwritten, and no copy was made
    singular = torch.zeros(n, n, dtype=torch.float64)
    singular[0, 0] = 1
    assert (
        feedback_factor(lambda: singular.clone(), 0).escalations
        == feedback_factor(singular, 0).escalations
        > 0
    )


def test_an_exchange_in_place_reverses_rows_and_columns(monkeypatch):
    monkeypatch.setattr(hessian_module, "SMALL", 2)
    monkeypatch.setattr(hessian_module, "PIECE_ROWS", 3)
    for n in (1, 2, 3, 6, 7, 13):
        matrix = torch.arange(n * n, dtype=torch.float64).reshape(n, n)
        assert torch.equal(hessian_module._exchanged_(matrix.clone()), matrix.flip(0, 1))
        assert torch.equal(hessian_module._exchanged_(matrix.T.clone().T), matrix.flip(0, 1))


@pytest.mark.parametrize("n", [1, 5, 8, 23])
def test_a_triangle_is_inverted_in_place_by_pieces(monkeypatch, n):
    monkeypatch.setattr(hessian_module, "SMALL", 4)
    monkeypatch.setattr(hessian_module, "PIECE_ROWS", 5)
    root = _spd(n).triu() + torch.eye(n, dtype=torch.float64)
    inverse = hessian_module._inverse_upper_(root.clone())
    assert torch.allclose(inverse @ root, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(inverse, inverse.triu())


def test_a_large_hessian_is_factored_in_its_own_memory(monkeypatch):
    monkeypatch.setattr(hessian_module, "SMALL", 4)
    hessian = _spd(20)
    made = hessian.clone()
    factor = feedback_factor(lambda: made, 0.01)
    assert factor.upper.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
    assert torch.allclose(factor.upper, feedback_factor(hessian, 0.01).upper, atol=1e-10)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_of_halves_lose_nothing_against_float32(monkeypatch, device):
    def mm(left, right, out_dtype):  # as a GPU has it; the CPU has no such product
        assert left.dtype == right.dtype == torch.bfloat16
        return left.to(out_dtype) @ right.to(out_dtype)

    def add(total, left, right):
        hessian_module._add_on_gpu(total, left.bfloat16(), right.bfloat16())

    if device == "cuda":
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(hessian_module, "SMALL", 4)
        monkeypatch.setattr(hessian_module, "_add_on_cpu", add)
    x, y = torch.randn(2, 100, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().T @ x.double()
    total = hessian_module._add_halves(None, x.float(), x.float())
    assert torch.allclose(total.double(), exact, rtol=1e-6, atol=1e-5)
    drift = (y.double() - x.double()).T @ x.double()
    twice = hessian_module._add_halves(2 * total, y.float() - x.float(), x.float()).double()
    assert torch.allclose(twice, 2 * exact + drift, rtol=1e-5, atol=1e-3)


def test_products_of_halves_leaves_the_setting_as_it_was():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with suppress(KeyError), hessian_module.products_of_halves():
        assert settings.fp32_precision == "bf16"
        raise KeyError
    assert settings.fp32_precision == before
