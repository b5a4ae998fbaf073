"""How the work of a walk is split over ranks, on a machine without several GPUs: what each rank does, and how long.

Run from the repository's root with ``PYTHONPATH=src:.``::

    python benchmarks/rank_work.py --ranks 1 2 --csv benchmarks/rank_work.csv

A Llama-shaped model with random weights is quantized by so many gloo processes of one thread each. Seconds are those
of a process's own processor time, so they hold on a machine with other work; waiting for other ranks is not in them.
``split`` is the work of one rank alone over the most that one of several has to do: the speed-up to expect where
nothing is waited for. The last rank factors for the rounding while the others make the targets.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.load_test import SHAPES, write_model
from benchmarks.measure import commit

#: Functions whose processor time counts for a step; what is in none of them is running blocks, reading and writing.
STEPS = {
    "moments": [("framequant.model.walk", "add_moments")],
    "exchange": [
        ("framequant.model.walk", "reduce_moments"),
        ("framequant.model.ranks", "DistributedRanks.gather_rows"),
        ("framequant.model.ranks", "DistributedRanks.share"),
    ],
    "factors": [
        ("framequant.quantizers.group_rounding", "feedback_factor"),
        ("framequant.quantizers.weight", "_targets"),
    ],
    "rows": [
        ("framequant.quantizers.group_rounding", "round_ldlq"),
        ("framequant.quantizers.group_rounding", "refine_codes"),
    ],
}


class Meter:
    """Processor seconds by step of this process, tokens run through blocks and coefficients rounded."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = self.coefficients = 0
        for step, functions in STEPS.items():
            for module, path in functions:
                owner: Any = importlib.import_module(module)
                *outer, name = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                setattr(owner, name, self._timed(step, name, getattr(owner, name)))

    def _timed(self, step: str, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "add_moments":
                self.tokens += next(iter(args[2].inputs.values()))[0].shape[0]
            if name == "round_ldlq":
                self.coefficients += args[0].numel()
            start = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[step] += time.process_time() - start

        return timed


def work(arguments: argparse.Namespace) -> None:
    """Quantize as one of the ranks, and write what this one did."""
    import framequant as fq
    from framequant.cli.streaming import join_ranks, leave_ranks

    torch.set_num_threads(1)
    _, ranks = join_ranks("cpu")
    ids = torch.randint(
        0, 1000, (arguments.samples, arguments.tokens), generator=torch.Generator().manual_seed(1)
    )
    batches = list(ids.split(2))
    warm = torch.zeros(1, 8, dtype=torch.float64)
    (warm @ warm.T).sum()
    meter = Meter()
    start = time.process_time()
    source, out = arguments.folder / "model", arguments.folder / f"out-{ranks.size}"
    fq.quantize_streaming(source, out, batches, fq.preset(arguments.preset), ranks=ranks)
    total = time.process_time() - start
    row = {
        "ranks": ranks.size,
        "rank": ranks.rank,
        "tokens_captured": meter.tokens,
        "coefficients_rounded": meter.coefficients,
        **{f"seconds_{step}": round(meter.seconds[step], 2) for step in STEPS},
        "seconds_other": round(total - sum(meter.seconds.values()), 2),
        "seconds": round(total, 2),
    }
    (arguments.folder / f"row-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(row))
    leave_ranks(ranks)


def run(arguments: argparse.Namespace, folder: Path, size: int) -> list[dict[str, Any]]:
    """The rows of a run with so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)]
    environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(own, env={**environment, "RANK": str(rank)}) for rank in range(size)]
    if max([rank.wait() for rank in ranks]):
        raise SystemExit(f"a rank of {size} failed")
    return [json.loads((folder / f"row-{size}-{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--preset", default="framequant-scalar")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        write_model(folder / "model", arguments.shape, arguments.blocks, "cpu", torch.float32)
        for size in arguments.ranks:
            found = run(arguments, folder, size)
            rows += [{"shape": arguments.shape, "preset": arguments.preset, **row} for row in found]
    add_splits(rows)
    for row in rows:
        print(row)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def add_splits(rows: list[dict[str, Any]]) -> None:
    """Add the split of the whole, and of what is shared, to each row; rows of one rank come first."""
    alone = next(row for row in rows if row["ranks"] == 1)
    for row in rows:
        together = [other for other in rows if other["ranks"] == row["ranks"]]
        row["split"] = round(alone["seconds"] / max(other["seconds"] for other in together), 2)
        for step in ("moments", "rows"):
            most = max(other[f"seconds_{step}"] for other in together)
            row[f"split_{step}"] = round(alone[f"seconds_{step}"] / most, 2)
        row["commit"] = commit()


if __name__ == "__main__":
    main()
