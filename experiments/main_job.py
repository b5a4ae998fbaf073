r"""The main job's table: presets quantized, saved, reloaded and evaluated on one model, one row each.

Language, on ``../shared`` (a GPU is used if there is one)::

    python experiments/main_job.py smollm2 --calibration ../shared/data/wikitext-2-raw/calibration.txt \\
        --perplexity ../shared/data/wikitext-2-raw/test.txt --csv experiments/results/main_smollm2.csv

Vision::

    python experiments/main_job.py ../shared/models/deit_tiny_patch16_224 \\
        --calibration ../shared/data/imagenet/train --imagenet ../shared/data/imagenet/val

Rows are ``preset`` or ``preset:key=value,key=value``, with ``tune=STEPS`` to tune afterwards and
``samples=N`` for other than ``--samples``; without ``--row``
the rows of the issue are run. Every figure is that of the model *reloaded* from disk, and "equal" says whether its
logits are the in-memory model's, bit for bit.
"""

from __future__ import annotations

import copy
import csv
import gc
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

import framequant as fq
from framequant.cli.console import Reporter
from framequant.cli.inputs import calibration_tensor, find_calibration
from framequant.cli.options import choose_device
from framequant.evaluation.accuracy import accuracy
from framequant.evaluation.forward import logits_of
from framequant.evaluation.images import labelled_images
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.text import evaluation_windows, read_text
from framequant.integrations.sources import OpenedModel, open_model

LANGUAGE_ROWS = [
    "framequant-scalar",
    "framequant-paper",
    "framequant-scalar:redundancy=1.0",
    "quip",
    "gptq",
    "gptq:group_size=64,grid=search",
    "gptq:bits=3",
    "rtn",
    "rtn:bits=3",
]
VISION_ROWS = [*LANGUAGE_ROWS, "framequant-scalar:redundancy=1.25"]


def parse_row(row: str) -> tuple[fq.FrameQuantConfig, int, int | None]:
    """The settings of a row, how many steps its tuning has, and its own number of calibration samples."""
    name, _, settings = row.partition(":")
    values = {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in settings.split(",") if part)}
    steps = values.pop("tune", 0)
    if steps:
        values.setdefault("row_factors", name == "framequant")
    samples = values.pop("samples", None)
    return fq.preset(name, **values), steps, samples


#: Calibration data of so many samples, and the seconds that making it took.
Calibration = Callable[[int | None], tuple[Any, float]]


class Evaluator:
    """Perplexity, or top-1 and top-5, of a model."""

    def __init__(self, opened: OpenedModel, text: Path | None, length: int, images: Path | None) -> None:
        self.opened = opened
        if images is not None:
            classes = int(logits_of(opened.model, self._example()).shape[-1])
            self.images = labelled_images(images, classes, opened.labels)
        elif text is not None:
            self.windows = evaluation_windows(opened.require_tokenizer(), read_text(text), length)
        else:
            raise typer.BadParameter("give --perplexity or --imagenet")
        self.vision = images is not None

    def _example(self) -> torch.Tensor:
        settings = self.opened.require_images()
        return torch.zeros(1, 3, settings.height, settings.width)

    def example(self) -> torch.Tensor:
        return self._example() + 0.1 if self.vision else self.windows[:2]

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        if self.vision:
            found = accuracy(model, self.images, self.opened.require_images())
            return {
                "top1": round(100 * found.top1, 2),
                "top1_error": round(100 * found.top1_error, 2),
                "top5": round(100 * found.top5, 2),
                "images": found.images,
            }
        result = perplexity(model, self.windows)
        return {"perplexity": round(result.perplexity, 3), "windows": result.windows, "tokens": result.tokens}


def run_row(row: str, opened: OpenedModel, calibrate: Calibration, evaluate: Evaluator) -> dict[str, Any]:
    config, steps, samples = parse_row(row)
    data, data_seconds = calibrate(samples)
    model = copy.deepcopy(opened.model)
    device = next(model.parameters()).device
    start = time.perf_counter()
    report = fq.quantize_(model, data, config)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tuned = {}
    if steps:
        found = fq.tune_(model, opened.model, data, steps)
        tuned = {
            "tune_seconds": round(found.seconds, 1),
            "held_out_kl_before": round(found.loss_before, 5),
            "held_out_kl_after": round(found.loss_after, 5),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = fq.save_pretrained(model, Path(folder) / "out")
        size = sum(file.stat().st_size for file in path.iterdir())
        loaded = fq.load(path, device=device)
    with torch.no_grad():
        equal = torch.equal(logits_of(model, evaluate.example()), logits_of(loaded, evaluate.example()))
    del model
    return {
        "row": row,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "redundancy": round(report.redundancy, 4),
        **evaluate(loaded),
        "samples": len(data),
        "data_seconds": round(data_seconds, 1),
        "quantize_seconds": round(seconds, 1),
        "checkpoint_bytes": size,
        "reload_equal": equal,
        "mean_relative_loss": round(sum(e.relative_loss for e in report.linears) / len(report.linears), 5),
        "warnings": len(report.warnings),
        **tuned,
    }


def main(
    model: str,
    calibration: Annotated[str, typer.Option()],
    perplexity_text: Annotated[Path | None, typer.Option("--perplexity")] = None,
    imagenet: Annotated[Path | None, typer.Option()] = None,
    samples: int = 128,
    sequence_length: int = 1024,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    row: Annotated[list[str] | None, typer.Option()] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv")] = None,
    commit: str = "",
) -> None:
    opened = open_model(model, dtype=dtype, device=choose_device(device))
    reporter = Reporter(False)
    source = find_calibration(calibration)

    def calibrate(count: int | None) -> tuple[Any, float]:
        start = time.perf_counter()
        data = calibration_tensor(source, opened, count or samples, sequence_length, seed, reporter)
        return data, time.perf_counter() - start

    evaluate = Evaluator(opened, perplexity_text, sequence_length, imagenet)
    place = next(opened.model.parameters()).device
    name = (
        torch.cuda.get_device_name(place)
        if place.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    commit = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )
    base = {"row": "float", "bits_per_weight": 8 * next(opened.model.parameters()).element_size()}
    reference = {**base, **evaluate(opened.model)}
    rows = [reference]
    print(reference, flush=True)
    for text in row or (VISION_ROWS if evaluate.vision else LANGUAGE_ROWS):
        try:
            result = run_row(text, opened, calibrate, evaluate)
        except fq.FrameQuantError as error:
            result = {"row": text, "error": str(error)}
        if "perplexity" in result:
            result["ratio"] = round(result["perplexity"] / reference["perplexity"], 4)
        rows.append(result)
        print(result, flush=True)
        gc.collect()
        if csv_file:
            write(
                rows,
                csv_file,
                {"seed": seed, "dtype": dtype, "device": name, "commit": commit},
            )


def write(rows: list[dict[str, Any]], path: Path, shared: dict[str, Any]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*fields, *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)


if __name__ == "__main__":
    typer.run(main)
