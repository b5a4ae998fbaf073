"""The promise on real models: what is reloaded from disk computes the logits that were evaluated, bit for bit."""

from __future__ import annotations

import pytest
import torch

import framequant as fq
from framequant.evaluation.images import calibration_images
from framequant.evaluation.text import calibration_windows, king_james
from framequant.integrations.sources import open_model


@pytest.mark.slow
def test_smollm2_reloads_bit_for_bit(tmp_path):
    from transformers import AutoModelForCausalLM

    opened = open_model("smollm2")
    data = calibration_windows(opened.tokenizer, king_james("old"), samples=4, sequence_length=128)
    report = fq.quantize_(opened.model, data, fq.preset("framequant-scalar"))
    assert len(report.linears) == 210
    assert report.bits_per_weight < 2.30
    fq.save_pretrained(opened.model, tmp_path / "out", tokenizer=opened.tokenizer)
    with torch.no_grad():
        expected = opened.model(data[:2]).logits
        for loaded in (
            fq.load(tmp_path / "out"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
            open_model(str(tmp_path / "out")).model,
        ):
            assert torch.equal(loaded(data[:2]).logits, expected)


@pytest.mark.slow
def test_deit_tiny_reloads_bit_for_bit(tmp_path, shared):
    opened = open_model(str(shared("models/deit_tiny_patch16_224")))
    images = calibration_images(shared("data/imagenet/train"), opened.require_images(), samples=8)
    fq.quantize_(opened.model, images, fq.preset("framequant-paper"))
    fq.save_pretrained(opened.model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(fq.load(tmp_path / "out")(images), opened.model(images))
