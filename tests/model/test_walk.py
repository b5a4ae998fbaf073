from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import framequant as fq
from framequant.model import streams
from framequant.model.discovery import find_blocks
from framequant.model.replay import Replay
from framequant.model.streams import Stream
from framequant.model.walk import quantized_linears
from tests.model.architectures import ARCHITECTURES, OwnModel, make, output, t5

CONFIG = fq.FrameQuantConfig(bits=4, redundancy=1.25)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_found_by_structure(name):
    model, data = make(name)
    before = output(model, data)
    report = fq.quantize_(model, data, CONFIG)
    after = output(model, data)
    _, _, linears, writers = ARCHITECTURES[name]
    blocks = report.model["blocks"]
    assert len(report.linears) == linears * blocks
    assert sum(entry.residual_correction for entry in report.linears) == writers * blocks
    assert report.skipped == {}
    assert report.coverage == 1.0
    assert torch.isfinite(after).all()
    error = (after - before).norm() / (before - before.mean()).norm()
    assert error < 0.35, "four bits should keep a model close to itself"


@pytest.mark.parametrize("name", ["llama", "timm_vit", "gpt2"])
def test_linears_that_read_one_tensor_share_the_input_frame(name):
    model, data = make(name)
    fq.quantize_(model, data, CONFIG)
    seeds: dict[str, list[int]] = {}
    for path, layer in quantized_linears(model).items():
        seeds.setdefault(path.rpartition(".")[2], []).append(layer.spec.frame_in.seed)
    if name == "llama":
        assert seeds["q_proj"] == seeds["k_proj"] == seeds["v_proj"]
        assert seeds["gate_proj"] == seeds["up_proj"]
        assert seeds["o_proj"] != seeds["q_proj"]
    every = [seed for values in seeds.values() for seed in values]
    assert len(set(every)) == {"llama": 8, "timm_vit": 8, "gpt2": 8}[name]


def test_the_same_seed_gives_the_same_codes_and_another_does_not():
    results = []
    for seed in (0, 0, 1):
        model, data = make("llama")
        fq.quantize_(model, data, fq.FrameQuantConfig(seed=seed))
        results.append(quantized_linears(model)["model.layers.1.mlp.down_proj"].packed_codes)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_model_is_left_as_it_was_apart_from_its_linears():
    model, data = make("llama")
    model.train()
    model.config.use_cache = True
    untouched = {name: p.clone() for name, p in model.named_parameters() if "proj" not in name}
    fq.quantize_(model, data, CONFIG)
    assert model.training
    assert model.config.use_cache is True
    assert all(torch.equal(untouched[name], dict(model.named_parameters())[name]) for name in untouched)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in model.model.layers.modules()
    )


def test_float_targets_lower_the_error_of_the_whole_model():
    errors = {}
    for strength in (0.0, 1.0):
        model, _ = make("llama")
        data = torch.randint(0, 64, (24, 48), generator=torch.Generator().manual_seed(5))
        before = output(model, data)
        config = fq.FrameQuantConfig(float_targets=strength, residual_targets=strength, bits=2)
        fq.quantize_(model, data, config)
        errors[strength] = (output(model, data) - before).norm().item()
    assert errors[1.0] < errors[0.0]


def test_padding_takes_no_part_in_the_hessian():
    torch.manual_seed(0)
    model, data = make("bert")
    mask = torch.ones_like(data)
    mask[:, 12:] = 0
    garbled = data.clone()
    garbled[:, 12:] = 7
    codes = []
    for ids in (data, garbled):
        copied = copy.deepcopy(model)
        fq.quantize_(copied, {"input_ids": ids, "attention_mask": mask}, CONFIG)
        codes.append(quantized_linears(copied)["encoder.layer.0.attention.self.query"].packed_codes)
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    "preset", ["framequant-paper", "framequant-scalar", "framequant", "quip", "gptq", "rtn"]
)
def test_every_preset_runs_and_reports_its_true_bits(preset):
    model, data = make("llama")
    report = fq.quantize_(model, data, fq.preset(preset, bits=3))
    for entry in report.linears:
        layer = model.get_submodule(entry.name)
        stored = layer.num_bytes() * 8 / entry.num_weights
        assert stored <= entry.bits_per_weight < stored + 8 * 80 / entry.num_weights
    if report.allocation:
        assert 0.995 * 3 <= report.bits_per_weight <= 3
    else:
        assert report.bits_per_weight > 3 * report.redundancy


def test_ignore_include_and_overrides_select_linears():
    model, data = make("llama")
    config = fq.FrameQuantConfig(
        ignore=("down_proj",), overrides={"q_proj": {"bits": 4}, "layers\\.0": {"skip": True}}
    )
    report = fq.quantize_(model, data, config)
    names = {entry.name for entry in report.linears}
    assert len(names) == 6
    assert all("layers.1" in name and "down" not in name for name in names)
    assert "16 levels" in next(entry.code for entry in report.linears if "q_proj" in entry.name)
    assert any("only" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ignore": ("lm_haed",)}, "lm_haed.*matches no linear.*model.layers.N.self_attn.q_proj"),
        ({"include": ("nothing",)}, "nothing.*matches no linear"),
        ({"overrides": {"xyz": {"bits": 3}}}, "xyz.*matches no linear"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(config, message):
    model, data = make("llama")
    with pytest.raises(fq.ConfigError, match=message):
        fq.quantize_(model, data, fq.FrameQuantConfig(**config))


def test_nan_in_a_weight_is_named():
    model, data = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(fq.NumericalError, match=r"layers\.1\.mlp\.up_proj.*weight"):
        fq.quantize_(model, data, CONFIG)


def test_nan_in_activations_is_named():
    model, data = make("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(fq.NumericalError, match=r"layers\.1\.self_attn\.q_proj.*activations"):
        fq.quantize_(model, data, CONFIG)


def test_a_model_without_blocks_and_empty_calibration_are_errors():
    with pytest.raises(fq.DiscoveryError, match="no repeated blocks"):
        fq.quantize_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8))
    with pytest.raises(fq.CalibrationError, match="empty"):
        fq.quantize_(OwnModel(), [])
    with pytest.raises(fq.CalibrationError, match="str"):
        fq.quantize_(OwnModel(), "calibration.txt")


def test_dead_inputs_and_a_single_sample_are_survived():
    model, _ = make("own")
    data = torch.zeros(1, 20)
    report = fq.quantize_(model, data, CONFIG)
    assert len(report.linears) == 3
    assert all(torch.isfinite(layer.dequantize()).all() for layer in quantized_linears(model).values())


def test_progress_ends_at_the_total():
    model, data = make("llama")
    seen: list[fq.Progress] = []
    fq.quantize_(model, data, CONFIG, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80)


def test_a_walk_in_float64_leaves_the_model_in_its_own_dtype(tmp_path):
    model, data = make("llama")
    model.to(torch.bfloat16)
    report = fq.quantize_(model, data, fq.FrameQuantConfig(walk_dtype="float64"))
    assert report.environment["dtype"] == "float64"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.isfinite(output(model, data)).all()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "timm_vit"])
def test_a_head_is_quantized_when_it_is_named(name, tmp_path):
    model, data = make(name)
    head = "head" if name == "timm_vit" else "lm_head"
    config = fq.FrameQuantConfig(bits=4, include=(f"^{head}$", "blocks|layers"))
    report = fq.quantize_(model, data, config)
    assert isinstance(model.get_submodule(head), fq.FrameLinear)
    assert report.linears[-1].name == head
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(output(fq.load(tmp_path / "out"), data), output(model, data))


def test_an_embedding_stays_float_when_the_head_it_was_tied_to_is_quantized():
    model, data = make("llama_tied")
    before = model.model.embed_tokens.weight.clone()
    fq.quantize_(model, data, fq.FrameQuantConfig(include=("lm_head",)))
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.config.tie_word_embeddings is False


def test_a_decoder_is_calibrated_on_its_quantized_encoder(tmp_path):
    torch.manual_seed(0)
    model = t5()
    ids = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    seen: dict[str, torch.Tensor] = {}

    def record(module, args):
        seen["cross"] = args[0]

    chains = find_blocks(model)
    replay = Replay(model, chains, batch)
    assert [name.split(".")[0] for name in replay.names] == ["encoder"] * 2 + ["decoder"] * 2
    with torch.no_grad():
        stream = Stream(replay, [batch])
        for index in range(3):
            stream.advance(index, [call.run(replay.blocks[index]) for call in stream.calls(index)])
        cross = model.decoder.block[1].layer[1].EncDecAttention.k
        hook = cross.register_forward_pre_hook(record)
        model(**batch)
        expected = seen["cross"]
        stream.calls(3)[0].run(replay.blocks[3])
        hook.remove()
    assert torch.equal(seen["cross"], expected)
    report = fq.quantize_(model, batch, CONFIG)
    assert len(report.linears) == 2 * 6 + 2 * 10
    assert report.coverage == 1.0


def test_keeping_the_float_activations_changes_nothing(monkeypatch):
    codes = []
    for limit in (1 << 30, 0):
        monkeypatch.setitem(streams.FLOAT_CACHE_BYTES, "cpu", limit)
        model, data = make("llama")
        fq.quantize_(model, data, CONFIG)
        codes.append({name: layer.packed_codes for name, layer in quantized_linears(model).items()})
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


class OverwritingBlock(nn.Module):
    """A block that writes to its first linear's input after the linear has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs * 1.0
        out = self.first(hidden)
        hidden += 3.0
        return inputs + self.second(torch.relu(out + hidden))


def test_activations_that_the_block_overwrites_are_not_kept(monkeypatch):
    codes = []
    for limit in (1 << 30, 0):
        monkeypatch.setitem(streams.FLOAT_CACHE_BYTES, "cpu", limit)
        torch.manual_seed(0)
        model = nn.Sequential(OverwritingBlock(), OverwritingBlock())
        holder = nn.Module()
        holder.blocks = model
        holder.forward = model.forward
        fq.quantize_(holder, torch.randn(64, 20), CONFIG)
        codes.append([layer.packed_codes for layer in quantized_linears(holder).values()])
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))
