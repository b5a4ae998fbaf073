"""What the experiments share: models with their data, measured rows, and tables with their origin.

A *bench* is one model with calibration data and an evaluation: perplexity and divergence for language models, top-1 and
top-5 for vision models, rank correlation for sentence encoders. A *record* is a table that is written anew after
every row, with model, seed, commit, device and command. Whatever is missing becomes a row with the reason.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

import framequant as fq
from framequant.cli.console import Reporter
from framequant.cli.demo import fast_dtype
from framequant.cli.inputs import CalibrationSource, calibration_tensor, find_calibration
from framequant.cli.options import choose_device
from framequant.evaluation.accuracy import accuracy
from framequant.evaluation.forward import logits_of
from framequant.evaluation.images import find_images, image_batches, labelled_images, subset
from framequant.evaluation.kl import kl_divergence
from framequant.evaluation.mix import PLAIN, Mix
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.sentences import calibration_sentences, embeddings, read_pairs, sentence_similarity
from framequant.evaluation.tasks import evaluate_tasks
from framequant.evaluation.text import evaluation_windows, read_text
from framequant.integrations.sources import open_model
from framequant.model.tune_config import without_judges
from framequant.model.walk import quantized_linears
from framequant.report.results import Plot, write_plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "paper"

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much data an experiment takes.

    Attributes:
        samples: calibration windows, images or sentences.
        length: tokens of a window.
        windows: of the evaluation text; None for all.
        images: of the evaluation; None for all.
        pairs: of the sentence pairs; None for all.
        kl_windows: on which the divergence from the float model is measured; 0 for none.
    """

    samples: int = 128
    length: int = 1024
    windows: int | None = None
    images: int | None = None
    pairs: int | None = None
    kl_windows: int = 16


#: Sentences that count as one calibration sample of an encoder.
SENTENCES = 4

FULL = Size()
QUICK = Size(samples=16, length=128, windows=12, images=100, pairs=300, kl_windows=2)


def shared() -> Path:
    """The folder of models and data."""
    return Path(os.environ.get("FRAMEQUANT_SHARED", ROOT.parent / "shared"))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", action="append", help="any name that framequant opens; repeatable")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    made.add_argument("--add", action="store_true", help="keep the rows that the tables have of other runs")
    made.add_argument("--quick", action="store_true", help="few data and few rows, for two CPU cores")
    for name in ("samples", "length", "windows", "images", "pairs"):
        made.add_argument(f"--{name}", type=int, help=f"{Size.__dataclass_fields__[name].default} or all")
    made.add_argument("--text", type=Path, help="evaluation text instead of WikiText-2's test")
    made.add_argument("--calibration", help="calibration data instead of those in ../shared")
    made.add_argument("--imagenet", type=Path, help="labelled images instead of those in ../shared")
    made.add_argument("--sts", type=Path, help="sentence pairs instead of STS-B's test")
    made.add_argument("--device", default="auto")
    made.add_argument(
        "--dtype",
        help="float32 if not given; language models on a GPU and in quick runs: bfloat16 if it is fast",
    )
    made.add_argument("--seed", type=int, default=0)
    return made


def parse(made: argparse.ArgumentParser, file: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options, and keep the command that they make."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = made.parse_args(words)
    script = Path(file).resolve().relative_to(ROOT)
    args.command = shlex.join(["python", str(script), *words])
    return args


def size_of(args: argparse.Namespace) -> Size:
    """How much data the options ask for."""
    size = QUICK if args.quick else FULL
    given = {key: getattr(args, key) for key in ("samples", "length", "windows", "images", "pairs")}
    return Size(**{**vars(size), **{key: value for key, value in given.items() if value is not None}})


def synthesise_(model: nn.Module) -> None:
    """Turn quantized linears into dense ones: an evaluation without the frames, equal up to the dtype's rounding."""
    dtype = next(model.parameters()).dtype
    for name, layer in quantized_linears(model).items():
        model.set_submodule(name, layer.to_linear().to(dtype))


def default_models() -> list[str]:
    """The models at hand: language, vision, sentences."""
    return ["smollm2", str(shared() / "models" / "deit_tiny_patch16_224"), "minilm"]


class Record:
    """A table of one experiment.

    Args:
        args: of ``parser``; with ``--add`` the rows that the table already has stay, but for those measured anew.
        name: of the table.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.path = args.out / f"{name}.csv"
        self.rows: list[Row] = []
        self.kept = read_rows(self.path) if args.add else []
        self.origin = {
            "seed": args.seed,
            "commit": commit(),
            "device": device_name(choose_device(args.device)),
            "command": args.command,
        }

    def add(self, **row: Any) -> Row:
        """Print a row, and write the table with it."""
        self.rows.append(row)
        print({key: value for key, value in row.items() if value is not None}, flush=True)
        write(self.table, self.path, self.origin)
        return row

    @property
    def table(self) -> list[Row]:
        """The rows that stay from before, and then the new ones."""
        anew = {identity(row) for row in self.rows}
        return [*(row for row in self.kept if identity(row) not in anew), *self.rows]

    def attempt(self, function: Callable[[], Row], **known: Any) -> Row:
        """Add the row that a function returns, or the reason why there is none."""
        start, processor = time.perf_counter(), time.process_time()
        try:
            found = function()
        except (
            Exception
        ) as error:  # whatever a hub, a peer or a task library raises is told, and the run goes on
            found = {"error": reason(error)}
        gc.collect()
        torch.cuda.empty_cache()  # for the processes beside this one
        spent = {"row_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
        return self.add(**known, **found, **{key: round(value, 1) for key, value in spent.items()})

    def plots(self, title: str, text: str, plots: Sequence[Plot] = ()) -> None:
        """Say what the page draws from the table; plots of columns that no row has are left out."""
        columns = {*self.origin, *(key for row in self.table for key in row)}
        kept = [p for p in plots if p.image or {p.x, p.y, *p.where, *filter(None, [p.series])} <= columns]
        write_plots(self.path, title, text, kept)


def correlation_error(correlation: float, count: int) -> float:
    """Standard error of a rank correlation (Bonett and Wright 2000): (1 − ρ²) √((1 + ρ²/2) / (n − 3))."""
    square = correlation**2
    return (1 - square) * math.sqrt((1 + square / 2) / max(count - 3, 1))


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


#: Columns that say what a row measured, whatever came out.
IDENTITY = (
    *(
        "model",
        "method",
        "settings",
        "ablation",
        "line",
        "value",
        "weights",
        "layers",
        "stage",
        "claim",
        "measure",
    ),
    *("case", "check", "x", "linear", "space", "sigmas"),
)


def quality_column(rows: Sequence[Row]) -> str | None:
    """The column that says how good a model's rows are; None if none was measured."""
    return next((c for c in ("perplexity", "top1", "spearman") if any(c in row for row in rows)), None)


def identity(row: Row) -> tuple[str, ...]:
    """What tells a row from the others of its table."""
    return tuple(str(row.get(key, "")) for key in IDENTITY)


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, without empty cells; none if there is no table yet."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def write(rows: list[Row], path: Path, shared_columns: Row) -> None:
    """Write rows as CSV, with columns that are the same in all rows that have none of their own."""
    fields = list(dict.fromkeys(key for row in rows for key in row if key not in shared_columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".csv.part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*fields, *shared_columns])
        writer.writeheader()
        writer.writerows({**shared_columns, **row} for row in rows)
    unfinished.replace(path)  # a run that is cut off leaves the rows before


def commit() -> str:
    """The repository's commit, with a mark if the working tree has changes; ``FRAMEQUANT_COMMIT`` for a mere copy."""
    if "FRAMEQUANT_COMMIT" in os.environ:
        return os.environ["FRAMEQUANT_COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


def device_name(place: str | torch.device) -> str:
    """The machine in words."""
    if torch.device(place).type == "cuda":
        return f"{torch.cuda.get_device_name(place)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}"


class Amount(NamedTuple):
    """How much calibration data a row takes, None for the usual, and the shares of ``Mix`` that it is made of."""

    samples: int | None = None
    mix: Mix = Mix()


#: What a row says of its tuning, and where it stands in a ``TuneConfig``.
TUNING = {
    "tune": "steps",
    "tune_lr": "learning_rate",
    "tune_embeddings": "embedding_rate",
    "tune_held_out": "held_out",
}


def parse_row(row: str) -> tuple[fq.FrameQuantConfig, fq.TuneConfig | None, Amount]:
    """Settings of ``preset:key=value,…``, its tuning (``tune=`` steps …), its data (``samples=``, shares)."""
    name, _, settings = row.partition(":")
    values = {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in settings.split(",") if part)}
    told = {field: values.pop(key) for key, field in TUNING.items() if key in values}
    if told:
        values.setdefault("row_factors", fq.PRESETS.get(name, {}).get("code") == "trellis")
    shares = {field.name: values.pop(field.name, None) for field in fields(Mix)}
    amount = Amount(values.pop("samples", None), Mix(**shares))
    return fq.preset(name, **values), fq.TuneConfig(**told) if told else None, amount


class Bench:
    """A model with its data.

    Args:
        name: of the model.
        args: of ``parser``.
        size: how much data; that of the options if not given.
        plain: calibrate on the text as it is, as the paper and peers do; otherwise as ``framequant quantize`` does,
            with windows that the model writes itself and windows with punctuation apart.

    Raises:
        FrameQuantError: the model or its data cannot be had.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, size: Size | None = None, plain: bool = True
    ) -> None:
        self.size, self.seed, self.plain = size or size_of(args), args.seed, plain
        self.quick = args.quick
        self.name = Path(name).name.removesuffix(".gguf")
        self.opened = open_model(name, dtype=args.dtype or "float32", device=choose_device(args.device))
        self.model = self.opened.model
        heads = (
            hasattr(self.model, "get_output_embeddings") and self.model.get_output_embeddings() is not None
        )
        self.kind = "vision" if self.opened.is_vision else "language" if heads else "encoder"
        place = choose_device(args.device)
        if args.dtype is None and self.kind == "language" and (args.quick or place.startswith("cuda")):
            self.model.to(getattr(torch, fast_dtype(place)))
        self._data: dict[Amount, Any] = {}
        self._rows: dict[tuple[str, int], Row] = {}
        self._given = args.calibration
        getattr(self, f"_open_{self.kind}")(args)

    def _open_language(self, args: argparse.Namespace) -> None:
        source = args.text or shared() / "data" / "wikitext-2-raw" / "test.txt"
        windows = evaluation_windows(self.opened.require_tokenizer(), read_text(source), self.size.length)
        self.windows = windows[: self.size.windows]

    def _open_vision(self, args: argparse.Namespace) -> None:
        settings = self.opened.require_images()
        probe = torch.zeros(1, 3, settings.height, settings.width)
        classes = int(logits_of(self.model, probe).shape[-1])
        folder = args.imagenet or shared() / "data" / "imagenet" / "val"
        self.images = subset(labelled_images(folder, classes, self.opened.labels), self.size.images)
        self.batches = list(image_batches(self.images, settings))

    def _open_encoder(self, args: argparse.Namespace) -> None:
        self.pairs = read_pairs(args.sts or shared() / "data" / "stsb" / "stsb-en-test.csv").head(
            self.size.pairs
        )

    def at_hand(self) -> int:
        """How many calibration samples there are."""
        if self.kind == "encoder":
            return len(self._sentences()) // SENTENCES
        source = self._source()
        if source.folder is not None:
            return len(find_images(source.folder))
        return len(evaluation_windows(self.opened.require_tokenizer(), source.text or "", self.size.length))

    def data(self, amount: Amount | None = None) -> Any:
        """Calibration data."""
        amount = amount or Amount()
        amount = amount._replace(samples=amount.samples or self.size.samples)
        if amount not in self._data:
            self._data[amount] = self._read_data(amount.samples, amount.mix)
        return self._data[amount]

    def _read_data(self, samples: int, mix: Mix) -> Any:
        if self.kind == "encoder":
            sentences = self._sentences()
            count = min(SENTENCES * samples, len(sentences))
            return calibration_sentences(self.opened.tokenizer, sentences, 128, count, self.seed)
        length = self.size.length
        return calibration_tensor(
            self._source(),
            self.opened,
            samples,
            length,
            self.seed,
            Reporter(False),
            PLAIN if self.plain else mix,
        )

    def _sentences(self) -> Sequence[str]:
        return read_pairs(self._given or shared() / "data" / "stsb" / "stsb-en-dev.csv").sentences

    def _source(self) -> CalibrationSource:
        folder = "imagenet/train" if self.kind == "vision" else "wikitext-2-raw/calibration.txt"
        return find_calibration(self._given or str(shared() / "data" / folder))

    def evaluate(self, model: nn.Module) -> Row:
        """The figures of a model."""
        if self.kind == "vision":
            found = accuracy(model, self.images, self.opened.require_images(), batches=self.batches)
            return {
                "top1": round(100 * found.top1, 2),
                "top1_error": round(100 * found.top1_error, 2),
                "top5": round(100 * found.top5, 2),
                "images": found.images,
            }
        if self.kind == "encoder":
            similarity = sentence_similarity(model, self.opened.tokenizer, self.pairs, 128)
            found, count = similarity.spearman, similarity.pairs
            error = correlation_error(found, count)
            return {"spearman": round(found, 5), "spearman_error": round(error, 5), "pairs": count}
        result = perplexity(model, self.windows)
        found_row: Row = {"perplexity": round(result.perplexity, 3), "tokens": result.tokens}
        if self.size.kl_windows and model is not self.model:
            found_row["kl"] = round(self.divergence(model), 5)
        return found_row

    def divergence(self, model: nn.Module) -> float:
        """Mean divergence from the float model: over tokens or images; of sentences 1 − cos of the embeddings."""
        if self.kind == "language":
            return kl_divergence(model, self.model, self.windows[: self.size.kl_windows]).kl
        if self.kind == "vision":
            return kl_divergence(model, self.model, self.data()[:64]).kl
        both = [embeddings(each, self.data()[:2]) for each in (model, self.model)]
        return float(1 - torch.cosine_similarity(*both).mean())

    def tasks(self, model: nn.Module, limit: int | None) -> Row:
        """PIQA and LAMBADA through lm-eval with local files; the reason where they cannot be run."""
        folder = shared() / "data" / "tasks"
        names = ["piqa", "lambada"]
        try:
            found = evaluate_tasks(model, self.opened.tokenizer, names, folder=folder, limit=limit)
        except Exception as error:  # the row's other figures stay
            return {"tasks_error": reason(error)}
        return {
            f"{name}_{column}": round(values[metric], 4)
            for name, values in found.items()
            for column, metric in (("acc", "acc"), ("acc_error", "acc_stderr"))
        }

    def float_row(self) -> Row:
        """The float model as a row."""
        bits = 8 * next(self.model.parameters()).element_size()
        key = "float", 0
        if key not in self._rows:
            self._rows[key] = {"bits_per_weight": bits, **self.evaluate(self.model)}
        return dict(self._rows[key])

    def quantized(
        self, config: fq.FrameQuantConfig, amount: Amount | None = None, tuning: fq.TuneConfig | None = None
    ) -> tuple[nn.Module, Any, Row]:
        """A quantized copy, its report, and the columns that every row has; without what judges a tuning to come."""
        model = copy.deepcopy(self.model)
        data = None if config.is_data_free else self.data(amount)
        if tuning:
            data = without_judges(data, tuning, next(model.parameters()).device.type)
        start = time.perf_counter()
        report = fq.quantize_(model, data, config)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        losses = [entry.relative_loss for entry in report.linears]
        return (
            model,
            report,
            {
                "bits_per_weight": round(report.bits_per_weight, 4),
                "redundancy": round(report.redundancy, 4),
                "quantize_seconds": round(time.perf_counter() - start, 1),
                "mean_relative_loss": round(sum(losses) / len(losses), 6),
            },
        )

    def row(self, config: fq.FrameQuantConfig, samples: int | None = None) -> Row:
        """Quantize and evaluate; settings that were measured before give the same row, with a note."""
        key = json.dumps(config.to_dict(), sort_keys=True), samples or self.size.samples
        if key in self._rows:
            return {**self._rows[key], "note": "measured for an earlier row of the same settings"}
        model, _, row = self.quantized(config, Amount(samples))
        self._rows[key] = {**row, **self.evaluate(self.dense(model, config))}
        return dict(self._rows[key])

    def dense(self, model: nn.Module, config: fq.FrameQuantConfig) -> nn.Module:
        """The model without frames, its weights in its own dtype, where that saves time: in float32, and on a GPU.

        There the kernels of every new frame would have to be compiled. Quantized activations keep the frames.
        """
        first = next(model.parameters())
        if config.activation_bits is None and (first.dtype == torch.float32 or first.is_cuda):
            synthesise_(model)
        return model

    def quality(self) -> tuple[str, bool]:
        """The column that says how good a model is, and whether it is read as a ratio."""
        return {"language": ("perplexity", True), "vision": ("top1", False), "encoder": ("spearman", False)}[
            self.kind
        ]


#: The last bench of every name, with what it was opened for: stages of a run share models and measured rows.
_OPEN: dict[str, tuple[tuple[Any, ...], Bench]] = {}


def shared_bench(name: str, args: argparse.Namespace) -> Bench:
    """The bench that an earlier experiment of this process opened with the same options, or a new one."""
    given = (args.text, args.calibration, args.imagenet, args.sts, args.device, args.dtype, args.seed)
    key = (size_of(args), *given)
    if name not in _OPEN or _OPEN[name][0] != key:
        _OPEN.pop(name, None)  # its memory, before the new one takes some
        _OPEN[name] = key, Bench(name, args)
    return _OPEN[name][1]


def benches(args: argparse.Namespace, record: Record, models: Sequence[str] | None = None) -> list[Bench]:
    """The models of an experiment; one that cannot be had becomes a row with the reason."""
    found = []
    for name in args.model or models or default_models():
        try:
            found.append(shared_bench(name, args))
        except Exception as error:  # likewise
            record.add(model=Path(name).name, error=reason(error))
    return found


def reloaded(model: nn.Module) -> tuple[nn.Module, int]:
    """A model saved and loaded again, and the bytes of its checkpoint."""
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        path = fq.save_pretrained(model, Path(folder) / "out")
        size = sum(file.stat().st_size for file in path.iterdir())
        return fq.load(path, device=device), size


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
