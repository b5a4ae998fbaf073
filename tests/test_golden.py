"""Checkpoints written by earlier versions: each must load for ever, to the same weights.

``python -m tests.test_golden`` writes the files of the current format version; it refuses to replace any.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import framequant as fq
from framequant.model.walk import quantized_linears

FOLDER = Path(__file__).parent / "golden"
CONFIGS = {
    "v1_scalar": fq.FrameQuantConfig(bits=2, redundancy=1.25),
    "v1_two_sided": fq.preset("framequant-paper", levels=5),
    "v1_groups": fq.preset("gptq", bits=3, group_size=8),
    "v1_trellis": fq.FrameQuantConfig(code="trellis", bits=2.25, redundancy=1.25, state_bits=8),
    "v1_sigma_delta": fq.preset("sigma-delta", frame_size_ratio=3, levels=6),
    "v1_sigma_delta_columns": fq.preset("sigma-delta", order=2, levels=4, dual="sobolev", vectors="columns"),
    "v1_output_blocks": fq.FrameQuantConfig(
        code="trellis", bits=2, redundancy=1.25, state_bits=8, output_hadamard_block=8
    ),
    "v1_row_factors": fq.FrameQuantConfig(code="trellis", bits=2, redundancy=1.25, state_bits=8),
    "v1_pairs": fq.FrameQuantConfig(
        code="trellis", bits=2.25, redundancy=1.25, state_bits=9, weights_per_state=2
    ),
}
TUNED = {"v1_row_factors": fq.TuneConfig(steps=8, learning_rate=0.05, evaluations=2)}


class Tiny(nn.Module):
    """Two blocks of one linear each, one of odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return inputs


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few entries and sums of every quantized linear's dense weight."""
    values = {}
    for name, layer in quantized_linears(model).items():
        weight = layer.dequantize(torch.float64)
        values[name] = [*weight[:2, :3].flatten().tolist(), weight.sum().item(), weight.abs().sum().item()]
    return values


def test_the_tuned_checkpoint_has_row_factors():
    for layer in quantized_linears(fq.load(FOLDER / "v1_row_factors", model=Tiny())).values():
        assert layer.spec.code.row_factors
        assert layer.tensors["row_factors"].unique().numel() > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_checkpoints_load_to_the_same_weights(name):
    found = fingerprint(fq.load(FOLDER / name, model=Tiny()))
    expected = json.loads((FOLDER / name / "fingerprint.json").read_text())
    assert found.keys() == expected.keys()
    for linear, values in expected.items():
        assert found[linear] == pytest.approx(values, rel=1e-9, abs=1e-12)


def _write() -> None:
    for name, config in CONFIGS.items():
        if (FOLDER / name).exists():
            continue
        torch.manual_seed(0)
        model = Tiny()
        teacher, data = copy.deepcopy(model), torch.randn(64, 24)
        fq.quantize_(model, data, config)
        if name in TUNED:
            fq.tune_(model, teacher, data, TUNED[name])
        fq.save_pretrained(model, FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        (FOLDER / name / "framequant_report.json").unlink()
        (FOLDER / name / "fingerprint.json").write_text(json.dumps(fingerprint(model), indent=1) + "\n")


if __name__ == "__main__":
    _write()
