from __future__ import annotations

import pytest
import torch

import framequant as fq
from framequant.model.fake_quant import FakeQuantLinear
from framequant.model.walk import quantized_linears
from tests.model.architectures import OwnModel
from tests.test_layers import make_layer


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    """Training computes with plain torch; faster kernels agree with it up to rounding, not bit for bit."""
    monkeypatch.setenv("FRAMEQUANT_BACKEND", "reference")


@pytest.mark.parametrize(
    "settings", [{}, {"two_sided": True}, {"zero_point": "float"}, {"zero_point": "integer", "group_size": 8}]
)
def test_the_fake_layer_is_the_quantized_one(settings):
    layer = make_layer(**settings)
    fake = FakeQuantLinear(layer)
    x = torch.randn(5, 40)
    assert torch.equal(fake(x), layer(x))
    baked = fake.bake()
    assert torch.equal(baked.packed_codes, layer.packed_codes), "nothing was trained, so no code may move"


def test_the_gradient_is_that_of_the_rounded_layer_inside_the_range_and_zero_beyond():
    fake = FakeQuantLinear(make_layer(6, 10, redundancy=1.0, frame="identity"))
    with torch.no_grad():
        fake.coefficients[0, 0] = 1e3
    x = torch.randn(7, 10)
    fake(x).sum().backward()
    expected = x.sum(0).expand(6, 10).clone()
    expected[0, 0] = 0
    assert torch.allclose(fake.coefficients.grad, expected, atol=1e-5)
    assert torch.allclose(fake.bias.grad, torch.full((6,), 7.0))


def trained_classifier() -> tuple[OwnModel, torch.Tensor, torch.Tensor]:
    """A float model of four classes of random points, trained until it knows them."""
    torch.manual_seed(0)
    model, data = OwnModel(), torch.randn(256, 20)
    labels = (data[:, 0] * data[:, 1] > 0).long() + 2 * (data[:, 2] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data), labels).backward()
        optimizer.step()
    return model.eval(), data, labels


def test_training_moves_codes_lowers_the_loss_and_bakes_bit_for_bit(tmp_path):
    model, data, labels = trained_classifier()
    fq.quantize_(model, data, fq.preset("framequant-scalar", bits=1, redundancy=1.0))
    before = {name: layer.packed_codes.clone() for name, layer in quantized_linears(model).items()}
    start = torch.nn.functional.cross_entropy(model(data), labels).item()
    assert set(fq.prepare_fake_quant_(model)) == set(before)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(data), labels)
        loss.backward()
        optimizer.step()
    expected = model(data).detach()
    fq.bake_fake_quant_(model)
    assert torch.equal(model(data), expected)
    assert torch.nn.functional.cross_entropy(expected, labels) < 0.7 * start
    assert any(
        not torch.equal(before[name], layer.packed_codes) for name, layer in quantized_linears(model).items()
    )
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(fq.load(tmp_path / "out", model=OwnModel())(data), expected)


def test_what_cannot_be_trained_is_refused():
    model, data, _ = trained_classifier()
    with pytest.raises(fq.DiscoveryError, match="no quantized linear"):
        fq.prepare_fake_quant_(model)
    fq.quantize_(model, data, fq.FrameQuantConfig(code="trellis", redundancy=1.0, state_bits=8))
    with pytest.raises(fq.ConfigError, match=r"trellis.*tune_"):
        fq.prepare_fake_quant_(model)
    assert quantized_linears(model), "a refused model is left as it was"
