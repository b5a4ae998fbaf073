"""The tables of docs/sigma-delta.md from the CSV files alone.

python experiments/sigma_delta/tables.py            # prints them
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from common import RESULTS, ROOT

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_plain(row: Row) -> bool:
    return (row["vectors"], row["signs"], row["step"]) == ("rows", "True", "mse")


def published(row: Row) -> bool:
    return (row["vectors"], row["signs"], row["step"]) == ("columns", "False", "stable")


#: Columns of the MNIST table: one-bit codes at a ratio, or what stands beside them.
KINDS: dict[str, Callable[[Row], bool]] = {
    "plain rounding": lambda r: r["method"] == "nearest",
    "frame PCM": lambda r: r["method"] == "frame PCM" and r["levels"] == "2",
    "as published": lambda r: r["method"] == "sigma-delta" and published(r),
    "preset": lambda r: r["method"] == "sigma-delta" and is_plain(r) and r["passes"] == "0",
    "preset, flips": lambda r: r["method"] == "sigma-delta" and is_plain(r) and r["passes"] == "40",
}


def first_order(row: Row) -> bool:
    return row["method"] != "sigma-delta" or (row["order"], row["levels"]) == ("1", "2")


def find(rows: list[Row], network: str, kind: str, ratio: str, column: str) -> str:
    for row in rows:
        chosen = row["network"] == network and row["seed"] == "0" and row["ratio"] == ratio
        if chosen and KINDS[kind](row) and first_order(row):
            return row[column]
    return ""


def three_layers(rows: list[Row]) -> str:
    lines = []
    for ratio in ("1.5", "2", "3", "4", "6", "8", "12", "16"):
        line = [ratio, find(rows, "three layers", "preset", ratio, "bits")]
        for kind in KINDS:
            test = find(rows, "three layers", kind, ratio, "test")
            error = find(rows, "three layers", kind, ratio, "weight_error")
            line.append(f"{float(test):.2f} ({float(error):.2g})" if test else "")
        lines.append(line)
    calibrated = [r for r in rows if r["network"] == "three layers" and r["method"] == "framequant"]
    text = markdown(["N/d", "bits", *(f"{kind} (weight error)" for kind in KINDS)], lines)
    figures = "; ".join(f"{float(r['test']):.2f} at {float(r['bits']):.2f} bits" for r in calibrated)
    return f"{text}\n\nFrameQuant, 1024 calibration images: {figures}."


def all_networks(rows: list[Row]) -> str:
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        line = [network]
        for kind in ("as published", "preset", "preset, flips"):
            own = [r for r in rows if r["network"] == network and KINDS[kind](r) and first_order(r)]
            best = max(own, key=lambda r: (float(r["validation"]), -float(r["ratio"])))
            drop = float(best["float_test"]) - float(best["test"])
            line.append(
                f"{float(best['test']):.2f} ({-drop:+.2f}), {best['ratio']}, {float(best['bits']):.2f} bits"
            )
        lines.append([*line[:1], f"{float(own[0]['float_test']):.2f}", *line[1:]])
    head = (
        "network",
        "float",
        *(f"{k}: test (change), N/d, bits" for k in ("as published", "preset", "preset, flips")),
    )
    return markdown(head, lines)


def deit(rows: list[Row]) -> str:
    head = ("method", "levels", "N/d", "flip passes", "bits", "relative weight error", "top-1", "top-5")
    keys = ("method", "levels", "ratio", "passes", "bits", "weight_error")
    return markdown(
        head,
        [[*(row[k] for k in keys), f"{float(row['top1']):.1f}", f"{float(row['top5']):.1f}"] for row in rows],
    )


def slopes(rows: list[Row]) -> str:
    chosen = [row for row in rows if row["dim"] == "16"]
    head = ("order", "levels", "dual", "slope", "theory")
    return markdown(
        head,
        [
            [row["order"], row["levels"], row["dual"], f"{float(row['slope']):.3f}", row["theory"]]
            for row in chosen
        ],
    )


def speed() -> str:
    rows = [row for path in sorted((ROOT / "benchmarks").glob("sigma_delta_*.csv")) for row in read(path)]
    keys = ("setting", "seconds", "cpu_seconds", "relative_error", "bits", "load", "device")
    return markdown(keys, [[row.get(key, "") for key in keys] for row in rows])


def main() -> None:
    rows = read(RESULTS / "mnist.csv")
    for name, table in {
        "three layers": three_layers(rows),
        "all networks": all_networks(rows),
        "DeiT-Tiny": deit(read(RESULTS / "deit_tiny.csv")),
        "slopes": slopes(read(RESULTS / "slopes.csv")),
        "speed": speed(),
    }.items():
        print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    main()
