"""``framequant export``: a quantized checkpoint as a float model for other engines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from framequant.cli.console import Reporter, facts, seconds, size
from framequant.cli.options import JsonOption

NAME = "export"
EXAMPLES = (
    "Examples:\n\n"
    "framequant export smol-2bit --out smol-float\n\n"
    "framequant export deit-2bit --format onnx --out deit.onnx\n\n"
    "framequant export smol-2bit --format gguf --dtype float16 --out smol.gguf"
)


def run(
    directory: Annotated[str, typer.Argument(help="A checkpoint of framequant.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for safetensors, file for onnx and gguf.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors (a plain transformers or timm model), onnx (vision models) or gguf (Llama, Mistral, "
            "Qwen2, Qwen3).",
        ),
    ] = "safetensors",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="auto (as the checkpoint's other parameters), float32, bfloat16 or float16."
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the float model that the checkpoint in DIRECTORY is equal to; it has the float model's size again."""
    from framequant import export

    reporter = Reporter(as_json)
    start = time.perf_counter()
    with reporter.stage(f"exporting {directory}"):
        result = export(directory, out, format, dtype=dtype, overwrite=overwrite)
    rows = {"written": f"{out} ({format}, {result['dtype']}, {size(result['bytes'])})"}
    if "difference" in result:
        rows["checked"] = f"onnxruntime's logits within {result['difference']:.1e} of torch's"
        rows["input"] = ", ".join(f"{name} {shape}" for name, shape in result["inputs"].items())
    if "load" in result:
        rows["load with"] = result["load"]
    if "tensors" in result:
        with_tokenizer = "with its tokenizer" if result["tokenizer"] else "without a tokenizer"
        rows["holds"] = (
            f"{result['tensors']} tensors of architecture {result['architecture']}, {with_tokenizer}"
        )
    rows["time"] = seconds(time.perf_counter() - start)
    reporter.print(facts(f"Exported {directory}", rows))
    reporter.print_json(result)
