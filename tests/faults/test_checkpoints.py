"""Damaged and hostile checkpoints: refused by name, never a crash; see ``fuzz_checkpoints`` for many thousands."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import framequant as fq
from framequant import checkpoint, integrity
from framequant.untrusted import check_config
from tests.faults import fuzz_checkpoints
from tests.faults.checkpoints import make_checkpoint
from tests.faults.mutations import CHECKSUMS, CONFIG, INDEX, MUTATIONS

SOURCE = Path(fq.__file__).parent


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    place = tmp_path_factory.mktemp("good")
    return {kind: make_checkpoint(kind, place / kind) for kind in fuzz_checkpoints.SHARES}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**9))
@pytest.mark.filterwarnings("ignore")  # of the libraries, about what the damaged configs say
def test_damage_is_refused_or_harmless(goods, tmp_path, seed):
    _, outcome, note = fuzz_checkpoints.attempt(goods[fuzz_checkpoints.kind_of(seed)], tmp_path, seed)
    assert outcome != "failed", note


def test_every_mutation_is_drawn():
    from random import Random

    drawn = {Random(f"mutation {seed}").choice(sorted(MUTATIONS)) for seed in range(500)}
    assert drawn == set(MUTATIONS)


def _copy(good, tmp_path):
    return shutil.copytree(good.directory, tmp_path / "copy")


def _edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", ["own", "timm", "llama", "shards"])
def test_a_flipped_bit_of_any_tensor_is_named(goods, tmp_path, kind):
    directory = _copy(goods[kind], tmp_path)
    for path in sorted(directory.glob("*.safetensors")):
        original = path.read_bytes()
        length = int.from_bytes(original[:8], "little")
        header = json.loads(original[8 : 8 + length])
        for key, entry in header.items():
            if key == "__metadata__" or entry["data_offsets"][0] == entry["data_offsets"][1]:
                continue
            data = bytearray(original)
            data[8 + length + entry["data_offsets"][0]] ^= 1
            path.write_bytes(data)
            with pytest.raises(fq.CheckpointError, match=rf"^{re.escape(key)} is not what was written"):
                goods[kind].load(directory)
        path.write_bytes(original)
    assert goods[kind].is_same(goods[kind].load(directory))


def test_a_dtype_of_the_same_width_is_noticed(goods, tmp_path):
    directory = _copy(goods["llama"], tmp_path)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    assert b'"F32"' in data
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(fq.CheckpointError, match="is not what was written"):
        fq.load(directory)
    with pytest.raises(
        fq.CheckpointError, match=r"the model holds torch.float32, the checkpoint I32|expected F32"
    ):
        fq.load(directory, verify=False)


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_verifying_is_optional(goods, tmp_path, way, monkeypatch):
    directory = _copy(goods["llama"], tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if way == "variable":
        monkeypatch.setenv(integrity.VERIFY_VARIABLE, "0")
    loaded = fq.load(directory, **({"verify": False} if way == "argument" else {}))
    assert not goods["llama"].is_same(loaded)
    with pytest.raises(fq.CheckpointError, match=r"model\.norm\.weight"):
        fq.load(directory, verify=True)


def test_transformers_own_way_verifies_too(goods, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = _copy(goods["llama"], tmp_path)
    _edit(directory / CONFIG, lambda data: data.update(rms_norm_eps=0.5))
    with pytest.raises(fq.CheckpointError, match=r"config.json: rms_norm_eps is not what was written"):
        AutoModelForCausalLM.from_pretrained(directory)
    (directory / CHECKSUMS).unlink()
    shutil.copy(goods["llama"].directory / CONFIG, directory / CONFIG)
    assert goods["llama"].is_same(AutoModelForCausalLM.from_pretrained(directory))


def test_no_path_leaves_the_directory(goods, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = _copy(goods["shards"], tmp_path)
    outside = tmp_path / "outside.safetensors"
    first = sorted(directory.glob("*.safetensors"))[0]
    first.rename(outside)

    def redirect(data):
        data["weight_map"] = {
            key: "../outside.safetensors" if name == first.name else name
            for key, name in data["weight_map"].items()
        }

    _edit(directory / INDEX, redirect)
    with pytest.raises(fq.CheckpointError, match=r"outside\.safetensors"):
        fq.load(directory)
    with pytest.raises(fq.CheckpointError, match=r"outside\.safetensors lies outside"):
        AutoModelForCausalLM.from_pretrained(directory)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(goods, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = _copy(goods["llama"], tmp_path)
    (directory / "model.safetensors").unlink()
    torch.save(load_file(goods["llama"].directory / "model.safetensors"), directory / "pytorch_model.bin")
    for name in ("pytorch_model.bin", "model.safetensors"):
        with pytest.raises(fq.CheckpointError, match="safetensors"):
            fq.load(directory)
        with pytest.raises((fq.CheckpointError, OSError)):
            AutoModelForCausalLM.from_pretrained(directory)
        (directory / name).write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


def test_the_source_reads_no_pickle_and_runs_no_code():
    readers = r"\b(pickle|torch\.load|joblib|marshal|shelve|dill)\b|np\.load\("
    forbidden = readers + r"|(?<![.\w])(eval|exec)\(|trust_remote_code=True"
    hits = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(forbidden, line) and '"""' not in line and not line.lstrip().startswith("#")
    ]
    assert not [hit for hit in hits if "No pickle" not in hit], hits


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", 10**9, "only .* tensors"),
        ("num_labels", 10**9, "so many rows"),
        ("head_dim", 10**8, "no number of a model"),
        ("hidden_size", -48, "never negative"),
        ("_attn_implementation", "someone/kernel", "code of another repository"),
    ],
)
def test_numbers_that_would_take_memory_are_refused_before_anything_is_built(
    goods, tmp_path, key, value, match
):
    directory = _copy(goods["llama"], tmp_path)
    (directory / CHECKSUMS).unlink()
    _edit(directory / CONFIG, lambda data: data.update({key: value}))
    header = checkpoint.read_header(checkpoint.weight_files(directory))
    with pytest.raises(fq.CheckpointError, match=match) as caught:
        check_config(checkpoint.read_json(directory / CONFIG), header)
    assert key in str(caught.value)
    with pytest.raises(fq.CheckpointError, match=match):
        fq.load(directory)


@pytest.mark.parametrize(
    ("key", "value"), [("embed_dim", 10**6), ("depth", 10**6), ("checkpoint_path", "/etc/passwd")]
)
def test_timm_arguments_are_checked_before_memory_is_asked_for(goods, tmp_path, key, value):
    directory = _copy(goods["timm"], tmp_path)
    (directory / CHECKSUMS).unlink()
    _edit(directory / CONFIG, lambda data: data.setdefault("model_args", {}).update({key: value}))
    with pytest.raises(fq.CheckpointError, match=r"config\.json|shape"):
        fq.load(directory)


def test_scales_that_are_not_finite_are_named(goods, tmp_path):
    directory = _copy(goods["own"], tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("scales"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(fq.CheckpointError, match=rf"{re.escape(key)} holds NaN"):
        fq.load(directory, model=make_own(), verify=False)


def make_own():
    from tests.faults.checkpoints import TiedModel

    return TiedModel()


@pytest.mark.parametrize("name", ["tile_rows", "tile_cols", "output_block", "state_bits", "group_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_divide_by_zero_are_refused(goods, tmp_path, name, value):
    directory = _copy(goods["llama"], tmp_path)
    (directory / CHECKSUMS).unlink()  # seed 11097 of the fuzzer
    _edit(directory / CONFIG, lambda data: data["quantization_config"]["config"].update({name: value}))
    with pytest.raises(fq.CheckpointError, match=name):
        fq.load(directory)


def test_an_alias_cannot_hide_a_tensor(goods, tmp_path):
    directory = _copy(goods["own"], tmp_path)
    (directory / CHECKSUMS).unlink()

    def hide(data):
        data["quantization_config"]["aliases"]["embed.bias"] = "head.bias"

    _edit(directory / CONFIG, hide)
    with pytest.raises(fq.CheckpointError, match=r"embed\.bias is in the checkpoint itself"):
        fq.load(directory, model=make_own())


def test_checkpoints_without_checksums_load(goods, tmp_path):
    directory = _copy(goods["mixtral"], tmp_path)
    (directory / CHECKSUMS).unlink()
    assert goods["mixtral"].is_same(fq.load(directory))
