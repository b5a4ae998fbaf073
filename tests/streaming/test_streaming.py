"""A streamed run writes what a run in memory does, wherever activations wait."""

import pytest
import torch
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration, ViTForImageClassification

import framequant as fq
from framequant.errors import ConfigError, ModelSourceError
from tests.streaming.models import IDS, in_memory, same_tensors, save_llama, save_t5, save_vit, tensors

PRESETS = {
    "default": fq.preset("framequant", state_bits=8),
    "scalar": fq.preset("framequant-scalar"),
    "paper": fq.preset("framequant-paper"),
    "float64": fq.preset("framequant-scalar", walk_dtype="float64"),
    "head": fq.preset("framequant-scalar", include=["lm_head", "layers"]),
    "head and gradients": fq.preset("framequant", state_bits=8, include=["lm_head", "layers"]),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_codes_are_those_of_a_run_in_memory(tmp_path, name, tied):
    source, config = save_llama(tmp_path / "model", tied=tied), PRESETS[name]
    model = in_memory(source, tmp_path / "memory", IDS, config)
    run = fq.quantize_streaming(source, tmp_path / "stream", IDS, config)
    same_tensors(tmp_path / "memory", tmp_path / "stream")
    for file in ("config.json", "README.md", "generation_config.json"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "stream" / file).read_bytes()
    assert [entry.name for entry in run.report.linears] == [e.name for e in model.framequant_report.linears]
    assert not (tmp_path / "stream.partial").exists()
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        assert torch.equal(fq.load(tmp_path / "stream")(IDS).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stream")(IDS).logits, expected)


def test_half_precision(tmp_path):
    source = save_llama(tmp_path / "model")
    config = fq.preset("framequant", state_bits=8)
    in_memory(source, tmp_path / "memory", IDS, config, dtype=torch.bfloat16)
    fq.quantize_streaming(source, tmp_path / "stream", IDS, config, dtype=torch.bfloat16)
    same_tensors(tmp_path / "memory", tmp_path / "stream")


@pytest.mark.parametrize("config", [fq.preset("framequant", state_bits=8), fq.preset("framequant-scalar")])
def test_activations_on_disk_change_no_bit(tmp_path, config):
    source = save_llama(tmp_path / "model")
    data = [
        {"input_ids": IDS[i : i + 2], "attention_mask": torch.ones(2, 32, dtype=torch.long)}
        for i in range(0, 8, 2)
    ]
    data[1]["attention_mask"][:, 20:] = 0
    near = fq.quantize_streaming(source, tmp_path / "near", data, config)
    far = fq.quantize_streaming(source, tmp_path / "far", data, config, max_memory="1MB")
    assert (near.place, far.place) == ("device", "disk")
    same_tensors(tmp_path / "near", tmp_path / "far")


def test_images(tmp_path):
    source, config = save_vit(tmp_path / "model"), fq.preset("framequant-scalar")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    in_memory(source, tmp_path / "memory", images, config, kind=ViTForImageClassification)
    fq.quantize_streaming(source, tmp_path / "stream", images, config)
    same_tensors(tmp_path / "memory", tmp_path / "stream")


def test_a_decoder_that_reads_its_encoder(tmp_path):
    source, config = save_t5(tmp_path / "model"), fq.preset("framequant-scalar")
    data = {"input_ids": IDS, "decoder_input_ids": IDS}
    in_memory(source, tmp_path / "memory", data, config, kind=T5ForConditionalGeneration)
    fq.quantize_streaming(source, tmp_path / "stream", data, config, max_memory="1MB")
    same_tensors(tmp_path / "memory", tmp_path / "stream")


def test_several_chains_fall_back_to_inputs_and_say_so(tmp_path):
    source = save_t5(tmp_path / "model")
    data = {"input_ids": IDS, "decoder_input_ids": IDS}
    run = fq.quantize_streaming(source, tmp_path / "out", data, fq.preset("framequant", state_bits=8))
    assert any("weighed layer by layer" in warning for warning in run.report.warnings)
    assert run.report.bits_per_weight == pytest.approx(2.25, abs=0.05)
    rates = {choice["bits"] for choice in run.report.allocation["choices"].values()}
    assert len(rates) > 1


def test_no_block_stays_in_memory(tmp_path):
    from framequant.streaming.skeleton import build_skeleton

    skeleton = build_skeleton(save_llama(tmp_path / "model"), torch.float32)
    most = 0

    def watch(_):
        nonlocal most
        blocks = skeleton.model.model.layers
        most = max(most, sum(any(not p.is_meta for p in block.parameters()) for block in blocks))

    fq.quantize_streaming(skeleton, tmp_path / "out", IDS, fq.preset("framequant-scalar"), progress=watch)
    assert most == 1
    assert all(t.is_meta for block in skeleton.model.model.layers for t in block.state_dict().values())


def test_models_that_cannot_be_streamed_are_refused(tmp_path):
    source = save_llama(tmp_path / "model")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match="cannot be streamed"):
        fq.quantize_streaming(source, tmp_path / "out", IDS)
    with pytest.raises(ConfigError, match="Sigma-Delta"):
        fq.quantize_streaming(source, tmp_path / "out", IDS, fq.preset("sigma-delta"))
    assert not (tmp_path / "out.partial").exists()


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import save_file

    source = save_llama(tmp_path / "model")
    held = tensors(source)
    held.pop("model.layers.1.mlp.down_proj.weight")
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelSourceError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        fq.quantize_streaming(source, tmp_path / "out", IDS)
