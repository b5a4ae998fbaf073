"""``framequant serve``: what it refuses, and a real client against a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

import framequant as fq
from framequant.cli.app import app
from framequant.integrations import serving
from tests.conftest import make_llama, make_text, make_tokenizer
from tests.model.architectures import make


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model = make_llama()
    ids = tokenizer(make_text(256), return_tensors="pt").input_ids.view(8, 32)
    fq.quantize_(model, ids, fq.preset("framequant-scalar"))
    return fq.save_pretrained(model, tmp_path_factory.mktemp("serve") / "tiny", tokenizer=tokenizer)


def test_only_language_models_with_a_tokenizer_are_served(directory, llama_directory, tmp_path):
    assert serving.check_directory(directory) == directory.resolve()
    with pytest.raises(fq.ModelSourceError, match="no framequant checkpoint"):
        serving.check_directory(llama_directory)
    model, data = make("hf_vit")
    fq.quantize_(model, data, fq.preset("rtn"))
    with pytest.raises(fq.ModelSourceError, match="ViTForImageClassification, no language model"):
        serving.check_directory(fq.save_pretrained(model, tmp_path / "vit"))
    model, data = make("llama")
    fq.quantize_(model, data, fq.preset("rtn"))
    with pytest.raises(fq.ModelSourceError, match="has no tokenizer"):
        serving.check_directory(fq.save_pretrained(model, tmp_path / "bare"))


def test_missing_packages_are_named_with_the_command(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve", str(directory)])
    assert result.exit_code == 2
    assert "framequant[serve]" in result.output.replace("\n", "")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _wait(process: subprocess.Popen, url: str, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not answer in time")


def test_a_real_client_talks_to_the_server(directory, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: {serving.INSTALL}")
    from openai import OpenAI

    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "framequant",
        "serve",
        str(directory),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    log = (tmp_path / "log").open("w+")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "no-cache")}  # a fresh machine has none
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait(process, f"http://localhost:{port}/health", 240, tmp_path / "log")
        client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=120, max_retries=0)
        assert [model.id for model in client.models.list()] == [str(directory)]
        prompt = "the old tiger walks"
        answer = client.completions.create(model=str(directory), prompt=prompt, max_tokens=5, temperature=0)
        expected = fq.load(directory).generate(
            make_tokenizer()(prompt, return_tensors="pt").input_ids, max_new_tokens=5, do_sample=False
        )[0, 4:]
        assert answer.choices[0].text.split() == make_tokenizer().decode(expected).split()
        messages = [{"role": "user", "content": prompt}]
        chat = client.chat.completions.create(
            model=str(directory), messages=messages, max_tokens=4, stream=True
        )
        streamed = [piece.choices[0].delta.content or "" for piece in chat if piece.choices]
        assert "".join(streamed).split()
    finally:
        process.kill()
        process.wait(timeout=60)
        log.close()
