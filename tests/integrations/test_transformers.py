"""What users of transformers do with a checkpoint of ours, each on a tiny random model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import framequant as fq
from framequant.codes import grid
from framequant.integrations import hub
from framequant.integrations.transformers import FrameQuantHfQuantizer
from framequant.model.walk import quantized_linears
from tests.conftest import make_llama, make_text, make_tokenizer
from tests.model.architectures import make, make_family, output


@pytest.fixture(scope="module")
def quantized():
    tokenizer = make_tokenizer()
    ids = tokenizer(make_text(256), return_tensors="pt").input_ids.view(8, 32)
    model = make_llama()
    fq.quantize_(model, ids, fq.preset("framequant-scalar"))
    return model, ids


@pytest.fixture(scope="module")
def directory(quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    return fq.save_pretrained(quantized[0], folder, tokenizer=make_tokenizer(), source="owner/tiny")


def split_map(last):
    return {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"} | {
        "model.layers.0": "cpu",
        "model.layers.1": last,
    }


# --- Loading ----------------------------------------------------------------------------------------------


def test_device_map_auto(quantized, directory):
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map="auto")
    if loaded.device.type == "cpu":
        assert torch.equal(output(loaded, quantized[1]), output(*quantized))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert loaded.framequant_report == quantized[0].framequant_report


def test_a_process_that_has_computed_nothing_yet_loads_too(quantized, directory):
    grid._uniform_step.cache_clear()  # as in a fresh process; transformers parses our config on the meta device
    assert torch.equal(
        output(AutoModelForCausalLM.from_pretrained(directory), quantized[1]), output(*quantized)
    )


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offload_to_disk(buffers, quantized, directory, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=split_map("disk"), offload_folder=tmp_path / "disk", offload_buffers=buffers
    )
    codes = loaded.model.layers[1].mlp.up_proj.packed_codes
    assert codes.is_meta == buffers, "codes are buffers: they leave memory with offload_buffers=True"
    assert loaded.model.layers[1].input_layernorm.weight.is_meta
    assert torch.equal(output(loaded, quantized[1]), output(*quantized))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, quantized[1]), output(*quantized))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype_is_that_of_the_rest_and_never_of_the_scales(dtype, quantized, directory):
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32 if dtype == "auto" else dtype}
    for name, layer in quantized_linears(loaded).items():
        for part, tensor in layer.tensors.items():
            assert torch.equal(tensor, quantized[0].get_submodule(name).tensors[part])
    assert torch.isfinite(output(loaded, quantized[1])).all()


def test_a_model_without_its_head_and_back(quantized, directory, tmp_path):
    body = AutoModel.from_pretrained(directory)
    assert len(quantized_linears(body)) == len(quantized_linears(quantized[0]))
    with torch.no_grad():
        hidden = body(quantized[1]).last_hidden_state
        assert torch.equal(hidden, quantized[0].model(quantized[1]).last_hidden_state)
    fq.save_pretrained(body, tmp_path / "body")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(headed.model(quantized[1]).last_hidden_state, hidden)


def test_accelerate_dispatch(quantized, directory, tmp_path):
    from accelerate import disk_offload

    loaded = fq.load(directory)
    disk_offload(loaded, tmp_path / "disk", execution_device=torch.device("cpu"), offload_buffers=True)
    assert loaded.model.layers[0].mlp.up_proj.packed_codes.is_meta
    assert torch.equal(output(loaded, quantized[1]), output(*quantized))


def test_dequantize_gives_a_float_model_that_saves(quantized, directory, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    loaded.dequantize()
    assert not quantized_linears(loaded)
    assert torch.allclose(output(loaded, quantized[1]), output(*quantized), atol=1e-4)
    loaded.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(output(again, quantized[1]), output(loaded, quantized[1]))


# --- Never silent float weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["framequant", "transformers"])
def test_without_framequant_loading_is_an_error(writer, directory, tmp_path, monkeypatch):
    if writer == "transformers":
        AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "again")
        directory = tmp_path / "again"
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        guards = [key for key in file.keys() if key.endswith("proj.weight")]  # noqa: SIM118
        assert [file.get_tensor(key).nbytes for key in guards] == [0]
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "framequant")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "framequant")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_linear_of_another_model_is_an_error(directory, tmp_path):
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = 1
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": None}))
    with pytest.raises(fq.CheckpointError, match=r"layers\.1.*no such linear"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.0", "6.0.0"])
def test_other_versions_of_transformers_are_refused(version, directory, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(fq.ConfigError, match=rf"transformers {version} is not supported.*>=5\.17,<6"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_supported_range_is_that_of_the_package():
    import tomllib

    from framequant.integrations.transformers import MAXIMUM_MAJOR, MINIMUM_VERSION
    from tests.conftest import ROOT

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    low, high = ".".join(map(str, MINIMUM_VERSION)), MAXIMUM_MAJOR + 1
    assert f"transformers>={low},<{high}" in dependencies


# --- Without data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_directory(tmp_path_factory):
    model, data = make("llama")
    folder = tmp_path_factory.mktemp("float") / "llama"
    model.save_pretrained(folder)
    return folder, data, output(model, data)


@pytest.mark.parametrize(
    ("preset", "fallback"),
    [
        ("framequant", "allocation = sensitivity became uniform"),
        ("framequant-scalar", "float_targets = 0.5 became 0.0"),
        ("rtn", "identity Hessians.$"),
    ],
)
def test_a_float_model_is_quantized_without_data(preset, fallback, float_directory, tmp_path):
    folder, data, before = float_directory
    with pytest.warns(UserWarning, match=f"without calibration data.*{fallback}"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=fq.preset(preset, bits=4, state_bits=8), device_map="cpu"
        )
    assert len(quantized_linears(model)) == 14
    seeds = {
        name.rpartition(".")[2]: layer.spec.frame_in.seed for name, layer in quantized_linears(model).items()
    }
    assert seeds["q_proj"] == seeds["k_proj"] == seeds["v_proj"], "a probe shows which linears share an input"
    assert model.framequant_report.linears[0].tokens == 0
    after = output(model, data)
    assert 0 < (after - before).norm() < 0.5 * (before - before.mean()).norm()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), data), after)
    fq.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(output(fq.load(tmp_path / "ours"), data), after)


@pytest.mark.parametrize("name", ["swin", "whisper", "qwen3_moe", "clip", "t5"])
def test_without_data_models_of_every_kind(name):
    from framequant.integrations.transformers import probe_inputs
    from framequant.model.without_data import quantize_without_data_

    model, data = make_family(name)
    every = fq.quantize_(make_family(name)[0], data, fq.preset("rtn", bits=4))
    with pytest.warns(UserWarning, match="without calibration data"):
        report = quantize_without_data_(model, fq.preset("rtn", bits=4), probe_inputs(model))
    assert {entry.name for entry in report.linears} == {entry.name for entry in every.linears}
    assert torch.isfinite(output(model, data)).all()


def test_a_float_model_over_several_devices_is_not_quantized(float_directory, tmp_path):
    with pytest.raises(fq.ConfigError, match="quantized on one device"):
        AutoModelForCausalLM.from_pretrained(
            float_directory[0],
            quantization_config=fq.preset("rtn"),
            device_map=split_map("disk"),
            offload_folder=tmp_path,
        )
    with pytest.raises(fq.ConfigError, match=r"FrameQuantConfig\(…\), not with dict"):
        FrameQuantHfQuantizer({}, pre_quantized=False)


# --- Using ------------------------------------------------------------------------------------------------


def test_pipeline_and_generate(quantized, directory):
    from transformers import pipeline

    text = "the old tiger walks"
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    ids = make_tokenizer()(text, return_tensors="pt").input_ids
    expected = quantized[0].generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), expected)
    generator = pipeline("text-generation", model=str(directory), device="cpu")
    assert type(generator.model.model.layers[0].mlp.up_proj) is fq.FrameLinear
    generated = generator(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert (
        generated.removeprefix(text).split() == make_tokenizer().decode(expected[0, ids.shape[1] :]).split()
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # pin_memory without a GPU
def test_trainer_evaluates(quantized, directory, tmp_path):
    from transformers import Trainer, TrainingArguments

    loaded = AutoModelForCausalLM.from_pretrained(directory)
    data = [{"input_ids": ids, "labels": ids} for ids in quantized[1]]
    arguments = TrainingArguments(tmp_path, report_to="none", per_device_eval_batch_size=8, use_cpu=True)
    loss = Trainer(loaded, arguments, eval_dataset=data).evaluate()["eval_loss"]
    with torch.no_grad():
        expected = quantized[0](input_ids=quantized[1], labels=quantized[1]).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


# --- The hub ----------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_checkpoint_with_its_card(quantized, monkeypatch):
    import huggingface_hub

    seen = {}

    def create(self, repo_id, **options):
        seen["created"] = (repo_id, options["private"])
        return SimpleNamespace(repo_id=repo_id)

    def upload(self, *, repo_id, folder_path, **options):
        seen["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", pr_url=None)

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    address = fq.push_to_hub(
        quantized[0], "me/tiny-2bit", source="owner/tiny", tokenizer=make_tokenizer(), private=True
    )
    assert address == "https://hub/me/tiny-2bit/commit/1"
    assert seen["created"] == ("me/tiny-2bit", True)
    assert {"config.json", "model.safetensors", "framequant_report.json", "tokenizer.json"} <= set(
        seen["files"]
    )
    card = seen["files"]["README.md"].decode()
    assert "base_model: owner/tiny" in card
    assert 'LlamaForCausalLM.from_pretrained("me/tiny-2bit")' in card
    assert f"{quantized[0].framequant_report.bits_per_weight:.3f}" in card


def test_push_to_an_unreachable_hub_says_so(quantized, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(fq.ModelSourceError, match="cannot be reached, so nothing was uploaded"):
        fq.push_to_hub(quantized[0], "me/tiny-2bit")
