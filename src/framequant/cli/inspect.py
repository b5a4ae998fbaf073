"""``framequant inspect``: what a checkpoint holds, linear by linear, measured from its files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from framequant.cli.console import Reporter, count, facts, size
from framequant.cli.options import JsonOption

NAME = "inspect"
EXAMPLES = "Examples:\n\nframequant inspect smol-2bit\n\nframequant inspect smol-2bit --json | jq .summary"

_DTYPE_BYTES = {"U8": 1, "I8": 1, "I16": 2, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "F64": 8}


def run(
    directory: Annotated[Path, typer.Argument(help="A checkpoint of framequant.")],
    as_json: JsonOption = False,
) -> None:
    """Show every linear of a checkpoint: shape, frames, code, redundancy, measured bits and proxy loss."""
    reporter = Reporter(as_json)
    rows, totals = inspect(directory)
    codes = Counter(row["code"] for row in rows)
    table = Table(
        title=str(directory), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("linear", overflow="fold")
    for heading in ("shape", "frame in", "frame out", *(["code"] if len(codes) > 1 else [])):
        table.add_column(heading, no_wrap=len(codes) == 1)
    for heading in ("r", "bits", "proxy loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            "×".join(map(str, row["shape"])),
            _short_frame(row["frame_in"]),
            _short_frame(row["frame_out"]),
            *([row["code"]] if len(codes) > 1 else []),
            f"{row['redundancy']:.4f}",
            f"{row['bits_per_weight']:.4f}",
            _number(row["proxy_loss"]),
        )
    reporter.print(table)
    reporter.print(facts("Totals", _describe(totals, codes)))
    reporter.print_json({"directory": str(directory), "summary": totals, "linears": rows})


def inspect(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a checkpoint's config, the headers of its files and its report; no tensor is loaded.

    Returns:
        One entry per linear, and the totals.

    Raises:
        CheckpointError: the directory is no checkpoint of ours, or is damaged; the key is named.
    """
    from framequant import checkpoint
    from framequant.errors import CheckpointError
    from framequant.model.report import config_entry, describe_code, describe_frame
    from framequant.pretrained import read_report

    if not directory.is_dir():
        what = f"{directory} is a file" if directory.is_file() else f"no directory {directory}"
        raise CheckpointError(f"{what}: give a directory that framequant quantize wrote.")
    config = checkpoint.read_json(directory / checkpoint.CONFIG_NAME)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise CheckpointError(
            f"{directory} is no checkpoint of framequant: its config.json has no quantization_config."
        )
    entry = checkpoint.parse_quantization(config["quantization_config"])
    header = checkpoint.read_header(checkpoint.weight_files(directory))
    checkpoint.check_header(entry, header)
    report = read_report(directory)
    losses = {linear.name: linear for linear in report.linears} if report else {}
    rows = []
    for name, spec in entry.linears.items():
        stored = _tensor_bytes(name, header) + len(json.dumps(config_entry(name, spec))) - 1
        loss = losses.get(name)
        rows.append(
            {
                "name": name,
                "shape": [spec.out_features, spec.in_features],
                "frame_in": describe_frame(spec.frame_in),
                "frame_out": describe_frame(spec.frame_out),
                "code": describe_code(spec),
                "redundancy": spec.redundancy,
                "bytes": stored,
                "bits_per_weight": 8 * stored / spec.num_weights,
                "proxy_loss": loss.proxy_loss if loss else None,
                "relative_loss": loss.relative_loss if loss else None,
            }
        )
    weights = sum(spec.num_weights for spec in entry.linears.values())
    stored = sum(row["bytes"] for row in rows)
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    totals = {
        "linears": len(rows),
        "weights": weights,
        "bits_per_weight": 8 * stored / max(weights, 1),
        "redundancy": sum(r["redundancy"] * r["shape"][0] * r["shape"][1] for r in rows) / max(weights, 1),
        "linear_bytes": stored,
        "files": files,
        "bytes": sum(files.values()),
        "config": entry.config.to_dict(),
        "model": report.model if report else {},
        "seconds": report.seconds if report else None,
        "warnings": report.warnings if report else [],
    }
    return rows, totals


def _tensor_bytes(name: str, header: dict[str, tuple[tuple[int, ...], str]]) -> int:
    total = 0
    for key, (shape, dtype) in header.items():
        if key.rpartition(".")[0] == name and not key.endswith(".bias"):
            numbers = 1
            for side in shape:
                numbers *= side
            total += numbers * _DTYPE_BYTES.get(dtype, 4)
    return total


def _short_frame(words: str) -> str:
    """``fusion k=9 l=192 r=1.1250`` as ``fusion 9×192``; the redundancy has its own column."""
    parts = dict(part.split("=") for part in words.split() if "=" in part)
    return f"fusion {parts['k']}×{parts['l']}" if {"k", "l"} <= set(parts) else words


def _describe(totals: dict[str, Any], codes: Counter[str]) -> dict[str, str]:
    files = "\n".join(f"{size(number):>10}  {name}" for name, number in totals["files"].items())
    return {
        "quantized": f"{totals['linears']} linears, {count(totals['weights'])} weights",
        "codes": "\n".join(f"{code} ({number} linears)" for code, number in codes.items()),
        "bits per weight": f"{totals['bits_per_weight']:.4f}, measured from the files",
        "true redundancy": f"{totals['redundancy']:.4f}",
        "these linears": f"{size(totals['weights'] * 2)} in 16 bits → {size(totals['linear_bytes'])}",
        "files": files,
        "all files": size(totals["bytes"]),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
