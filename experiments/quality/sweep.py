r"""Choose settings for language models on held-out calibration windows, never on a test text.

Calibration takes windows of the first four fifths of a text, whole documents; the last fifth is held out and measured
in two renderings, beside texts of other kinds::

    python experiments/quality/sweep.py smollm2 --calibration ../shared/data/wikitext-2-raw/calibration.txt \\
        --judge TEXTS/bible.txt --judge TEXTS/manuals.txt --judge TEXTS/sources.txt \\
        --row framequant:bits=2,mix=0.5 --csv out.csv

with TEXTS written by ``experiments/quality/other_texts.py``.

A row is ``preset:key=value,…``. ``mix``, ``layout``, ``random``, ``swapped``, ``named``, ``repeated``, ``generated``
and ``continued`` are shares of the calibration windows to write with punctuation apart, that and line breaks of many
kinds, to draw from the vocabulary, to disturb, to give made-up names, to fill with random phrases that come again, to
sample from the model, and to sample from it going on from words of the text; ``samples`` their number; ``per_step``
the samples of a step of training ahead.
"""

from __future__ import annotations

import copy
import csv
import random
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

import framequant as fq
from framequant.cli.options import choose_device
from framequant.evaluation.copying import renamed, repeated_windows
from framequant.evaluation.own_text import own_windows
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.renderings import word_tokenized, written
from framequant.evaluation.text import read_text, tokenize, windows
from framequant.integrations.sources import open_model
from framequant.model import train_ahead

SAMPLES_PER_STEP = train_ahead.SAMPLES_PER_STEP
#: Kinds of calibration windows that are made from the text's, and those that are made from nothing.
FROM_TEXT = ("mix", "layout", "swapped", "named")
FROM_NOTHING = ("random", "repeated", "generated", "continued")
KINDS = FROM_TEXT + FROM_NOTHING


class Data:
    """Calibration windows from the first four fifths of a text's documents, and texts to judge by.

    Judged are the last fifth, running and word-tokenized, and texts of other kinds than what calibrates, so that
    a setting that only fits one is seen.
    """

    def __init__(
        self,
        opened: Any,
        text: str,
        samples: int,
        length: int,
        held: int,
        others: list[Path],
    ) -> None:
        self.opened, self.tokenizer, self.length = opened, opened.require_tokenizer(), length
        pieces = windows(tokenize(self.tokenizer, text), length)
        split = len(pieces) * 4 // 5
        order = torch.from_numpy(np.random.RandomState(0).permutation(split))
        self.pieces, self.samples = pieces[order], samples
        self.own = pieces[:0]
        rest = self.pieces.new_tensor(pieces[split:].tolist())[:held]
        self.texts = {
            "running": rest,
            "words": self._written(word_tokenized, rest, "\n")[:held],
            "names": self._written(lambda text: renamed(text, random.Random(1)), rest, "\n")[:held],
        }
        self.texts |= {file.stem: self._foreign(read_text(file), held) for file in others}

    def _foreign(self, text: str, held: int) -> torch.Tensor:
        return windows(tokenize(self.tokenizer, text[: held * self.length * 8]), self.length)[:held]

    def _written(self, write: Any, pieces: torch.Tensor, joint: str) -> torch.Tensor:
        return written(self.tokenizer, pieces, write, joint)

    def calibration(self, samples: int, shares: dict[str, float]) -> torch.Tensor:
        """``samples`` windows, shuffled: shares of them written anew, generated, or random; the rest as they are."""
        counts = {kind: round(share * samples) for kind, share in shares.items()}
        made = [getattr(self, f"_{kind}")(counts[kind]) for kind in FROM_NOTHING if counts.get(kind)]
        plain = self.pieces[torch.arange(samples - sum(map(len, made))) % len(self.pieces)]
        start = 0
        for kind in FROM_TEXT:
            if counts.get(kind):
                part = plain[start : start + counts[kind]]
                made.append(getattr(self, f"_{kind}")(part))
                start += len(part)
        found = torch.cat([*made, plain[start:]])
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]

    def _mix(self, part: torch.Tensor) -> torch.Tensor:
        return self._written(word_tokenized, part, " \n ")

    def _layout(self, part: torch.Tensor) -> torch.Tensor:
        draw = random.Random(0)
        breaks = ["\n", "\n\n", " \n ", "\n\n\n", " \n\n ", "\n \n", " \n\n\n\n "]
        return self._written(
            lambda text: re.sub(r" \n ", lambda _: draw.choice(breaks), word_tokenized(text)), part, "\n\n\n"
        )

    def _named(self, part: torch.Tensor) -> torch.Tensor:
        draw = random.Random(0)
        return self._written(lambda text: renamed(text, draw), part, "\n\n")

    def _random(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.tokenizer.vocab_size, (count, self.length), generator=generator)

    def _swapped(self, part: torch.Tensor) -> torch.Tensor:
        """A tenth of the tokens replaced by random ones."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(part.shape, generator=generator) < 0.1
        return torch.where(chosen, self._random(len(part)), part)

    def _generated(self, count: int) -> torch.Tensor:
        """The model's own text; the longest set is kept."""
        if len(self.own) < count:
            start = time.perf_counter()
            self.own = own_windows(self.opened.model, self.tokenizer, count, self.length)
            print(count, "windows of its own:", round(time.perf_counter() - start, 1), "s", flush=True)
        return self.own[:count]

    def _continued(self, count: int) -> torch.Tensor:
        """The model's own text, each piece of 128 tokens beginning with 16 of the calibration text."""
        return own_windows(self.opened.model, self.tokenizer, count, self.length, 1, self.pieces.flatten())

    def _repeated(self, count: int) -> torch.Tensor:
        return repeated_windows(self.tokenizer, count, self.length)


def read_options(text: str) -> dict[str, Any]:
    """The values of ``key=value,…``."""
    return {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in text.split(",") if part)}


def read_row(row: str, data: Data) -> tuple[fq.FrameQuantConfig, torch.Tensor]:
    """Settings of a row and its calibration windows."""
    name, _, settings = row.partition(":")
    values = read_options(settings)
    samples = values.pop("samples", data.samples)
    shares = {kind: values.pop(kind) for kind in KINDS if kind in values}
    train_ahead.SAMPLES_PER_STEP = values.pop("per_step", SAMPLES_PER_STEP)
    return fq.preset(name, **values), data.calibration(samples, shares)


def run_row(row: str, opened: Any, data: Data) -> dict[str, Any]:
    model = copy.deepcopy(opened.model)
    start = time.perf_counter()
    config, windows = read_row(row, data)
    report = fq.quantize_(model, windows, config)
    seconds = time.perf_counter() - start
    result = {"row": row, "bits": round(report.bits_per_weight, 4), "seconds": round(seconds, 1)}
    if report.trained_ahead:
        losses = [round(loss, 3) for loss in report.trained_ahead["losses"]]
        print(row, "ahead", round(report.trained_ahead["seconds"], 1), "s", losses, flush=True)
    for key, text in data.texts.items():
        result[key] = round(perplexity(model, text).perplexity, 3)
    return result


def write(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(
    model: str,
    calibration: Annotated[Path, typer.Option()],
    samples: int = 128,
    sequence_length: int = 1024,
    held: int = 45,
    device: str = "auto",
    dtype: str = "float32",
    row: Annotated[list[str] | None, typer.Option()] = None,
    judge: Annotated[list[Path] | None, typer.Option()] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv")] = None,
) -> None:
    opened = open_model(model, dtype=dtype, device=choose_device(device))
    data = Data(opened, read_text(calibration), samples, sequence_length, held, judge or [])
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
        if csv_file:
            write(rows, csv_file)


if __name__ == "__main__":
    typer.run(main)
