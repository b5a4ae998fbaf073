"""Families of transformers by structure: quantized, saved, reloaded bit for bit, by us and by transformers' own way."""

from __future__ import annotations

import pytest
import torch

import framequant as fq
from tests.model.architectures import FAMILIES, make_family, output


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_reloads_bit_for_bit(name, tmp_path):
    model, data = make_family(name)
    before = output(model, data)
    report = fq.quantize_(model, data, fq.FrameQuantConfig(bits=4, redundancy=1.0))
    expected = output(model, data)
    assert report.coverage == pytest.approx(FAMILIES[name][2], rel=0.02)
    assert any("of the weights" in warning for warning in report.warnings) == (report.coverage < 0.95)
    assert not torch.equal(expected, before)
    assert (expected - before).norm() < 0.5 * (before - before.mean()).norm()
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(output(fq.load(tmp_path / "out"), data), expected)
    loaded = type(model).from_pretrained(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    again, info = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert torch.equal(output(again, data), expected)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
