from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import framequant as fq
from framequant.cli.app import app
from framequant.evaluation.images import batches_of_files, calibration_images, find_images
from framequant.integrations.export import densify_
from framequant.integrations.export_gguf import pre_tokenizer_name, to_adjacent_pairs
from framequant.integrations.sources import open_model
from framequant.model.walk import quantized_linears
from tests.conftest import make_text
from tests.model.architectures import make, output

CHEAP = fq.FrameQuantConfig(frame="hadamard", redundancy=1.0, refine_sweeps=0)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantized(name, folder, dtype=torch.float32, tokenizer=None):
    """A quantized tiny model saved in a folder, its data, and the outputs of its checkpoint."""
    model, data = make(name)
    fq.quantize_(model.to(dtype), data.to(dtype) if data.is_floating_point() else data, CHEAP)
    fq.save_pretrained(model, folder, tokenizer=tokenizer)
    return data, output(fq.load(folder, dtype=torch.float32), data)


def byte_level_tokenizer(vocab_size=64):
    """A small byte-level BPE, as GPT-2's and Llama 3's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([make_text(300)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "hf_vit", "gemma2"])
def test_safetensors_is_what_transformers_alone_reads(name, tmp_path):
    import transformers

    data, expected = quantized(name, tmp_path / "q")
    result = fq.export(tmp_path / "q", tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert "quantization_config" not in config
    model = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "float")
    assert not quantized_linears(model)
    torch.testing.assert_close(output(model, data), expected, rtol=1e-3, atol=1e-3)
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "float").iterdir())
    assert result["load"].startswith(f"transformers.{type(model).__name__}")


def test_safetensors_of_timm_is_a_local_directory(tmp_path, vit_directory, image_folder):
    import timm

    opened = open_model(str(vit_directory))
    images = calibration_images(image_folder, opened.images, 8)
    fq.quantize_(opened.model, images, CHEAP)
    fq.save_pretrained(opened.model, tmp_path / "q")
    fq.export(tmp_path / "q", tmp_path / "float", dtype="float16")
    model = timm.create_model(f"local-dir:{tmp_path / 'float'}", pretrained=True)
    expected = output(fq.load(tmp_path / "q"), images)
    torch.testing.assert_close(output(model.eval(), images), expected, rtol=1e-2, atol=1e-2)
    assert model.pretrained_cfg["crop_pct"] == 0.8
    size = (tmp_path / "float" / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(parameter.numel() for parameter in model.parameters())


def test_biases_that_the_code_holds_are_exported():
    model, data = make("opt")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    fq.quantize_(model, None, fq.preset("sigma-delta"))
    assert all(layer.bias is None for layer in quantized_linears(model).values())
    expected = output(model, data)
    torch.testing.assert_close(output(densify_(model, torch.float32), data), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_is_read_by_transformers(kind, dtype, tolerance, tmp_path):
    import transformers

    pytest.importorskip("gguf")
    torch.manual_seed(0)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    settings = {"vocab_size": 70, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    # transformers reads Qwen3's GGUF with heads of 128, whatever the file says.
    settings |= {"head_dim": 128 if kind == "qwen3" else 16}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    config = getattr(transformers, f"{names[kind]}Config")(**settings)
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    data = torch.randint(2, 60, (4, 20), generator=torch.Generator().manual_seed(1))
    fq.quantize_(model, data, CHEAP)
    tokenizer = byte_level_tokenizer()
    fq.save_pretrained(model, tmp_path / "q", tokenizer=tokenizer)
    result = fq.export(tmp_path / "q", tmp_path / "m.gguf", "gguf", dtype=dtype)
    assert (result["architecture"], result["tokenizer"]) == ("llama" if kind == "mistral" else kind, True)
    opened = open_model(str(tmp_path / "m.gguf"))
    torch.testing.assert_close(
        output(opened.model, data), output(model, data), rtol=tolerance, atol=tolerance
    )
    text = "the old tiger reads of a lake"
    assert opened.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_gguf_header_and_bytes(tmp_path):
    gguf = pytest.importorskip("gguf")
    quantized("llama_tied", tmp_path / "q")
    result = fq.export(tmp_path / "q", tmp_path / "m.gguf", "gguf", dtype="float16")
    reader = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors
    assert len(tensors) == result["tensors"] == 2 * 9 + 2
    dense = densify_(fq.load(tmp_path / "q"), torch.float16).state_dict()
    key = dense["model.layers.1.self_attn.k_proj.weight"]
    width = 12  # of a head
    stored = torch.from_numpy(tensors["blk.1.attn_k.weight"].data.copy())
    assert torch.equal(
        stored[1], key[width // 2]
    )  # the second row of a pair is the half of a head further down
    assert torch.equal(stored[width], key[width])
    assert torch.from_numpy(tensors["blk.1.ffn_up.weight"].data.copy()).equal(
        dense["model.layers.1.mlp.up_proj.weight"]
    )


def test_adjacent_pairs_of_one_head():
    assert to_adjacent_pairs(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_adjacent_pairs(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        ({"pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        ({"pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}}]}, "llama-bpe"),
        ({"pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\p{N}"}}]}, "qwen2"),
    ],
)
def test_names_of_pre_tokenizers(data, name):
    assert pre_tokenizer_name(data) == name


@pytest.fixture(scope="module")
def vit_checkpoint(tmp_path_factory, vit_directory, image_folder):
    """A quantized tiny timm model."""
    opened = open_model(str(vit_directory))
    fq.quantize_(opened.model, calibration_images(image_folder, opened.images, 8), CHEAP)
    return fq.save_pretrained(opened.model, tmp_path_factory.mktemp("onnx") / "q")


def test_onnx_of_timm_has_torchs_logits(tmp_path, vit_checkpoint, image_folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "m.onnx"
    result = run("export", vit_checkpoint, "--format", "onnx", "--out", file, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    settings = json.loads(session.get_modelmeta().custom_metadata_map["framequant.images"])
    assert (settings["height"], settings["mean"]) == (32, [0.5, 0.5, 0.5])
    opened = open_model(str(vit_checkpoint))
    for size in (1, 5):
        pixels = next(batches_of_files(find_images(image_folder), opened.images, size))
        logits = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        torch.testing.assert_close(logits, output(opened.model, pixels), rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.slow
def test_onnx_of_a_transformers_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    data, expected = quantized("hf_vit", tmp_path / "q")
    fq.export(tmp_path / "q", tmp_path / "m.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"pixels": data.numpy()})[0]), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_onnx_of_deit_tiny_has_the_same_top1(tmp_path, shared):
    onnxruntime = pytest.importorskip("onnxruntime")
    opened = open_model(str(shared("models/deit_tiny_patch16_224")))
    images = calibration_images(shared("data/imagenet/train"), opened.require_images(), samples=16)
    fq.quantize_(opened.model, images, fq.preset("framequant-scalar"))
    fq.save_pretrained(opened.model, tmp_path / "q")
    result = fq.export(tmp_path / "q", tmp_path / "deit.onnx", "onnx")
    assert result["difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "deit.onnx"), providers=["CPUExecutionProvider"])
    files = find_images(shared("data/imagenet/val"))[::20]
    same = 0
    for pixels in batches_of_files(files, opened.require_images(), 16):
        logits = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        same += int((logits.argmax(1) == output(opened.model, pixels).argmax(1)).sum())
    assert same == len(files) == 65


@pytest.mark.slow
def test_gguf_of_smollm2(tmp_path):
    opened = open_model("smollm2")
    model, tokenizer = opened.model, opened.tokenizer
    ids = torch.randint(0, 40000, (2, 32), generator=torch.Generator().manual_seed(0))
    fq.quantize_(model, ids, fq.preset("rtn", bits=4))
    fq.save_pretrained(model, tmp_path / "q", tokenizer=tokenizer)
    fq.export(tmp_path / "q", tmp_path / "m.gguf", "gguf", dtype="float16")
    again = open_model(str(tmp_path / "m.gguf"))
    torch.testing.assert_close(output(again.model, ids), output(model, ids), rtol=0.02, atol=0.05)
    text = "In 1969, Armstrong walked on the moon.\n\n  2 + 2 = 4"
    assert again.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("package", "extra"), [("onnx", "onnx"), ("onnxscript", "onnx"), ("gguf", "gguf")])
def test_missing_extras_say_the_pip_command(monkeypatch, tmp_path, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fq.ModelSourceError, match=rf"pip install 'framequant\[{extra}\]'"):
        fq.export(tmp_path, tmp_path / "m", extra)


def test_bad_requests(tmp_path, llama_directory, vit_checkpoint):
    quantized("llama", tmp_path / "q")
    quantized("opt", tmp_path / "opt")
    cases = [
        (fq.ConfigError, "Did you mean 'onnx'", (vit_checkpoint, "m", "onx"), {}),
        (fq.ConfigError, "Did you mean 'float16'", (vit_checkpoint, "m"), {"dtype": "float61"}),
        (fq.ModelSourceError, "reads text; ONNX export is for vision", (tmp_path / "q", "m", "onnx"), {}),
        (fq.ModelSourceError, "GGUF export knows .*llama", (tmp_path / "opt", "m", "gguf"), {}),
        (fq.ModelSourceError, "GGUF export knows .*llama", (vit_checkpoint, "m", "gguf"), {}),
        (fq.ModelSourceError, "is not quantized by framequant", (llama_directory, "m"), {}),
        (fq.CheckpointError, "is the checkpoint itself", (tmp_path / "q", "q"), {"overwrite": True}),
        (fq.CheckpointError, "is not empty", (tmp_path / "q", "opt"), {}),
        (fq.CheckpointError, "is a directory; give a file name", (tmp_path / "q", "opt", "gguf"), {}),
    ]
    for error, message, (source, out, *rest), options in cases:
        with pytest.raises(error, match=message):
            fq.export(source, tmp_path / out, *rest, **options)
    (tmp_path / "m.gguf").write_text("precious")
    with pytest.raises(fq.CheckpointError, match="exists"):
        fq.export(tmp_path / "q", tmp_path / "m.gguf", "gguf")
    assert (tmp_path / "m.gguf").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "opt", "q"]


def test_gguf_refuses_what_it_cannot_hold(tmp_path, tokenizer):
    import transformers

    quantized("llama", tmp_path / "words", tokenizer=tokenizer)
    with pytest.raises(fq.ModelSourceError, match=r"\(WordLevel\) is no byte-level BPE"):
        fq.export(tmp_path / "words", tmp_path / "m.gguf", "gguf")
    model, data = make("llama")
    config = transformers.LlamaConfig(**{**model.config.to_dict(), "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}})  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    fq.quantize_(model, data, CHEAP)
    fq.save_pretrained(model, tmp_path / "scaled")
    with pytest.raises(fq.ModelSourceError, match="rotary embedding is scaled"):
        fq.export(tmp_path / "scaled", tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_wrong_graph_is_not_kept(tmp_path, monkeypatch, vit_checkpoint):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("framequant.integrations.export_onnx._difference", lambda *_: float("nan"))
    with pytest.raises(fq.NumericalError, match="nothing was written"):
        fq.export(vit_checkpoint, tmp_path / "m.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
