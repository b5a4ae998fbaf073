import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from framequant.cli.app import app
from framequant.integrations import hub
from tests.conftest import make_image, make_tokenizer
from tests.evaluation.test_sentences import make_encoder, table

COMMANDS = ("quantize", "evaluate", "inspect", "generate", "bench", "demo")
SMALL = ["--samples", "4", "--sequence-length", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may wait for the hub."""
    monkeypatch.setattr(hub, "reachable", lambda: False)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(message, *arguments):
    """Run a command that must fail with exit code 2 and this message."""
    result = run(*arguments)
    error = " ".join(result.stderr.split())
    assert result.exit_code == 2, (result.exit_code, error, result.exception)
    assert message in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama_directory, text_file):
    """A quantized tiny Llama and the JSON that the command printed."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    result = run("quantize", llama_directory, "--out", out, "--calibration", text_file, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"framequant {command}" in result.stdout
    assert "--json" in result.stdout


def test_quantize_reports_and_saves(quantized):
    out, data = quantized
    assert data["quantized_linears"] == 14
    assert data["bytes"]["linears_quantized"] < data["bytes"]["linears_float16"]
    assert data["calibration"] == "4 windows of 32 tokens (128 tokens)"
    assert (out / "framequant_report.json").is_file()
    assert (out / "tokenizer.json").is_file()


def test_quantize_prints_a_table(tmp_path, llama_directory, text_file):
    out = tmp_path / "out"
    result = run(
        "quantize",
        llama_directory,
        "--out",
        out,
        "--calibration",
        text_file,
        *SMALL,
        "--preset",
        "gptq",
        "--bits",
        3,
    )
    assert result.exit_code == 0, result.stderr
    for words in ("bits per weight", "true redundancy", "16 bits", "relative loss", "framequant evaluate"):
        assert words in result.stdout
    assert "quantizing" in result.stderr


def test_evaluate_inspect_generate(quantized, llama_directory, text_file):
    out, data = quantized
    result = run(
        "evaluate", out, "--perplexity", text_file, "--sequence-length", 32, "--limit", 5,
        "--kl-to", llama_directory, text_file, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["perplexity"]["tokens"], values["perplexity"]["windows"]) == (5 * 31, 5)
    assert values["kl"]["kl"] > 0
    assert values["kl"]["positions"] == 5 * 32

    result = run("inspect", out, "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert len(values["linears"]) == 14
    assert values["summary"]["bits_per_weight"] == pytest.approx(data["bits_per_weight"], rel=1e-3)
    assert values["linears"][0]["proxy_loss"] > 0

    result = run("generate", out, "the old tiger", "--max-new-tokens", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("the old tiger")


def test_tables_name_what_was_measured(quantized, text_file):
    out, _ = quantized
    result = run("evaluate", out, "--perplexity", text_file, "--sequence-length", 32, "--limit", 2)
    assert "62 predicted tokens in 2 windows of 32" in " ".join(result.stdout.replace("│", " ").split())
    result = run("inspect", out)
    assert "measured from the files" in result.stdout


def test_vision_end_to_end(tmp_path, vit_directory, image_folder):
    out = tmp_path / "out"
    result = run(
        "quantize", vit_directory, "--out", out, "--calibration", image_folder, "--samples", 8, "--json"
    )
    assert result.exit_code == 0, result.stderr
    result = run(
        "evaluate", out, "--imagenet", image_folder, "--kl-to", vit_directory, image_folder, "--json"
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["imagenet"]["images"] == 12
    assert values["kl"]["positions"] == 12


def test_encoder_end_to_end(tmp_path):
    encoder, pairs, out = tmp_path / "encoder", table(tmp_path / "pairs.csv"), tmp_path / "out"
    make_encoder().save_pretrained(encoder)
    make_tokenizer().save_pretrained(encoder)
    result = run("quantize", encoder, "--out", out, "--calibration", pairs, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["calibration"].startswith("24 sentences (")
    result = run("evaluate", out, "--sts", pairs, "--limit", 10, "--json")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)["sts"]
    assert values["pairs"] == 10
    assert -1 <= values["spearman"] <= 1
    assert "Spearman" in run("evaluate", out, "--sts", pairs).stdout
    fails("24 sentences, 99 are asked for", "quantize", encoder, "--out", tmp_path / "b", "--calibration", pairs,
          "--samples", 99)  # fmt: skip


def test_sentence_tables_are_no_images(tmp_path, vit_directory, llama_directory):
    pairs = table(tmp_path / "pairs.csv")
    fails(
        "--calibration gives a text",
        "quantize",
        vit_directory,
        "--out",
        tmp_path / "a",
        "--calibration",
        pairs,
    )
    fails("no sentence encoder", "evaluate", llama_directory, "--sts", pairs)
    fails("no such file", "evaluate", llama_directory, "--sts", tmp_path / "missing.csv")


def test_settings_come_from_preset_then_file_then_flags(tmp_path, llama_directory, text_file):
    file = tmp_path / "settings.yaml"
    file.write_text("preset: gptq\nbits: 3\ndamping: 0.5\nignore: [down_proj]\n")
    out = tmp_path / "out"
    result = run(
        "quantize", llama_directory, "--out", out, "--calibration", text_file, *SMALL, "--json",
        "--config", file, "--bits", 4, "--set", "damping=0.25", "--ignore", "o_proj",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    config = json.loads(result.stdout)["config"]
    assert (config["frame"], config["bits"], config["damping"]) == ("identity", 4, 0.25)
    assert config["ignore"] == ["o_proj"]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("Did you mean 'framequant-paper'", ["--preset", "framequant-papr"]),
        ("bits = 9.0: expected a value from 1 to 8", ["--bits", 9]),
        ("a scalar code has a whole number of bits", ["--preset", "framequant-scalar", "--bits", 2.5]),
        ("the budget is 1.0000 bits per weight", ["--bits", 1.0]),
        ("Invalid value for '--word-tokenized'", ["--word-tokenized", 2]),
        ("redundancy = 0.5", ["--redundancy", 0.5]),
        ("Did you mean 'damping'", ["--set", "dampin=1"]),
        ("expected KEY=VALUE", ["--set", "damping"]),
        ("cannot be read", ["--config", "nowhere.yaml"]),
        ("'(' is not a regular expression", ["--ignore", "("]),
        ("'no_such_linear' matches no linear", ["--ignore", "no_such_linear"]),
        ("choose auto, cpu or cuda", ["--device", "tpu"]),
        ("dtype 'int8' is unknown", ["--dtype", "int8"]),
        ("windows of 32 in 8 passes, 2000 are asked for", ["--samples", 4000]),
        ("exceed 1 together", ["--renamed", 0.6, "--generated", 0.6]),
        ("reads at most 128 tokens", ["--sequence-length", 4096]),
    ],
)
def test_bad_settings(tmp_path, llama_directory, text_file, message, arguments):
    base = ["quantize", llama_directory, "--out", tmp_path / "out", "--calibration", text_file]
    fails(message, *base, *SMALL, *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_calibration(tmp_path, llama_directory, vit_directory, image_folder, text_file):
    base = ["--out", tmp_path / "out", *SMALL]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(100))
    bad = tmp_path / "bad" / "broken.jpg"
    make_image(bad.with_name("good.png"))
    bad.write_bytes(b"broken")
    fails("empty.txt is empty", "quantize", llama_directory, "--calibration", empty, *base)
    fails("binary.txt is not text", "quantize", llama_directory, "--calibration", binary, *base)
    fails("no such file", "quantize", llama_directory, "--calibration", tmp_path / "nowhere.txt", *base)
    fails(
        "the Hugging Face hub cannot be reached",
        "quantize",
        llama_directory,
        "--calibration",
        "wikitext",
        *base,
    )
    fails("reads text", "quantize", llama_directory, "--calibration", image_folder, *base)
    fails("give a folder of images", "quantize", vit_directory, *base)
    fails("give a folder of images", "quantize", vit_directory, "--calibration", text_file, *base)
    arguments = ["--out", tmp_path / "out", "--calibration", bad.parent, "--samples", 2]
    fails("broken.jpg cannot be read as an image", "quantize", vit_directory, *arguments)


def test_output_is_protected(tmp_path, llama_directory, quantized, text_file):
    out, _ = quantized
    arguments = ["--calibration", text_file, *SMALL]
    before = sorted(path.name for path in out.iterdir())
    fails("is not empty", "quantize", llama_directory, "--out", out, *arguments)
    fails(
        "is the model itself",
        "quantize",
        llama_directory,
        "--out",
        llama_directory,
        "--overwrite",
        *arguments,
    )
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    fails("holds no model", "quantize", llama_directory, "--out", precious, "--overwrite", *arguments)
    assert (precious / "thesis.txt").exists()
    assert sorted(path.name for path in out.iterdir()) == before
    fails("already quantized by framequant", "quantize", out, "--out", tmp_path / "again", *arguments)


def test_bad_evaluations(tmp_path, quantized, llama_directory, vit_directory, image_folder, text_file):
    out, _ = quantized
    fails("nothing to measure", "evaluate", out)
    fails("no such file", "evaluate", out, "--perplexity", tmp_path / "nowhere.txt")
    fails("one window needs 128", "evaluate", out, "--perplexity", _short(tmp_path))
    fails("does not read images", "evaluate", out, "--imagenet", image_folder)
    fails("has no tokenizer", "evaluate", vit_directory, "--perplexity", text_file)
    fails("no folder", "evaluate", vit_directory, "--imagenet", tmp_path / "nowhere")
    fails("no such directory", "evaluate", "./nowhere", "--perplexity", text_file)
    fails("does not generate text", "generate", _headless(tmp_path, llama_directory), "the")
    fails("the prompt is empty", "generate", out, "")
    fails("no directory", "inspect", tmp_path / "nowhere")
    fails("is a file: give a directory", "inspect", text_file)
    fails("is no checkpoint of framequant", "inspect", llama_directory)


def _short(folder):
    file = folder / "short.txt"
    file.write_text("the old tiger")
    return file


def _headless(folder, llama_directory):
    from tests.conftest import make_llama, make_tokenizer

    path = folder / "headless"
    make_llama().model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_a_damaged_checkpoint_is_named(tmp_path, quantized):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(quantized[0], out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails("model.safetensors is truncated or damaged", "inspect", out)
    fails("model.safetensors", "generate", out, "the")


def test_usage_errors_exit_with_2():
    assert run("quantize").exit_code == 2
    assert run("no-such-command").exit_code == 2
    assert run("evaluate", "x", "--limit", "0").exit_code == 2


def test_json_leaves_stdout_empty_on_errors(tmp_path):
    result = run("inspect", tmp_path / "nowhere", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr("framequant.checkpoint.read_json", lambda path: 1 / 0)
    result = run("inspect", tmp_path)
    assert isinstance(result.exception, ZeroDivisionError)


def test_full_disk_is_a_clear_error(tmp_path, monkeypatch, llama_directory, text_file):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("framequant.checkpoint.write_tensors", full)
    out = tmp_path / "out"
    fails("No space left", "quantize", llama_directory, "--out", out, "--calibration", text_file, *SMALL)
    assert list(tmp_path.iterdir()) == []


def command(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    parts = [sys.executable, "-m", "framequant", *map(str, arguments)]
    return subprocess.Popen(
        parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_as_a_process(tmp_path):
    process = command("inspect", tmp_path / "nowhere")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("error: no directory")


@pytest.mark.parametrize("where", ["walk", "save"])
def test_interrupt_writes_nothing(tmp_path, monkeypatch, llama_directory, text_file, where):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    target = {"walk": "framequant.model.walk.quantize_shared", "save": "framequant.checkpoint.write_tensors"}[
        where
    ]
    monkeypatch.setattr(target, interrupt)
    out = tmp_path / "out"
    result = run("quantize", llama_directory, "--out", out, "--calibration", text_file, *SMALL)
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_interrupt(tmp_path, llama_directory):
    text = tmp_path / "long.txt"
    text.write_text("the old tiger reads " * 200_000)
    out = tmp_path / "out"
    process = command(
        "quantize", llama_directory, "--out", out, "--calibration", text, "--samples", 5000, "--device", "cpu"
    )
    for line in process.stderr:
        if "windows of" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt"]


@pytest.mark.parametrize("directory", ["llama_directory", "vit_directory"])
def test_sigma_delta_needs_no_calibration(directory, request, tmp_path):
    source, out = request.getfixturevalue(directory), tmp_path / "out"
    settings = ["--preset", "sigma-delta", "--frame-size-ratio", "4", "--levels", "2", "--device", "cpu"]
    result = run("quantize", source, "--out", out, *settings)
    assert result.exit_code == 0, result.stderr
    assert "plain rounding to nearest at equal bits" in " ".join(result.stdout.split())
    result = run("inspect", out, "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert {row["code"] for row in shown["linears"]} == {"2 levels, sigma-delta order 1, rows"}
    # Four one-bit codes for a weight, and the scales, biases and names that small matrices feel.
    assert 4 < shown["summary"]["bits_per_weight"] < 6.5
    fails("nearest is 4", "quantize", source, "--out", tmp_path / "no", *settings[:-4], "--levels", "3")
    fails(
        "is impossible for even d",
        "quantize",
        source,
        "--out",
        tmp_path / "no",
        "--preset",
        "sigma-delta",
        "--frame-size-ratio",
        "1",
    )


def test_report_writes_a_page_and_says_what_is_on_it(tmp_path):
    pytest.importorskip("plotly")
    (tmp_path / "a.csv").write_text("method,bits_per_weight,perplexity\nrtn,2,9\ngptq,2,8\n")
    (tmp_path / "bad.csv").write_text("method\n")
    done = run("report", tmp_path, "--out", tmp_path / "p.html", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tables"] == [str(tmp_path / "a.csv")]
    assert list(found["skipped"]) == [str(tmp_path / "bad.csv")]
    assert (tmp_path / "p.html").stat().st_size == found["bytes"]


def test_report_without_results_is_a_users_error(tmp_path):
    done = run("report", tmp_path, "--out", tmp_path / "p.html")
    assert done.exit_code == 2
    assert "holds no results" in done.stderr


def test_overrides_are_read_from_the_command_line():
    from framequant.cli.options import build_config, parse_overrides
    from framequant.errors import ConfigError

    found = parse_overrides(["a.*(?:b)::bits=3, redundancy=1.25", "head::skip", "head::bits=4"])
    assert found == {"a.*(?:b)": {"bits": 3, "redundancy": 1.25}, "head": {"skip": True, "bits": 4}}
    config = build_config("framequant-scalar", None, ["overrides={c: {bits: 4}}"], {"overrides": found})
    assert list(config.overrides) == ["c", *found]
    assert config.for_linear("a.x.b").bits == 3
    assert config.for_linear("head") is None
    for text in ("bits=3", "::bits=3", "a::", "a::bits"):
        with pytest.raises(ConfigError, match="expected"):
            parse_overrides([text])


def test_bench_compares_with_the_float_model(quantized, llama_directory):
    out, _ = quantized
    options = ["--prompt", 8, "--tokens", 3, "--repeats", 1, "--device", "cpu"]
    result = run("bench", out, *options, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    own, dense = data["models"].values()
    assert own["model_bytes"] < dense["model_bytes"]
    assert own["bytes_per_token"] < dense["bytes_per_token"]
    assert data["decoding_ratio"] == pytest.approx(own["tokens_per_second"] / dense["tokens_per_second"])
    result = run("bench", out, *options, "--against", llama_directory)
    assert result.exit_code == 0, result.stderr
    assert "decoding, tokens/s" in result.stdout
    assert "first token" in result.stdout
    result = run("bench", out, *options, "--against", "none", "--json")
    assert list(json.loads(result.stdout)["models"]) == [str(out)]
    assert json.loads(result.stdout)["decoding_ratio"] is None


def test_bench_refuses_what_cannot_decode(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    fails("no language model", "bench", tmp_path, "--device", "cpu", "--against", "none")
