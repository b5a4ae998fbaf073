r"""The main job's table: presets quantized, saved, reloaded and evaluated on one model, one row each.

Language, on ``../shared`` (a GPU is used if there is one)::

    python experiments/main_job.py smollm2 --calibration ../shared/data/wikitext-2-raw/calibration.txt \\
        --perplexity ../shared/data/wikitext-2-raw/test.txt --csv experiments/results/main_smollm2.csv

Vision::

    python experiments/main_job.py ../shared/models/deit_tiny_patch16_224 \\
        --calibration ../shared/data/imagenet/train --imagenet ../shared/data/imagenet/val

Rows are ``preset`` or ``preset:key=value,key=value``, with ``tune=STEPS`` to tune afterwards (``tune_lr``,
``tune_embeddings``: rates; ``tune_held_out``: the share that judges), ``samples=N`` for other than ``--samples`` and
``generated=SHARE``, ``continued=SHARE`` and the like for what they are made of; without ``--row`` the rows of the issue
are run. ``--untuned FOLDER`` keeps the untuned model of the first tuned row, and other tunings of the same settings
begin with it. Every figure is that of the model *reloaded* from disk, but for "untuned_" ones, and "equal" says whether
its logits are the in-memory model's, bit for bit.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench import FULL, Amount, Bench, Row, commit, device_name, parse_row, reloaded, write

import framequant as fq
from framequant.cli.options import choose_device
from framequant.evaluation.forward import logits_of

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


def example(bench: Bench) -> torch.Tensor:
    """Inputs on which the reloaded model must agree bit for bit."""
    if bench.kind == "language":
        return bench.windows[:2]
    settings = bench.opened.require_images()
    return torch.full((1, 3, settings.height, settings.width), 0.1)


def untuned(
    bench: Bench,
    config: fq.FrameQuantConfig,
    tuning: fq.TuneConfig | None,
    amount: Amount,
    folder: Path | None,
) -> tuple[torch.nn.Module, Any, Row, Any]:
    """The model of a row before its tuning, report, columns and data: those in ``folder``, or new ones put there."""
    wanted = json.loads(json.dumps([config.to_dict(), amount._asdict() | {"mix": amount.mix.given}]))
    if tuning and folder is not None and (folder / "row.json").is_file():
        kept, figures = json.loads((folder / "row.json").read_text(encoding="utf-8"))
        if kept != wanted:
            raise fq.ConfigError(f"{folder} holds an untuned model of other settings: {kept}; not {wanted}")
        model = fq.load(folder / "model", device=next(bench.model.parameters()).device)
        return model, model.framequant_report, figures, torch.load(folder / "data.pt")
    start = time.perf_counter()
    data = bench.data(amount)
    seconds = time.perf_counter() - start
    model, report, figures = bench.quantized(config, amount, tuning)
    figures["data_seconds"] = round(seconds, 1)
    if tuning and folder is not None:
        fq.save_pretrained(model, folder / "model")
        torch.save(data, folder / "data.pt")
        (folder / "row.json").write_text(json.dumps([wanted, figures]), encoding="utf-8")
    return model, report, figures, data


def run_row(row: str, bench: Bench, folder: Path | None = None) -> Row:
    config, tuning, amount = parse_row(row)
    model, report, figures, data = untuned(bench, config, tuning, amount, folder)
    tuned = {}
    if tuning:
        tuned = {f"untuned_{key}": value for key, value in bench.evaluate(model).items() if key != "tokens"}
        print({"row": row, **figures, **tuned}, flush=True)
        found = fq.tune_(model, bench.model, data, tuning)
        tuned |= {
            "tune_seconds": round(found.seconds, 1),
            "held_out_kl_before": round(found.loss_before, 5),
            "held_out_kl_after": round(found.loss_after, 5),
        }
    loaded, size = reloaded(model)
    with torch.no_grad():
        equal = torch.equal(logits_of(model, example(bench)), logits_of(loaded, example(bench)))
    del model
    return {
        "row": row,
        **figures,
        "bits_per_weight": round(report.bits_per_weight, 4),
        **bench.evaluate(loaded),
        "samples": len(data),
        "checkpoint_bytes": size,
        "reload_equal": equal,
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
    untuned_folder: Annotated[Path | None, typer.Option("--untuned")] = None,
    commit_name: Annotated[str, typer.Option("--commit")] = "",
) -> None:
    if perplexity_text is None and imagenet is None:
        raise typer.BadParameter("give --perplexity or --imagenet")
    args = Namespace(
        text=perplexity_text, imagenet=imagenet, sts=None, calibration=calibration, seed=seed, device=device,
        dtype=dtype, quick=False,
    )  # fmt: skip
    bench = Bench(
        model, args, replace(FULL, samples=samples, length=sequence_length, kl_windows=0), plain=False
    )
    origin = {"seed": seed, "dtype": dtype, "device": device_name(choose_device(device))}
    rows: list[dict[str, Any]] = [{"row": "float", **bench.float_row()}]
    print(rows[0], flush=True)
    for text in row or (VISION_ROWS if bench.kind == "vision" else LANGUAGE_ROWS):
        start = time.perf_counter()
        try:
            result = run_row(text, bench, untuned_folder)
        except fq.FrameQuantError as error:
            result = {"row": text, "error": str(error)}
        if "perplexity" in result:
            result["ratio"] = round(result["perplexity"] / rows[0]["perplexity"], 4)
        rows.append({**result, "row_seconds": round(time.perf_counter() - start, 1)})
        print(rows[-1], flush=True)
        gc.collect()
        if csv_file:
            write(rows, csv_file, {**origin, "commit": commit_name or commit()})


if __name__ == "__main__":
    typer.run(main)
