"""A linear with trellis codes of one and of two weights a state on one CPU thread, in turns.

PYTHONPATH=. python benchmarks/cpu_trellis.py --csv benchmarks/cpu_trellis.csv
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import torch
from measure import commit
from tests.kernels.test_cpu import make_layer

from framequant.codes.trellis import PAIR_ID, TrellisSpec

CODES = {"one": TrellisSpec(12, (2,)), "two": TrellisSpec(16, (4,), codebook=PAIR_ID)}
SHAPES = ((576, 576), (576, 1536), (1536, 576), (1536, 1536))


def medians(shape: tuple[int, int], tokens: int, turns: int) -> dict[str, float]:
    """Microseconds of a linear of ``shape`` (inputs, outputs), by weights of a state."""
    layers = {name: make_layer(code, shape, (1.0, 1.0), bias=False, block=32) for name, code in CODES.items()}
    x = torch.randn(tokens, shape[0], dtype=torch.bfloat16)
    found: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(turns + 1):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x)
            if turn:  # the first one compiles
                found[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[object, ...]] = [("inputs", "outputs", "tokens", "one", "two", "ratio", "cpu", "commit")]
    for shape in SHAPES:
        took = medians(shape, 1, options.turns)
        ratio = round(took["one"] / took["two"], 2)
        rows.append(
            (*shape, 1, round(took["one"], 1), round(took["two"], 1), ratio, platform.machine(), commit())
        )
        print(*rows[-1])
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
