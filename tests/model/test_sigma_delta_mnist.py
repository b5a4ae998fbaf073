"""The second paper's headline: a three-layer MNIST network with one-bit codes."""

import copy
import sys
from pathlib import Path

import pytest

import framequant as fq

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "sigma_delta"


@pytest.mark.slow
def test_three_layers_with_one_bit_codes(shared, monkeypatch):
    shared("data/mnist/mnist_train.npz")
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    from common import accuracy, mnist, train

    data = mnist()
    model = train("three layers", 0, data)
    exact = accuracy(model, data["test"])
    assert exact >= 98
    found = {}
    for ratio in (4, 8, 16):
        quantized = copy.deepcopy(model)
        report = fq.quantize_(quantized, config=fq.preset("sigma-delta", frame_size_ratio=ratio))
        assert report.bits_per_weight < ratio + 0.1
        found[ratio] = accuracy(quantized, data["validation"]), accuracy(quantized, data["test"])
    _, test = max(found.values())  # N/d is chosen on images that were held out of the training set
    assert test >= exact - 0.7
