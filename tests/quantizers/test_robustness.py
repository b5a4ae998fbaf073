"""Degenerate activations and weights: results finite and no worse than zeros, or an error that says where."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import framequant as fq
from framequant.errors import NumericalError
from framequant.layers import FrameLinear
from framequant.quantizers.hessian import Moments, damped
from framequant.quantizers.rounding import proxy_loss
from framequant.quantizers.safety import shrinkage
from framequant.quantizers.weight import quantize_group

ROWS, COLUMNS, TOKENS = 24, 32, 64


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _spoiled(tensor, index, value):
    tensor = tensor.clone()
    tensor.view(-1)[index] = value
    return tensor


def _activations():
    x = _normal(TOKENS, COLUMNS)
    dead, loud = x.clone(), x.clone()
    dead[:, : COLUMNS // 2] = 0
    loud[:, 3] *= 1e4
    return {
        "normal": x,
        "constant": torch.full_like(x, 3.0),
        "zero": torch.zeros_like(x),
        "huge": x * 1e30,
        "denormal": x * 1e-40,
        "duplicated": x[:1].expand(TOKENS, -1).clone(),
        "one sample": x[:1],
        "rank two": x[:2].repeat(20, 1),
        "dead channels": dead,
        "loud channel": loud,
        "one spike": _spoiled(x, 7, 1e18),
        "mixed scales": x * torch.logspace(-20, 15, COLUMNS),
        "half precision": (x * 6e4 / x.abs().max()).half(),
    }


def _weights():
    w = _normal(ROWS, COLUMNS, seed=1)
    rows, scales = w.clone(), w.clone()
    rows[::3] = 0
    scales[2] *= 1e20
    scales[3] *= 1e-20
    return {
        "normal": w,
        "constant": torch.full_like(w, 0.7),
        "zero": torch.zeros_like(w),
        "rows of zeros": rows,
        "outlier": _spoiled(w, COLUMNS + 1, 1e6),
        "huge": w * 1e30,
        "denormal": w * 1e-40,
        "rows of other scales": scales,
        "one hot": torch.eye(ROWS, COLUMNS),
    }


CONFIGS = {
    "scalar": fq.preset("framequant-scalar"),
    "no damping": fq.FrameQuantConfig(damping=0.0),
    "one bit": fq.FrameQuantConfig(bits=1),
    "paper": fq.preset("framequant-paper"),
    "quip": fq.preset("quip"),
    "gptq": fq.preset("gptq"),
    "rtn": fq.preset("rtn"),
    "search": fq.FrameQuantConfig(grid="search", group_size=8, redundancy=1.0),
    "descending": fq.FrameQuantConfig(column_order="descending", zero_point="integer"),
    "trellis": fq.FrameQuantConfig(code="trellis", bits=2.25, redundancy=1.0, state_bits=8),
    "trellis, frame": fq.FrameQuantConfig(
        code="trellis", bits=2, redundancy=1.25, state_bits=8, row_factors=True
    ),
}


def _check(inputs, weight, config):
    moments = Moments(weight.shape[1])
    moments.add(inputs)
    result = quantize_group({"layer": weight}, moments, {"layer": config}, "layer")["layer"]
    layer = FrameLinear.from_tensors(result.spec, result.tensors)
    restored = layer.dequantize(torch.float64)
    assert bool(torch.isfinite(restored).all())
    assert all(bool(torch.isfinite(t).all()) for t in result.tensors.values() if t.is_floating_point())
    assert math.isfinite(result.loss.proxy)
    assert math.isfinite(result.loss.relative)
    # In units of the largest weight and of the Hessian's mean diagonal, so that no square leaves float64. Grids
    # have no zero: a zero weight becomes at most a few of the least float32.
    unit = max(float(weight.double().abs().max()), 1e-36)
    metric = damped(moments.hessian(), result.loss.damping)
    if config.rounding == "nearest":
        metric = torch.eye(len(metric), dtype=torch.float64)
    metric = metric / metric.diagonal().mean()
    error = proxy_loss((restored - weight.double()) / unit, metric)
    zeros = proxy_loss(weight.double() / unit, metric)
    assert error <= zeros * (1 + 1e-6) + weight.numel() * weight.shape[1] * (1e-36 / unit) ** 2


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("weight", _weights())
def test_results_are_finite_and_no_worse_than_zeros(config, weight):
    for inputs in _activations().values():
        _check(inputs, _weights()[weight], CONFIGS[config])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    rank=st.integers(0, 12),
    scale=st.sampled_from([1e-38, 1e-20, 1e-3, 1.0, 1e4, 1e18, 1e30]),
    spread=st.integers(0, 12),
    config=st.sampled_from(sorted(CONFIGS)),
)
def test_rank_deficient_data_of_any_scale(seed, tokens, rank, scale, spread, config):
    inputs = _normal(tokens, rank, seed=seed) @ _normal(rank, 16, seed=seed + 1) * scale
    weight = _normal(12, 16, seed=seed + 2) * torch.logspace(-spread, 0, 12)[:, None]
    _check(inputs, weight, CONFIGS[config])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), noise=st.floats(0, 3), damping=st.floats(0, 1))
def test_shrunk_matrices_are_never_worse_than_zeros(seed, scale, noise, damping):
    target, x = _normal(6, 8, seed=seed).double(), _normal(5, 8, seed=seed + 1).double()
    restored = scale * target + noise * _normal(6, 8, seed=seed + 2).double()
    hessian = x.T @ x / 5
    proxy, reference = proxy_loss(restored - target, hessian), proxy_loss(target, hessian)
    gain = shrinkage(target, restored, hessian, proxy, reference, damping)
    metric = damped(hessian, damping)
    zeros, loss = proxy_loss(target, metric), proxy_loss(restored - target, metric)
    assert (gain == 1.0) or loss > zeros
    assert proxy_loss(gain * restored - target, metric) <= zeros * (1 + 1e-9)


def test_ordinary_matrices_are_not_shrunk():
    moments = Moments(COLUMNS)
    moments.add(_normal(500, COLUMNS))
    for config in CONFIGS.values():
        result = quantize_group(
            {"layer": _normal(ROWS, COLUMNS, seed=3)}, moments, {"layer": config}, "layer"
        )["layer"]
        assert result.loss.gain == 1.0


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_scale_of_the_activations_changes_nothing(scale):
    x, weight = _normal(200, COLUMNS), _normal(ROWS, COLUMNS, seed=1)
    losses = []
    for inputs in (x, x.double() * scale):
        moments = Moments(COLUMNS)
        for part in inputs.float().split(50):
            moments.add(part)
        found = quantize_group({"a": weight}, moments, {"a": CONFIGS["scalar"]}, "a")["a"]
        losses.append(found.loss.relative)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_batches_of_both_kinds_add_up():
    x = _normal(100, 6).double()
    moments = Moments(6)
    moments.add(x[:50].float())
    moments.add((x[50:] * 1e20).float())
    exact = (x[:50].T @ x[:50] + 1e40 * x[50:].T @ x[50:]) / 100
    assert torch.allclose(moments.hessian() / 1e40, exact / 1e40, rtol=1e-5, atol=1e-6)


# --- Through the walk -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", ["framequant-scalar", "rtn", "framequant-paper"])
def test_bad_activations_name_layer_and_batch(value, preset):
    torch.manual_seed(0)
    batches = [(_normal(4, 32, seed=s),) for s in range(3)]
    batches[2] = (_spoiled(batches[2][0], 5, value),)
    with pytest.raises(NumericalError, match=r"blocks\.0\.0, batch 2: .*NaN or infinity"):
        fq.quantize_(Model(), batches, fq.preset(preset))


@pytest.mark.parametrize("preset", ["framequant-scalar", "rtn", "framequant-paper", "sigma-delta"])
def test_bad_weights_name_the_layer(preset):
    torch.manual_seed(0)
    model = Model()
    model.blocks[1][0].weight.data[3, 4] = math.nan
    with pytest.raises(NumericalError, match=r"blocks\.1\.0"):
        fq.quantize_(model, _normal(8, 32), fq.preset(preset))


@pytest.mark.parametrize("kind", ["zero", "constant", "duplicated", "one sample", "huge", "denormal"])
@pytest.mark.parametrize("preset", ["framequant-scalar", "framequant"])
def test_a_model_survives_degenerate_calibration(kind, preset):
    torch.manual_seed(0)
    model, data = Model(), _activations()[kind]
    report = fq.quantize_(
        model, data, fq.preset(preset, **({"state_bits": 8} if preset == "framequant" else {}))
    )
    assert len(report.linears) == 2
    assert bool(torch.isfinite(model(_normal(5, 32))).all())
    assert all(math.isfinite(entry.proxy_loss) for entry in report.linears)


def test_a_harmful_linear_is_shrunk_and_reported():
    torch.manual_seed(0)
    model = Model()
    model.blocks[0][0].weight.data = _weights()["constant"][:1].expand(32, -1).clone()
    config = fq.FrameQuantConfig(code="trellis", bits=1, redundancy=1.0, state_bits=8, float_targets=0)
    report = fq.quantize_(model, _activations()["one sample"], config)
    shrunk = [entry for entry in report.linears if "scales_shrunk_by" in entry.details]
    assert [entry.name for entry in shrunk] == [w.split(":")[0] for w in report.warnings if "more harm" in w]
    assert all(0 <= entry.details["scales_shrunk_by"] < 1 for entry in shrunk)
