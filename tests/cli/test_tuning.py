"""``quantize --tune`` from the outside: what it prints, keeps, goes on from and refuses."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from framequant.integrations import hub
from tests.cli.test_cli import fails, run

ARGUMENTS = ["--samples", "12", "--sequence-length", "32", "--device", "cpu", "--set", "code=trellis",
             "--set", "frame=hadamard", "--set", "state_bits=8", "--redundancy", "1"]  # fmt: skip
TUNE = ["--tune", "8", "--tune-lr", "0.001", "--tune-batch", "4"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may wait for the hub."""
    monkeypatch.setattr(hub, "reachable", lambda: False)


def test_tuning_is_reported_and_counted(tmp_path, llama_directory, text_file):
    command = ["quantize", llama_directory, "--calibration", text_file, *ARGUMENTS, "--json"]
    plain = run(*command, "--out", tmp_path / "plain")
    tuned = run(*command, "--out", tmp_path / "tuned", *TUNE)
    assert tuned.exit_code == 0, tuned.stderr
    before, after = json.loads(plain.stdout), json.loads(tuned.stdout)
    assert "tuning" not in before
    assert after["tuning"]["loss_after"] < after["tuning"]["loss_before"]
    report = json.loads((tmp_path / "tuned" / "framequant_report.json").read_text())
    assert all(entry["bytes"]["row_factors"] == entry["out_features"] for entry in report["linears"])
    assert after["bits_per_weight"] <= after["budget_bits"] == before["budget_bits"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "tuned"]
    assert "| tuned |" in (tmp_path / "tuned" / "README.md").read_text()
    evaluated = run(
        "evaluate", tmp_path / "tuned", "--perplexity", text_file, "--sequence-length", 32, "--json"
    )
    assert evaluated.exit_code == 0, evaluated.stderr
    inspected = json.loads(run("inspect", tmp_path / "tuned", "--json").stdout)
    assert inspected["summary"]["bits_per_weight"] == pytest.approx(after["bits_per_weight"], rel=1e-3)


def test_vision_is_tuned_with_images(tmp_path, vit_directory, image_folder):
    out = tmp_path / "out"
    command = ["quantize", vit_directory, "--calibration", image_folder, "--samples", 12, *TUNE]
    result = run(*command, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    tuning = json.loads(result.stdout)["tuning"]
    assert (tuning["loss"], tuning["samples"], tuning["held_out"]) == ("kl", 10, 2)
    assert tuning["loss_after"] <= tuning["loss_before"]
    assert run("evaluate", out, "--imagenet", image_folder).exit_code == 0
    table = run(*command, "--out", tmp_path / "again").stdout
    assert "held-out" in table


def test_an_interrupted_run_goes_on(tmp_path, llama_directory, text_file, monkeypatch):
    import framequant as fq
    from framequant.model import walk

    command = ["quantize", llama_directory, "--calibration", text_file, *ARGUMENTS]
    tune = [*TUNE, "--tune-embeddings", 0.0001]
    whole = run(*command, "--out", tmp_path / "whole", *tune)
    assert whole.exit_code == 0, whole.stderr
    real = fq.tune_

    def interrupted(*args, progress, **kwargs):
        def stop(at):
            if at.done == 5:
                raise KeyboardInterrupt

        return real(*args, progress=stop, **kwargs)

    out, kept = tmp_path / "out", tmp_path / "out.tuning"
    monkeypatch.setattr(fq, "tune_", interrupted)
    assert run(*command, "--out", out, *tune).exit_code != 0
    assert not out.exists()
    assert sorted(path.name for path in kept.iterdir()) == ["settings.json", "state.safetensors", "untuned"]
    monkeypatch.setattr(fq, "tune_", real)
    fails("tune.learning_rate: 0.001 there, 0.02 now", *command, "--out", out, *tune, "--tune-lr", 0.02)
    fails("config.damping: 0.01 there, 0.5 now", *command, "--out", out, *tune, "--damping", 0.5)

    def no_walk(*_, **__):
        raise AssertionError("the walk was done before")

    monkeypatch.setattr(fq, "quantize_", no_walk)
    monkeypatch.setattr(walk, "quantize_", no_walk)
    result = run(*command, "--out", out, *tune)
    assert result.exit_code == 0, result.stderr
    assert "going on with" in result.stderr
    assert not kept.exists()
    left, right = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert left.keys() == right.keys()
    assert all(left[key].equal(right[key]) for key in left)


def test_bad_requests(tmp_path, llama_directory, text_file):
    command = ["quantize", llama_directory, "--out", tmp_path / "out", "--calibration", text_file, *ARGUMENTS]
    for option in ("--tune-lr", "--tune-embeddings"):
        fails("give --tune STEPS too", *command, option, 0.1)
        fails("give --tune STEPS too", *command, option, 0.1, "--stream")
    fails("tuning steps = 0", *command, "--tune", 0)
    fails(
        "the calibration is too short for this tuning: 4000 steps of 8 samples need", *command, "--tune", 4000
    )
    assert list(tmp_path.iterdir()) == []
