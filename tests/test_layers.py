from __future__ import annotations

import copy

import pytest
import torch

import framequant as fq
from framequant.codes.grid import GridSpec
from framequant.config import FrameQuantConfig
from framequant.errors import CheckpointError
from framequant.layers import FrameLinear
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import quantize_group
from framequant.spec import LinearSpec


def make_layer(out_features=24, in_features=40, bias=True, **settings) -> FrameLinear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=g)
    moments = Moments(in_features)
    moments.add(torch.randn(200, in_features, generator=g))
    config = FrameQuantConfig(**settings)
    result = quantize_group({"layer": weight}, moments, {"layer": config}, "layer")["layer"]
    return FrameLinear.from_tensors(result.spec, result.tensors, torch.randn(out_features) if bias else None)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (1, 2), (7, 33), (130, 1)])
def test_forward_is_the_dense_product(shape, two_sided):
    layer = make_layer(*shape, two_sided=two_sided, redundancy=1.25)
    x = torch.randn(3, 5, shape[1], dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.dequantize(torch.float64), layer.bias.double())
    assert torch.allclose(layer(x), expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer = make_layer()
    x = torch.randn(50, 40)
    exact = layer(x.double())
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    dense = torch.nn.functional.linear(x.to(dtype), layer.dequantize(dtype), layer.bias.to(dtype))
    assert (out.double() - exact).norm() <= 2 * (dense.double() - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 3, 40)])
def test_batch_shapes(shape):
    layer = make_layer()
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)
    assert make_layer(bias=False).bias is None


def test_non_contiguous_inputs():
    layer = make_layer()
    x = torch.randn(40, 6).T
    assert torch.allclose(layer(x), layer(x.contiguous()), atol=1e-4)


def test_gradients_reach_the_input():
    layer = make_layer().double()
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_copy_is_independent_and_equal():
    layer = make_layer()
    copied = copy.deepcopy(layer)
    x = torch.randn(4, 40)
    assert torch.equal(layer(x), copied(x))
    copied.packed_codes.zero_()
    assert not torch.equal(layer(x), copied(x))


def test_tensors_of_the_wrong_shape_are_refused():
    layer = make_layer()
    tensors = {**layer.tensors, "scales": layer.scales[:-1]}
    with pytest.raises(CheckpointError, match=r"scales: expected torch.bfloat16 of shape \(24, 1\)"):
        FrameLinear.from_tensors(layer.spec, tensors)


def test_the_spec_survives_json():
    spec = make_layer(two_sided=True).spec
    assert LinearSpec.from_dict(spec.to_dict()) == spec
    assert isinstance(spec.code, GridSpec)
    with pytest.raises(CheckpointError, match="expected the keys"):
        LinearSpec.from_dict({**spec.to_dict(), "surprise": 1})
    with pytest.raises(CheckpointError, match="frame acts on dimension"):
        LinearSpec.from_dict({**spec.to_dict(), "in_features": 41})
    for bad in (None, [], 3, {"in_features": 1}):
        with pytest.raises(CheckpointError):
            LinearSpec.from_dict(bad)


@pytest.mark.parametrize("preset", ["framequant-scalar", "framequant"])
def test_decoding_once_changes_no_bit_and_leaves_nothing_behind(preset, monkeypatch):
    from framequant import layers, storage
    from tests.model.architectures import make, output

    monkeypatch.setattr(storage, "ROWS_PER_TILE", 16)  # several tiles a linear
    model, data = make("llama")
    fq.quantize_(model, data, fq.preset(preset))
    before = output(model, data)
    held = [module for module in model.modules() if isinstance(module, layers.FrameLinear)]
    with layers.decoded_once(model):
        assert torch.equal(output(model, data), before)
        assert all(layer._held for layer in held)
    assert all(layer._held is None for layer in held)
    monkeypatch.setitem(layers.HELD_BYTES, "cpu", 1)
    with layers.decoded_once(model):
        assert torch.equal(output(model, data), before)
        assert all(layer._held is None for layer in held)
