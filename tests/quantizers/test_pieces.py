"""Large matrices are worked on by pieces, with the results of the whole."""

import torch

from framequant.config import preset
from framequant.quantizers import group_rounding, weight
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import quantize_group


def moments():
    found = Moments(24)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 24, generator=generator)
    found.add(inputs, inputs + 0.1 * torch.randn(100, 24, generator=generator))
    found.add_residual("a", torch.randn(100, 10, generator=generator), inputs)
    return found


def test_rows_and_hessians_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(10, 24, generator=generator), "b": torch.randn(7, 24, generator=generator)}
    configs = dict.fromkeys(weights, preset("framequant-scalar"))
    whole = quantize_group(weights, moments(), configs, "a")
    monkeypatch.setattr(weight, "LARGE", 4)
    monkeypatch.setattr(weight, "PIECE_ROWS", 5)
    monkeypatch.setattr(group_rounding, "PIECE_BYTES", 3 * 27 * 8)
    assert len(group_rounding._pieces(0, 17, torch.empty(17, 27))) > 4
    pieces = quantize_group(weights, moments(), configs, "a")
    for name in weights:
        for part, tensor in whole[name].tensors.items():
            assert torch.equal(tensor, pieces[name].tensors[part]), part


def test_moments_that_nobody_needs_any_more_are_let_go():
    weights, configs = {"a": torch.randn(10, 24)}, {"a": preset("framequant-scalar")}
    kept, used = moments(), moments()
    first = quantize_group(weights, kept, configs, "a")
    second = quantize_group(weights, used, configs, "a", consume=True)
    assert torch.equal(first["a"].tensors["packed_codes"], second["a"].tensors["packed_codes"])
    assert kept.hessian_sum is not None
    assert used.hessian_sum is None
    assert used.drift_sum is None


def test_short_memory_makes_smaller_pieces(monkeypatch):
    matrix = torch.empty(64, 1024)
    monkeypatch.setattr(group_rounding, "free_bytes", lambda device: 1 << 40)
    assert group_rounding._pieces(0, 64, matrix) == [(0, 64)]
    monkeypatch.setattr(group_rounding, "free_bytes", lambda device: 8 * 1024 * 32 * 4)
    assert group_rounding._pieces(0, 64, matrix)[:2] == [(0, 4), (4, 8)]
    monkeypatch.setattr(group_rounding, "free_bytes", lambda device: 0)
    assert len(group_rounding._pieces(0, 64, matrix)) == 64


def test_pieces_cover_all_rows():
    for first, last in ((0, 10), (3, 4), (5, 5), (0, 1000)):
        pieces = group_rounding._pieces(first, last, torch.empty(1, 1 << 20))
        rows = [row for a, b in pieces for row in range(a, b)]
        assert rows == list(range(first, last))
