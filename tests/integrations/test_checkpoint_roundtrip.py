from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import framequant as fq
from framequant.checkpoint import CONFIG_NAME, INDEX_NAME, REPORT_NAME, WEIGHTS_NAME
from framequant.model.walk import quantized_linears
from tests.model.architectures import ARCHITECTURES, OwnModel, make, output

CONFIGS = {
    "scalar": fq.FrameQuantConfig(),
    "paper": fq.preset("framequant-paper"),
    "quip": fq.preset("quip"),
    "gptq-groups": fq.preset("gptq", group_size=16),
    "five levels": fq.FrameQuantConfig(levels=5, redundancy=1.0),
    "trellis": fq.FrameQuantConfig(code="trellis", bits=2.25, redundancy=1.125, state_bits=8),
    "two weights a state": fq.FrameQuantConfig(code="trellis", bits=2.25, state_bits=9, weights_per_state=2),
    "blocks": fq.FrameQuantConfig(output_hadamard_block=16),
    "lloyd": fq.FrameQuantConfig(grid="lloyd_max", bits=3),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reloaded_model_is_the_evaluated_one(name, tmp_path):
    model, data = make(name)
    fq.quantize_(model, data, fq.FrameQuantConfig())
    expected = output(model, data)
    fq.save_pretrained(model, tmp_path / "out")
    skeleton = OwnModel() if name == "own" else None
    loaded = fq.load(tmp_path / "out", model=skeleton)
    assert not loaded.training
    assert torch.equal(output(loaded, data), expected)
    assert loaded.framequant_report == model.framequant_report


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_and_dtype_survives(kind, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model, data = make("llama")
    model.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    fq.quantize_(model, data, CONFIGS[kind])
    fq.save_pretrained(model, tmp_path / "out")
    loaded = fq.load(tmp_path / "out")
    assert next(loaded.parameters()).dtype == dtype
    assert torch.equal(output(loaded, data), output(model, data))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "gpt2"])
def test_transformers_own_way(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, data = make(name)
    fq.quantize_(model, data, fq.FrameQuantConfig())
    fq.save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(quantized_linears(loaded)) == len(quantized_linears(model))
    assert torch.equal(output(loaded, data), output(model, data))
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, data), output(model, data))
    generated = loaded.generate(data[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == data.shape[1] + 4


def test_scales_keep_their_dtype_when_the_model_is_cast():
    model, data = make("llama")
    fq.quantize_(model, data, fq.FrameQuantConfig())
    layer = model.model.layers[0].mlp.up_proj
    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    model.to(torch.float16).to(torch.float32)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.tensors.items())
    assert all(before[name].dtype == tensor.dtype for name, tensor in layer.tensors.items())


def test_shards_and_files_are_the_same_for_the_same_seed(tmp_path):
    for folder in ("a", "b"):
        model, data = make("llama")
        fq.quantize_(model, data, fq.FrameQuantConfig())
        fq.save_pretrained(model, tmp_path / folder, max_shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert INDEX_NAME in files
    assert sum(name.endswith(".safetensors") for name in files) > 2
    for name in files:
        if name != REPORT_NAME:  # holds seconds
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    loaded = fq.load(tmp_path / "a")
    assert torch.equal(output(loaded, data), output(model, data))


def test_measured_bits_are_those_of_the_file(tmp_path):
    model, data = make("llama")
    report = fq.quantize_(model, data, fq.FrameQuantConfig())
    fq.save_pretrained(model, tmp_path / "out")
    linears = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["quantization_config"]["linears"]
    with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as file:
        for entry in report.linears:
            keys = [key for key in file.keys() if key.startswith(f"{entry.name}.")]  # noqa: SIM118
            stored = sum(file.get_tensor(key).nbytes for key in keys)
            described = len(json.dumps({entry.name: linears[entry.name]})) - 1
            measured = 8 * (stored + described) / entry.num_weights
            assert entry.bits_per_weight == pytest.approx(measured, abs=8 * 3 / entry.num_weights)


def test_a_directory_that_is_not_empty_is_kept(tmp_path):
    model, data = make("own")
    fq.quantize_(model, data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(fq.CheckpointError, match=r"not empty.*overwrite"):
        fq.save_pretrained(model, tmp_path / "out")
    with pytest.raises(fq.CheckpointError, match="not replaced"):
        fq.save_pretrained(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    fq.save_pretrained(model, tmp_path / "new")
    (tmp_path / "new" / "old.txt").write_text("of the old model")
    fq.save_pretrained(model, tmp_path / "new", overwrite=True)
    assert not (tmp_path / "new" / "old.txt").exists()


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_loading_in_a_fresh_process(name, tmp_path):
    model, data = make(name)
    fq.quantize_(model, data)
    fq.save_pretrained(model, tmp_path / "out")
    code = f"import framequant as fq; print(type(fq.load({str(tmp_path / 'out')!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == type(model).__name__


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_writing_fails(error, tmp_path, monkeypatch):
    model, data = make("own")
    fq.quantize_(model, data)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("framequant.checkpoint.save_file", fail)
    expected = fq.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        fq.save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_overwritten_checkpoint_survives_a_failure(tmp_path, monkeypatch):
    model, data = make("own")
    fq.quantize_(model, data)
    fq.save_pretrained(model, tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    monkeypatch.setattr(
        "framequant.checkpoint.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(fq.CheckpointError, match="full"):
        fq.save_pretrained(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_saving_a_float_model_is_an_error(tmp_path):
    with pytest.raises(fq.CheckpointError, match="no quantized linear"):
        fq.save_pretrained(OwnModel(), tmp_path / "out")


# --- Damaged checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "timm_vit"])
def checkpoint(request, tmp_path_factory):
    model, data = make(request.param)
    fq.quantize_(model, data)
    return fq.save_pretrained(model, tmp_path_factory.mktemp("good") / request.param)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def _edit_tensors(directory, edit):
    path = directory / WEIGHTS_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def _edit_config(directory, edit):
    path = directory / CONFIG_NAME
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def _first(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


def _truncate(directory):
    path = directory / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def _rename(directory):
    _edit_tensors(directory, lambda t: t.__setitem__("oops", t.pop(_first(t, "packed_codes"))))


def _reshape(directory):
    _edit_tensors(
        directory, lambda t: t.update({(k := _first(t, "packed_codes")): t[k][:, :-1].contiguous()})
    )


def _retype(directory):
    _edit_tensors(directory, lambda t: t.update({(k := _first(t, "scales")): t[k].half()}))


def _extra(directory):
    _edit_tensors(directory, lambda t: t.update({_first(t, "scales") + "_old": torch.zeros(1)}))


def _drop_norm(directory):
    _edit_tensors(directory, lambda t: t.pop(next(k for k in t if "norm" in k)))


def _newer(directory):
    _edit_config(directory, lambda c: c["quantization_config"].update(format_version=99))


def _bad_scheme(directory):
    _edit_config(
        directory, lambda c: c["quantization_config"]["schemes"][0]["frame_in"].update(num_subspaces=10**12)
    )


def _bad_linear(directory):
    def edit(config):
        linears = config["quantization_config"]["linears"]
        linears[next(iter(linears))] = [99, 0, 0]

    _edit_config(directory, edit)


def _unknown_linear(directory):
    def edit(config):
        linears = config["quantization_config"]["linears"]
        linears["no.such.linear"] = next(iter(linears.values()))

    _edit_config(directory, edit)


def _not_json(directory):
    (directory / CONFIG_NAME).write_text("{")


def _no_weights(directory):
    (directory / WEIGHTS_NAME).unlink()


def _escape(directory):
    (directory / WEIGHTS_NAME).rename(directory.parent / "outside.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))


DAMAGE = {
    _truncate: "truncated|damaged",
    _rename: "packed_codes is missing",
    _reshape: "packed_codes: expected",
    _retype: r"scales: expected (BF16|F32)",
    _extra: "scales_old",
    _drop_norm: "norm",
    _newer: "format_version is 99.*Upgrade",
    _bad_scheme: r"schemes\[0\].*num_subspaces",
    _bad_linear: "scheme 99 does not exist",
    _unknown_linear: r"no\.such\.linear",
    _not_json: "not valid JSON",
    _no_weights: WEIGHTS_NAME,
    _escape: "outside.safetensors",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_named(damage, damaged):
    damage(damaged)
    with pytest.raises(fq.CheckpointError, match=DAMAGE[damage]):
        fq.load(damaged)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(fq.CheckpointError, match="does not exist"):
        fq.load(tmp_path / "nothing")
