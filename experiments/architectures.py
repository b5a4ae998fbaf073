"""What every architecture of the tests shows: quantized, saved, reloaded bit for bit, in three ways.

Tiny random instances, so figures say nothing of quality: they say that blocks and linears are found by structure and
that the reloaded model is the evaluated one. Writes a CSV and ``docs/architectures.md``:
``python -m experiments.architectures --csv experiments/results/architectures.csv --markdown docs/architectures.md``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.model.architectures import ARCHITECTURES, FAMILIES, OwnModel, make, make_family, output  # noqa: E402

import framequant as fq  # noqa: E402
from framequant.integrations.transformers import probe_inputs  # noqa: E402
from framequant.model.without_data import quantize_without_data_  # noqa: E402

CONFIG = fq.FrameQuantConfig(bits=4, redundancy=1.0)
SKIP = {"own", "llama_tied"}


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def show(name: str) -> dict[str, Any]:
    build = make_family if name in FAMILIES else make
    model, data = build(name)
    is_hf = hasattr(model, "save_pretrained")
    row: dict[str, Any] = {"architecture": name, "class": type(model).__name__}
    report = fq.quantize_(model, data, CONFIG)
    expected = output(model, data)
    row["linears"] = len(report.linears)
    row["coverage"] = f"{report.coverage:.1%}"
    with tempfile.TemporaryDirectory() as folder:
        fq.save_pretrained(model, f"{folder}/a")
        skeleton = OwnModel() if name == "own" else None
        row["framequant.load"] = yes(
            torch.equal(output(fq.load(f"{folder}/a", model=skeleton), data), expected)
        )
        row["from_pretrained"] = row["save_pretrained again"] = row["without data"] = "–"
        if is_hf:
            loaded = type(model).from_pretrained(f"{folder}/a")
            row["from_pretrained"] = yes(torch.equal(output(loaded, data), expected))
            loaded.save_pretrained(f"{folder}/b")
            again = type(model).from_pretrained(f"{folder}/b")
            row["save_pretrained again"] = yes(torch.equal(output(again, data), expected))
            row["without data"] = without_data(build(name)[0], len(report.linears))
    reasons = sorted({why for key, why in report.skipped.items()})
    row["note"] = "; ".join([*reasons, *(w for w in report.warnings if "residual stream" in w)])
    return row


def without_data(model: torch.nn.Module, linears: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quantize_without_data_(model, CONFIG, probe_inputs(model))
    grouped = not any("of its own" in warning for warning in report.warnings)
    return yes(len(report.linears) == linears) + ("" if grouped else ", inputs not shared")


def markdown(rows: list[dict[str, Any]], versions: str) -> str:
    keys = [key for key in rows[0] if key != "note"]
    lines = [
        "# Architectures",
        "",
        "What tiny random instances show: linears found by structure, and whether the reloaded model computes the",
        "logits of the evaluated one bit for bit. Made by `python -m experiments.architectures` with",
        f"{versions}; the same is asserted by `tests/integrations/test_families.py`,",
        "`tests/model/test_walk.py` and `tests/integrations/test_checkpoint_roundtrip.py`.",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + "---|" * len(keys),
        *("| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows),
        "",
        "Notes:",
        "",
        *(f"- **{row['architecture']}**: {row['note']}" for row in rows if row["note"]),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in [*ARCHITECTURES, *FAMILIES]:
        if name not in SKIP:
            rows.append(show(name))
            print(rows[-1], flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if arguments.markdown:
        import timm
        import transformers

        versions = (
            f"transformers {transformers.__version__}, timm {timm.__version__}, torch {torch.__version__}"
        )
        arguments.markdown.write_text(markdown(rows, versions), encoding="utf-8")


if __name__ == "__main__":
    main()
