"""PTQ4ViT's search: steps are the best of those tried, gradients are the loss's, layers hold what was found."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch

from framequant.codes.activation import ActivationScaling, ActivationSpace, ActivationSpec
from framequant.layers import FrameLinear
from framequant.model.gradients import output_gradients
from tests.conftest import ROOT
from tests.model.architectures import timm_vit as tiny_vit


@pytest.fixture
def ptq(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    yield importlib.import_module("ptq4vit")
    sys.modules.pop("ptq4vit", None)


@pytest.fixture
def problem():
    """A weight with one wide row, inputs, and importance of outputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    weight[0] *= 20
    inputs = torch.randn(64, 16, generator=generator)
    return weight, inputs, torch.rand(64, 6, generator=generator)


def loss(ptq, weight, inputs, importance, step, bits):
    """The metric, written out."""
    total = 0.0
    rounded = (weight / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    for token, weights in zip(inputs, importance, strict=True):
        error = rounded @ token - weight @ token
        total += float(error @ torch.diag(weights) @ error)
    return total


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_weight_step_is_the_best_of_those_tried(ptq, problem, bits):
    weight, inputs, importance = problem
    settings = ptq.Settings(bits, search=20)
    (step,) = ptq.search_weight(weight, inputs, inputs @ weight.T, importance, 1, settings)
    tried = ptq.candidates(weight.abs().max(), 2 ** (bits - 1), 20)
    losses = [loss(ptq, weight, inputs, importance, candidate, bits) for candidate in tried]
    assert loss(ptq, weight, inputs, importance, step, bits) == pytest.approx(min(losses), rel=1e-4)
    assert float(tried[-1]) == pytest.approx(1.2 * float(weight.abs().max()) / 2 ** (bits - 1), rel=1e-2)


def test_gradients_decide_which_rows_the_step_serves(ptq, problem):
    weight, inputs, _ = problem
    settings, outputs = ptq.Settings(3), inputs @ weight.T
    narrow, wide = torch.full((64, 6), 1e-6), torch.full((64, 6), 1e-6)
    narrow[:, 1:], wide[:, 0] = 1, 1
    small, large = (ptq.search_weight(weight, inputs, outputs, i, 1, settings) for i in (narrow, wide))
    assert float(small) < float(large) / 3


def test_parts_of_a_weight_have_steps_of_their_own(ptq, problem):
    weight, inputs, importance = problem
    settings, outputs = ptq.Settings(4), inputs @ weight.T
    steps = ptq.search_weight(weight, inputs, outputs, importance, 3, settings)
    for part, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        alone = ptq.search_weight(weight[rows], inputs, outputs[:, rows], importance[:, rows], 1, settings)
        assert float(steps[part]) == float(alone)
    assert float(steps[0]) > 2 * float(steps[1])


def test_twin_steps_are_a_power_of_two_apart_and_the_negative_one_reaches_its_end(ptq, problem):
    weight, _, importance = problem
    inputs = torch.nn.functional.gelu(4 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1)))
    spec = ActivationSpec(6, ActivationScaling.TWIN, ActivationSpace.INPUT)
    found = ptq.search_activation(inputs, weight, inputs @ weight.T, importance, spec, 100)
    assert float(found[0]) == pytest.approx(float(-inputs.min()) / 31)
    power = torch.log2(found[1] / found[0])
    assert float(power) == round(float(power)) > 0
    losses = []
    for exponent in range(10):
        negative, positive = (31 * found[0] * scale for scale in (1, 2**exponent))
        steps = torch.where(inputs < 0, negative / 31, positive / 31)
        rounded = (inputs / steps).round().clamp(-31, 31) * steps
        losses.append(float((importance * ((rounded - inputs) @ weight.T).square()).sum()))
    assert min(range(10), key=losses.__getitem__) == int(power)


def test_importance_is_the_squared_gradient_of_the_sampled_loss(ptq):
    model = tiny_vit().eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
    found = ptq.observe(model, [images], names, tokens=10**6, seed=7)
    known = output_gradients(model, [images], names, seed=7)
    for name in names:
        inputs, importance = found[name]
        torch.testing.assert_close(importance.sum(1), known[name].squares[0], rtol=1e-4, atol=1e-12)
        assert len(inputs) == len(importance)
    few = ptq.observe(model, [images], names, tokens=5, seed=7)
    assert all(len(inputs) == len(importance) <= 5 for inputs, importance in few.values())


def test_layers_hold_what_was_found(ptq):
    model = tiny_vit().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(model)
    bits = ptq.quantize_(model, images, ptq.Settings(8, 8, tokens=64, search=20, rounds=2))
    assert 8 < bits < 9.5
    for name, layer in model.named_modules():
        if not isinstance(layer, FrameLinear):
            continue
        scaling = ActivationScaling.TWIN if name.endswith("fc2") else ActivationScaling.STATIC
        assert layer.spec.activation.scaling is scaling
        weight = before.get_submodule(name).weight.detach()
        steps = (
            layer.scales.float().unflatten(0, (3, -1))[:, 0, 0] if name.endswith("qkv") else layer.scales[0]
        )
        rounded = ptq.round_weight(weight, steps.float(), 8)
        torch.testing.assert_close(layer.dequantize(torch.float32), rounded, rtol=0, atol=1e-6)
    with torch.no_grad():
        exact, ours = before(images), model(images)
        coarse = copy.deepcopy(before)
        ptq.quantize_(coarse, images, ptq.Settings(3, 3, tokens=64, search=20, rounds=2))
        assert (ours - exact).norm() < 0.1 * exact.norm()
        assert (ours - exact).norm() < (coarse(images) - exact).norm()


def test_float_activations_stay_float(ptq):
    model = tiny_vit().eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    bits = ptq.quantize_(model, images, ptq.Settings(2, tokens=64, search=10))
    layers = [layer for layer in model.modules() if isinstance(layer, FrameLinear)]
    assert layers
    assert all(layer.spec.activation is None for layer in layers)
    assert 2 < bits < 4
