"""``framequant quantize --stream``: when it streams, what it prints, what it refuses."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from framequant.cli.app import app
from framequant.cli.streaming import choose_streaming, float_bytes
from framequant.config import preset
from framequant.errors import ConfigError
from tests.streaming.models import same_tensors

SMALL = ["--samples", "4", "--sequence-length", "32", "--device", "cpu", "--preset", "framequant-scalar"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(message, *arguments):
    result = run(*arguments)
    error = " ".join(result.stderr.split())
    assert result.exit_code == 2, (result.exit_code, error, result.exception)
    assert message in error


def test_the_same_checkpoint_as_in_memory(tmp_path, llama_directory, text_file):
    given = [llama_directory, "--calibration", text_file, *SMALL]
    memory = run("quantize", *given, "--generated", "0", "--out", tmp_path / "memory")
    assert memory.exit_code == 0, memory.stderr
    stream = run("quantize", *given, "--out", tmp_path / "stream", "--stream", "--json")
    assert stream.exit_code == 0, stream.stderr
    assert json.loads(stream.stdout)["quantized_linears"] == 14
    same_tensors(tmp_path / "memory", tmp_path / "stream")
    names = {path.name for path in (tmp_path / "stream").iterdir()}
    assert {"tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
    again = run("quantize", *given, "--out", tmp_path / "stream", "--stream")
    assert "not empty" in " ".join(again.stderr.split())


def test_a_model_that_does_not_fit_is_streamed_by_itself(tmp_path, llama_directory, text_file):
    given = [llama_directory, "--calibration", text_file, *SMALL]
    result = run("quantize", *given, "--out", tmp_path / "out", "--max-memory", "1MB")
    assert result.exit_code == 0, result.stderr
    assert "streaming from" in result.stderr
    assert "do not fit" in result.stderr


def test_when_to_stream(llama_directory, monkeypatch):
    config, name = preset("framequant"), str(llama_directory)
    assert choose_streaming(name, None, None, "auto", "cpu", config) is None
    assert choose_streaming(name, False, "1MB", "auto", "cpu", config) is None
    assert choose_streaming(name, True, None, "auto", "cpu", config).reason == "--stream"
    assert choose_streaming("timm/no_such_model", None, "1MB", "auto", "cpu", config) is None
    assert choose_streaming(name, None, "1MB", "auto", "cpu", preset("sigma-delta")) is None
    assert float_bytes(llama_directory, "bfloat16") * 2 == float_bytes(llama_directory, "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_streaming(name, None, None, "auto", "cpu", config).reason == "2 processes"
    with pytest.raises(ConfigError, match="--no-stream with 2 processes"):
        choose_streaming(name, False, None, "auto", "cpu", config)


def test_what_is_refused(tmp_path, llama_directory):
    out = ["--out", tmp_path / "out"]
    fails("is no size", "quantize", llama_directory, *out, "--max-memory", "much")
    fails("--tune needs the whole model", "quantize", llama_directory, *out, "--stream", "--tune", 5)
    fails(
        "--generated and --continued need the whole model",
        "quantize",
        llama_directory,
        *out,
        "--stream",
        "--generated",
        0.5,
    )
    fails("cannot be streamed", "quantize", "timm/deit_tiny_patch16_224", *out, "--stream")
    fails("Sigma-Delta", "quantize", llama_directory, *out, "--stream", "--preset", "sigma-delta")
    fails(
        "is the model itself",
        "quantize",
        llama_directory,
        "--out",
        llama_directory,
        "--stream",
        "--overwrite",
    )


@pytest.mark.slow
def test_torchrun(tmp_path, llama_directory, text_file):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "framequant",
        "quantize",
    ]
    given = [str(llama_directory), "--calibration", str(text_file), *SMALL]
    result = subprocess.run(
        [*command, *given, "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["quantized_linears"] == 14
    assert not (tmp_path / "out.partial").exists()
