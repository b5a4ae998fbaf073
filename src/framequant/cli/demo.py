"""``framequant demo``: the whole way on a packaged model and a packaged text, without network or own data.

SmolLM2-135M is calibrated on the Old Testament and evaluated on the New (King James), quantized to about 2.25
bits, saved, and reloaded; everything that is measured of the quantized model is measured of the reloaded one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequant.cli import quantize
from framequant.cli.console import Reporter, facts, seconds, size
from framequant.cli.options import DeviceOption, DtypeOption, JsonOption, choose_device
from framequant.errors import CheckpointError

if TYPE_CHECKING:
    from framequant.integrations.sources import OpenedModel

NAME = "demo"
MODEL = "smollm2"
PROMPT = "And it came to pass in those days, that"
#: Redundancy 1.125 of a two-bit code: 2.25 bits, and a little for scales.
REDUNDANCY = 1.125
EXAMPLES = "Examples:\n\nframequant demo\n\nframequant demo --out smol-2bit --samples 64 --json"


def run(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory to keep the checkpoint in; a temporary one if not given."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows to evaluate on.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies in the output directory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize SmolLM2-135M to about 2.25 bits, save it, reload it, and compare it with the float model."""
    if out is not None:
        quantize.check_output(out, overwrite, MODEL)
        _demo(out, samples, sequence_length, windows, new_tokens, device, dtype, overwrite, as_json)
        return
    with tempfile.TemporaryDirectory(prefix="framequant-demo-") as folder:
        _demo(
            Path(folder) / "smollm2-2bit",
            samples,
            sequence_length,
            windows,
            new_tokens,
            device,
            dtype,
            False,
            as_json,
        )


def _demo(
    out: Path,
    samples: int,
    sequence_length: int,
    num_windows: int,
    new_tokens: int,
    device: str,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    from framequant.config import preset
    from framequant.evaluation.text import calibration_windows, evaluation_windows, king_james
    from framequant.integrations.sources import open_model

    start = time.perf_counter()
    reporter = Reporter(as_json)
    place = choose_device(device)
    dtype = fast_dtype(place) if dtype == "auto" else dtype
    config = preset("framequant-scalar", redundancy=REDUNDANCY)
    old, new = king_james("old"), king_james("new")
    opened = quantize.open_float(MODEL, dtype, place, reporter)
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    with reporter.stage("tokenizing: Old Testament to calibrate, New Testament to evaluate"):
        calibration = calibration_windows(opened.tokenizer, old, samples, sequence_length, config.seed)
        evaluation = evaluation_windows(opened.tokenizer, new, sequence_length, num_windows)
    floating = measure(opened, evaluation, new_tokens, "float model", reporter)
    report = quantize.quantize_model(opened, calibration, config, reporter)
    quantize.save(opened, out, overwrite, reporter)
    summary = quantize.summarize(report, opened, out, parameters)
    del opened
    with reporter.stage(f"loading {out}"):
        reloaded = open_model(str(out), "auto", place)
    if not reloaded.quantized:
        raise CheckpointError(f"{out} was not read back as a quantized checkpoint.")
    quantized = measure(reloaded, evaluation, new_tokens, "reloaded model", reporter)
    results = {
        **summary,
        "dtype": dtype,
        "calibration": quantize.describe_calibration(calibration),
        "prompt": PROMPT,
        "float": floating,
        "quantized": quantized,
        "perplexity_ratio": quantized["perplexity"] / floating["perplexity"],
        "total_seconds": time.perf_counter() - start,
    }
    _print(results, reporter)
    reporter.print_json(results)


def fast_dtype(device: str) -> str:
    """The dtype to compute in: bfloat16 where the machine multiplies it natively, else float32."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16"
    return (
        "bfloat16"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "float32"
    )


def measure(
    opened: OpenedModel, windows: Any, new_tokens: int, what: str, reporter: Reporter
) -> dict[str, Any]:
    """Perplexity and a sample of one model."""
    from framequant.evaluation.generate import generate
    from framequant.evaluation.perplexity import perplexity

    with reporter.bar(f"perplexity of the {what}", "windows") as update:
        result = perplexity(opened.model, windows, on_progress=update)
    with reporter.stage(f"a sample from the {what}"):
        sample = generate(opened.model, opened.require_tokenizer(), PROMPT, new_tokens)
    return {**result.to_dict(), "sample": sample}


def _print(results: dict[str, Any], reporter: Reporter) -> None:
    floating, quantized, sizes = results["float"], results["quantized"], results["bytes"]
    rows = {
        "calibration": f"{results['calibration']} of the Old Testament, in {results['dtype']}",
        "evaluation": f"{floating['tokens']} predicted tokens of the New Testament "
        f"in {floating['windows']} windows",
        "perplexity, float": f"{floating['perplexity']:.2f}",
        "perplexity, quantized": f"{quantized['perplexity']:.2f}, "
        f"{results['perplexity_ratio']:.2f} times float",
        "bits per weight": f"{results['bits_per_weight']:.4f}, measured: every byte stored for the linears",
        "true redundancy": f"{results['redundancy']:.4f}",
        "these linears": f"{size(sizes['linears_float16'])} in float16 → {size(sizes['linears_quantized'])}",
        "whole model": f"{size(sizes['model_float16'])} in float16 → {size(sizes['model_on_disk'])} on disk "
        "(embeddings and norms are not quantized)",
        "float says": f"{PROMPT}{floating['sample']}",
        "quantized says": f"{PROMPT}{quantized['sample']}",
        "time": f"{seconds(results['seconds'])} to quantize, {seconds(results['total_seconds'])} in all",
    }
    reporter.print(facts("SmolLM2-135M, quantized, saved and reloaded", rows))
    if Path(results["out"]).parent.name.startswith("framequant-demo-"):
        reporter.print("The checkpoint was temporary. To keep one: framequant demo --out DIR")
    else:
        reporter.print(f'Next: framequant generate {results["out"]} "{PROMPT}"')
