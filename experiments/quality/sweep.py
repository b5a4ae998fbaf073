r"""Choose settings for language models on held-out calibration windows, never on a test text.

Of a calibration text's windows the first 128 of a seeded permutation calibrate; the others are held out and
measured in two renderings: as they are, and tokenized the old way (spaces around punctuation, ``@-@``), a stand-in
for text of another kind than what was calibrated on::

    python experiments/quality/sweep.py smollm2 --calibration ../shared/data/wikitext-2-raw/calibration.txt \\
        --row "framequant:bits=2,code=trellis,redundancy=1.0" --csv out.csv

A row is ``preset:key=value,…``; ``mix=0.5`` renders that share of the calibration windows the old way too.
"""

from __future__ import annotations

import copy
import csv
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

import framequant as fq
from framequant.cli.options import choose_device
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.renderings import mixed, word_tokenized
from framequant.evaluation.text import read_text, tokenize, windows
from framequant.integrations.sources import open_model


class Data:
    """Calibration and held-out windows of one text."""

    def __init__(self, opened: Any, text: str, samples: int, length: int, held: int, seed: int = 0) -> None:
        self.tokenizer, self.length = opened.require_tokenizer(), length
        pieces = windows(tokenize(self.tokenizer, text), length)
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(pieces)))
        self.plain = pieces[order[:samples]]
        rest = pieces[order[samples : samples + held].sort().values]
        self.texts = {"held": rest, "held_old": self.rendered(rest)}

    def rendered(self, pieces: torch.Tensor) -> torch.Tensor:
        text = "\n".join(word_tokenized(self.tokenizer.decode(piece)) for piece in pieces)
        return windows(tokenize(self.tokenizer, text), self.length)[: len(pieces)]

    def calibration(self, mix: float) -> torch.Tensor:
        return mixed(self.tokenizer, self.plain, mix)


def run_row(row: str, opened: Any, data: Data) -> dict[str, Any]:
    name, _, settings = row.partition(":")
    values = {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in settings.split(",") if part)}
    mix = values.pop("mix", 0.0)
    model = copy.deepcopy(opened.model)
    start = time.perf_counter()
    report = fq.quantize_(model, data.calibration(mix), fq.preset(name, **values))
    seconds = time.perf_counter() - start
    result = {"row": row, "bits": round(report.bits_per_weight, 4), "seconds": round(seconds, 1)}
    for key, text in data.texts.items():
        result[key] = round(perplexity(model, text).perplexity, 3)
    return result


def main(
    model: str,
    calibration: Annotated[Path, typer.Option()],
    samples: int = 128,
    sequence_length: int = 1024,
    held: int = 200,
    device: str = "auto",
    dtype: str = "float32",
    row: Annotated[list[str] | None, typer.Option()] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv")] = None,
) -> None:
    opened = open_model(model, dtype=dtype, device=choose_device(device))
    data = Data(opened, read_text(calibration), samples, sequence_length, held)
    base = {key: perplexity(opened.model, text).perplexity for key, text in data.texts.items()}
    print(
        {
            "row": "float",
            **{k: round(v, 3) for k, v in base.items()},
            "windows": [len(t) for t in data.texts.values()],
        }
    )
    rows = []
    for text in row or []:
        try:
            result = run_row(text, opened, data)
        except (fq.FrameQuantError, torch.OutOfMemoryError) as error:
            print(text, repr(error)[:300], flush=True)
            continue
        result.update({f"{key}_ratio": round(result[key] / base[key], 4) for key in base})
        rows.append(result)
        print(result, flush=True)
    if csv_file and rows:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
