"""Disks that are full or read-only, shards that are damaged, runs that differ: a clear message, and nothing lost."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import framequant as fq
from framequant.errors import CheckpointError, ConfigError, ModelSourceError
from framequant.streaming import durable, journal
from tests.faults.kill_and_resume import contents
from tests.streaming.models import IDS, save_llama

CONFIG = fq.preset("framequant-scalar")


class StoppedError(Exception):
    """Ends a run in the middle, as a crash would."""


def interrupted(source, out, blocks=2, **changes):
    """Run until some blocks are done."""

    def stop(progress):
        done = list((out.with_name("out.partial") / "blocks").glob("*.json"))
        if len(done) >= blocks:
            raise StoppedError

    with pytest.raises(StoppedError):
        fq.quantize_streaming(source, out, IDS, CONFIG, progress=stop, **changes)


@pytest.fixture
def source(tmp_path):
    return save_llama(tmp_path / "model", layers=4)


@pytest.fixture
def expected(tmp_path, source):
    fq.quantize_streaming(source, tmp_path / "reference", IDS, CONFIG)
    return contents(tmp_path / "reference")


def test_an_interrupted_run_goes_on(tmp_path, source, expected):
    interrupted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run = fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    assert run.resumed == 2
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": fq.preset("framequant-scalar", redundancy=1.25)},
            r"config\.redundancy was 1\.125 and is 1\.25",
        ),
        ({"calibration": IDS + 1}, r"calibration\.sha256 was"),
        ({"dtype": torch.bfloat16}, r"model\.dtype was .*float32.* and is .*bfloat16"),
        ({"source": None}, r"model\.tensors was"),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, source, change, message):
    interrupted(source, tmp_path / "out")
    kept = sorted(p.name for p in (tmp_path / "out.partial" / "output").iterdir())
    given = {"source": source, "directory": tmp_path / "out", "calibration": IDS, "config": CONFIG} | change
    given["source"] = given["source"] or save_llama(tmp_path / "other", layers=4, seed=1)
    with pytest.raises(ConfigError, match=message):
        fq.quantize_streaming(**given)
    assert sorted(p.name for p in (tmp_path / "out.partial" / "output").iterdir()) == kept


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "left over"])
def test_a_damaged_shard_is_made_again(tmp_path, source, expected, damage):
    interrupted(source, tmp_path / "out", blocks=3)
    shard = tmp_path / "out.partial" / "output" / "model-00002-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    if damage == "truncated":
        data = data[: len(data) // 2]
    shard.write_bytes(bytes(data))
    if damage == "deleted":
        shard.unlink()
    if damage == "left over":
        shard.with_name(shard.name + ".tmp").write_bytes(b"half a shard")
    run = fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    assert run.resumed == (3 if damage == "left over" else 2)
    assert any("model.layers.1 is damaged" in note for note in run.notes) == (damage != "left over")
    assert contents(tmp_path / "out") == expected


def test_a_damaged_file_of_the_float_model_is_named(tmp_path, source, expected):
    interrupted(source, tmp_path / "out")
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelSourceError, match=r"model\.safetensors is truncated or damaged"):
        fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    file.write_bytes(data)
    assert fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG).resumed == 2
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("moment", ["save_file", "flush", "replace"])
def test_a_full_disk_loses_nothing(tmp_path, source, expected, monkeypatch, moment):
    interrupted(source, tmp_path / "out")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"save_file": journal, "flush": durable, "replace": os}[moment], moment, full)
        with pytest.raises(CheckpointError, match=r"the disk is full.*run the same command to go on"):
            fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    run = fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    assert run.resumed == 2
    assert contents(tmp_path / "out") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 320 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, source, expected):
    (small_disk / "other").write_bytes(bytes(265_000))
    out = small_disk / "out"
    with pytest.raises(CheckpointError, match="the disk is full"):
        fq.quantize_streaming(source, out, IDS, CONFIG)
    kept = len(list((small_disk / "out.partial" / "blocks").glob("*.json")))
    assert 0 < kept < 4
    (small_disk / "other").unlink()
    run = fq.quantize_streaming(source, out, IDS, CONFIG)
    assert run.resumed == kept
    assert contents(out) == expected


def test_a_read_only_output(tmp_path, source, expected):
    folder = tmp_path / "fixed"
    folder.mkdir()
    bound = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip("a read-only file system can only be mounted by root")
    try:
        interrupted(source, folder / "out")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        with pytest.raises(CheckpointError, match=r"Read-only file system.*run the same command to go on"):
            fq.quantize_streaming(source, folder / "out", IDS, CONFIG)
        with pytest.raises(CheckpointError, match=r"not writable|Read-only"):
            fq.quantize_streaming(source, folder / "another", IDS, CONFIG)
        subprocess.run(["mount", "-o", "remount,rw,bind", str(folder)], check=True)
        assert fq.quantize_streaming(source, folder / "out", IDS, CONFIG).resumed == 2
        assert contents(folder / "out") == expected
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_an_output_that_is_there_is_not_touched(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        fq.quantize_streaming(source, out, IDS, CONFIG)
    with pytest.raises(CheckpointError, match="holds no model"):
        fq.quantize_streaming(source, out, IDS, CONFIG, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_overwriting_replaces_at_the_end(tmp_path, source, expected):
    fq.quantize_streaming(source, tmp_path / "out", IDS, fq.preset("framequant-paper"))
    before = contents(tmp_path / "out")
    interrupted(source, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG, overwrite=True)
    assert contents(tmp_path / "out") == expected


def test_a_run_killed_after_its_last_step_is_recognised(tmp_path, source, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", lambda self: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    assert (tmp_path / "out.partial").exists()
    run = fq.quantize_streaming(source, tmp_path / "out", IDS, CONFIG)
    assert "finished" in run.notes[0]
    assert not (tmp_path / "out.partial").exists()
    assert contents(tmp_path / "out") == expected


def test_two_runs_of_one_output(tmp_path, source):
    out = tmp_path / "out"

    def again(_):
        with pytest.raises(CheckpointError, match="another run is writing"):
            fq.quantize_streaming(source, out, IDS, CONFIG)
        raise StoppedError

    with pytest.raises(StoppedError):
        fq.quantize_streaming(source, out, IDS, CONFIG, progress=again)


def test_gradients_are_not_computed_again(tmp_path, source, monkeypatch):
    from framequant.streaming.gradients import StreamedPass

    config = fq.preset("framequant", state_bits=8)
    fq.quantize_streaming(source, tmp_path / "reference", IDS, config)

    def stop(progress):
        if progress.done:
            raise StoppedError

    with pytest.raises(StoppedError):
        fq.quantize_streaming(source, tmp_path / "out", IDS, config, progress=stop)
    monkeypatch.setattr(StreamedPass, "run", lambda *_, **__: pytest.fail("computed again"))
    fq.quantize_streaming(source, tmp_path / "out", IDS, config)
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_the_journal_holds_what_it_says(tmp_path, source):
    interrupted(source, tmp_path / "out")
    folder = tmp_path / "out.partial"
    record = json.loads((folder / "blocks" / "00001.json").read_text())
    assert record["sha256"] == journal.sha256(Path(folder / "output" / record["shard"]))
    assert all(key.startswith("model.layers.1.") for key in record["keys"])
    assert len(record["linears"]) == 7


def test_a_run_killed_while_it_removes_its_journal_has_finished(tmp_path, source, expected, monkeypatch):
    """Whatever file was the last to go, the output is there, and the same command does not stumble over the rest."""
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", lambda self: None)
        fq.quantize_streaming(source, tmp_path / "kept" / "out", IDS, CONFIG)
    for count in range(100):
        folder = tmp_path / f"after-{count}"
        shutil.copytree(tmp_path / "kept", folder)
        left = [count]
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace"):
                patch.setattr(os, name, killed_after(left, getattr(os, name)))
            with suppress(StoppedError):
                fq.quantize_streaming(source, folder / "out", IDS, CONFIG)
        if (folder / "out.partial").exists():
            fq.quantize_streaming(source, folder / "out", IDS, CONFIG)
            assert not list(folder.glob("out.partial*"))
        assert contents(folder / "out") == expected
        if left[0] > 0:
            break
    assert count > 5


def killed_after(left, original):
    """A function of ``os`` that ends the run once so many calls were made of it and of those that share ``left``."""

    def call(*arguments, **keywords):
        if left[0] == 0:
            raise StoppedError
        left[0] -= 1
        return original(*arguments, **keywords)

    return call
