"""Fused experts taken apart: equal to the fused forward, every expert quantized, few tokens topped up and listed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import framequant as fq
from framequant.layers import FrameLinear
from framequant.model import discovery, experts, mixture
from framequant.model.trace import Group
from framequant.quantizers.hessian import Moments
from tests.model.architectures import make_family, output

MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "granite_moe",
    "jetmoe",
    "llama4",
)
CONFIG = fq.FrameQuantConfig(bits=4, redundancy=1.0)


@pytest.mark.parametrize("name", MIXTURES)
def test_unfused_equals_fused(name):
    model, data = make_family(name)
    parameters = sum(p.numel() for p in model.parameters())
    default = output(model, data)  # whatever implementation transformers chooses
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    eager = output(model, data)
    assert experts.unfuse_(model)
    assert torch.equal(output(model, data), eager)
    torch.testing.assert_close(output(model, data), default, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not any(discovery.stacked_parameters(module) for module in model.modules())
    experts.fuse_(model)
    assert torch.equal(output(model, data), eager)
    assert not any(isinstance(module, experts.UnfusedExperts) for module in model.modules())


@pytest.mark.parametrize("name", MIXTURES)
def test_skeletons_without_weights_are_taken_apart_alike(name):
    model, _ = make_family(name)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert experts.find_fused(skeleton) == experts.find_fused(model)
    experts.unfuse_(model)
    experts.unfuse_(skeleton)
    assert skeleton.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_every_expert_is_quantized_and_routers_are_not(name):
    model, data = make_family(name)
    report = fq.quantize_(model, data, CONFIG)
    for _, module in model.named_modules():
        if isinstance(module, experts.UnfusedExperts):
            parts = [
                linear
                for expert in module.children()
                if isinstance(expert, nn.ModuleDict)
                for linear in expert.values()
            ]
            assert len(parts) == 4 * 2
            assert all(isinstance(linear, FrameLinear) for linear in parts)
    assert not any("router" in entry.name or entry.name.endswith("gate") for entry in report.linears)
    shares = report.to_dict()["summary"]
    assert 0.95 < shares["coverage"] <= 1
    assert shares["parameter_share"] == pytest.approx(
        shares["quantized_weights"] / report.model["parameters"], rel=1e-12
    )


def test_experts_of_a_layer_share_their_input_frame():
    model, data = make_family("mixtral")
    fq.quantize_(model, data, CONFIG)
    seeds = {
        model.get_submodule(f"model.layers.0.mlp.experts.{e}.gate_up_proj").spec.frame_in.seed
        for e in range(4)
    }
    assert len(seeds) == 1


def _starve(model, expert):
    """Make a Mixtral's routers avoid one expert."""
    for layer in model.model.layers:
        router = layer.mlp.gate

        def route(hidden, router=router):
            logits = nn.functional.linear(hidden, router.weight)
            logits[:, expert] = -torch.inf
            scores = logits.softmax(-1)
            values, indices = scores.topk(2, dim=-1)
            return logits, values / values.sum(-1, keepdim=True), indices

        router.forward = route


@pytest.mark.parametrize("preset", ["framequant-scalar", "framequant", "framequant-paper"])
def test_an_expert_without_tokens_is_quantized_and_listed(preset):
    model, data = make_family("mixtral")
    _starve(model, 2)
    before = copy.deepcopy(model.model.layers[0].mlp.experts)
    settings = {"state_bits": 8} if preset == "framequant" else {}
    report = fq.quantize_(model, data, fq.preset(preset, **settings))
    assert report.coverage == 1.0
    entries = {entry.name: entry for entry in report.linears}
    for layer in range(2):
        for kind in ("gate_up_proj", "down_proj"):
            entry = entries[f"model.layers.{layer}.mlp.experts.2.{kind}"]
            assert entry.tokens == 0
            assert entry.details["hessian"] == "topped up from the layer's experts"
            listed = [w for w in report.warnings if w.startswith(f"model.layers.{layer}.mlp.experts.{kind}:")]
            assert len(listed) == 1
            assert "2 (0)" in listed[0]
    layer = model.get_submodule("model.layers.0.mlp.experts.2.gate_up_proj")
    weight = before.gate_up_proj[2].detach()
    assert (layer.dequantize() - weight).norm() < 0.9 * weight.norm()
    if preset == "framequant":
        bits = report.allocation["choices"]
        assert set(bits) == set(entries)
        assert bits["model.layers.0.mlp.experts.2.gate_up_proj"]["loss"] > 0


def test_topping_up_is_the_stated_mean():
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(n, 6, generator=generator) for name, n in (("a", 10), ("b", 2), ("c", 0))}
    totals = {name: Moments(6) for name in inputs}
    stage = [Group([name], family="f") for name in inputs]
    for name, rows in inputs.items():
        totals[name].add(rows)
    few = mixture.top_up(totals, stage, {})
    every = torch.cat(list(inputs.values()))
    shared = every.T @ every / 12
    assert few == {"b": 2, "c": 0}
    torch.testing.assert_close(totals["c"].hessian(), shared.double(), rtol=1e-5, atol=1e-6)
    expected = (inputs["b"].T @ inputs["b"] + 4 * shared) / 6
    torch.testing.assert_close(totals["b"].hessian(), expected.double(), rtol=1e-5, atol=1e-6)
    own = inputs["a"].T @ inputs["a"] / 10
    torch.testing.assert_close(totals["a"].hessian(), own.double(), rtol=1e-5, atol=1e-6)


def test_a_family_without_any_token_keeps_the_identity():
    totals = {"a": Moments(3)}
    assert mixture.top_up(totals, [Group(["a"], family="f")], {}) == {"a": 0}
    assert torch.equal(totals["a"].hessian(), torch.eye(3, dtype=torch.float64))


def test_large_families_take_several_runs(monkeypatch):
    model, data = make_family("mixtral")
    whole = fq.quantize_(model, data, CONFIG)
    expected = output(model, data)
    monkeypatch.setattr(mixture, "MOMENT_BYTES", {"cpu": 4 * 48**2})
    model, data = make_family("mixtral")
    block = model.model.layers[0]
    experts.unfuse_(model)
    groups = [Group([f"mlp.experts.{e}.gate_up_proj"], family="f") for e in range(4)]
    assert [len(part) for part in mixture.stages(groups, block, True)] == [1, 1, 1, 1]
    parts = fq.quantize_(model, data, CONFIG)
    assert [entry.name for entry in parts.linears] == [entry.name for entry in whole.linears]
    full = {e.name: e for e in whole.linears if not e.details}
    assert full
    for entry in parts.linears:
        if entry.name in full:
            assert math.isclose(entry.relative_loss, full[entry.name].relative_loss, rel_tol=0.2)
    assert (output(model, data) - expected).norm() < 0.2 * expected.norm()


def test_experts_in_a_list_are_found_too():
    torch.manual_seed(0)
    model, data = Lists(), torch.randn(64, 16)
    report = fq.quantize_(model, data, fq.FrameQuantConfig(bits=4, redundancy=1.0))
    assert report.coverage > 0.94
    assert report.skipped == {"blocks.0.gate": "a router", "blocks.1.gate": "a router"}
    quantized = {entry.name for entry in report.linears}
    assert {f"blocks.{b}.experts.{e}" for b in range(2) for e in range(4)} <= quantized
    assert any("experts" in warning and "3 (0)" in warning for warning in report.warnings)


class _Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden):
        choice = self.gate(hidden)[:, :3].argmax(-1)  # the last expert is never chosen
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(hidden[rows])
        return hidden + out


class Lists(nn.Module):
    """A mixture as older libraries write it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(_Lists() for _ in range(2))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_what_cannot_be_taken_apart_is_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Parameter(torch.randn(4, 16, 16))
            self.linear = nn.Linear(16, 16)

        def forward(self, hidden):
            return hidden + self.linear(hidden) @ self.down.sum(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Odd() for _ in range(2))

        def forward(self, hidden):
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    torch.manual_seed(0)
    report = fq.quantize_(Model(), torch.randn(40, 16), CONFIG)
    assert report.coverage == pytest.approx(0.2)
    assert "cannot be taken apart" in report.skipped["blocks.0.down"]
    assert any("only 20.0%" in warning for warning in report.warnings)


def test_patterns_leave_experts_as_they_were(tmp_path):
    model, data = make_family("mixtral")
    before = output(model, data)
    report = fq.quantize_(
        model,
        data,
        fq.FrameQuantConfig(bits=4, redundancy=1.0, ignore=(r"layers\.1\.mlp", r"experts\.2\.down")),
    )
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["UnfusedExperts", "MixtralExperts"]
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts.2.down_proj"), nn.Linear)
    assert "left in float by" in report.skipped["model.layers.1.mlp.experts.down_proj"]
    assert "left in float by" in report.skipped["model.layers.0.mlp.experts.2.down_proj"]
    expected = output(model, data)
    assert not torch.equal(before, expected)
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(output(fq.load(tmp_path / "out"), data), expected)
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(output(loaded, data), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_export_fuses_experts_again(name, tmp_path):
    from framequant.integrations.transformers import dequantize_

    model, data = make_family(name)
    fq.quantize_(model, data, CONFIG)
    expected = output(model, data)
    fq.save_pretrained(model, tmp_path / "out")
    fq.export(tmp_path / "out", tmp_path / "float")
    plain = type(model).from_pretrained(tmp_path / "float")
    assert not any(isinstance(m, experts.UnfusedExperts | FrameLinear) for m in plain.modules())
    torch.testing.assert_close(output(plain, data), expected, rtol=1e-4, atol=1e-5)
    dense = dequantize_(fq.load(tmp_path / "out"), torch.float32)
    torch.testing.assert_close(output(dense, data), expected, rtol=1e-4, atol=1e-5)
