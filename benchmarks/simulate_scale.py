"""Past the machines at hand: a 405B model and a mixture of a trillion parameters on 1 to 64 GPUs, by a cost model.

``python benchmarks/simulate_scale.py --csv benchmarks/scale.csv``

Reads every ``benchmarks/*.csv`` with the columns of ``benchmarks/load_test.py`` (``shape, blocks, blocks_measured,
samples, tokens, ranks, seconds, seconds_first_block, seconds_per_block, block_read, block_capture, block_round,
block_write``, one device ``cuda``) and fits rates to runs of some blocks of a 70B- and a 7B-shaped model, the last of
each; a whole 7B-shaped run must then be predicted within 20 %, else the exit code is 1. Without such rows the rate
of rounding comes from ``benchmarks/rounding_h100.csv``, the others are assumed, and the output says so.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from benchmarks.scale_model import (  # noqa: E402
    MODELS,
    WEIGHT_BYTES,
    Efficiency,
    Machine,
    Model,
    Run,
    block_cost,
    block_weights,
    features,
    memory,
    run_cost,
)

DEVICES = (1, 2, 4, 8, 16, 32, 64)
TOLERANCE = 0.2
STEPS = ("read", "capture", "round", "write")
NEEDED = {
    *("shape", "blocks", "blocks_measured", "samples", "tokens", "ranks", "seconds"),
    *("seconds_first_block", "seconds_per_block"),
    *(f"block_{step}" for step in STEPS),
}


def measured(folder: Path) -> list[dict[str, str]]:
    """Rows of runs on one GPU, of the shapes known here."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and set(rows[0]) >= NEEDED:
            found += [row for row in rows if row["shape"] in MODELS and "H100" in row.get("device", "")]
    return [row for row in found if int(row["ranks"]) == 1 and all(row[column] for column in NEEDED)]


def of_blocks(model: Model, count: int) -> Model:
    """The model with so many blocks only."""
    return replace(model, blocks=((count, model.blocks[0][1]),))


def fit(rows: Sequence[dict[str, str]], run: Run, machine: Machine) -> tuple[Machine, Efficiency]:
    """Efficiencies, disk rate and start with which the model gives the rows' seconds; the last one's start and disk.

    Two rows of different shapes tell operations from what grows with features or columns; one is all operations.
    """
    work: dict[str, list[tuple[float, float, float]]] = {"capture": [], "round": [], "forward": []}
    for row in rows:
        model = MODELS[row["shape"]]
        block = model.blocks[0][1]
        run = replace(run, samples=int(row["samples"]), tokens=int(row["tokens"]))
        ideal = block_cost(model, block, 1, run, machine, Efficiency(1.0, 1.0, 1.0, 1.0)).seconds
        steps = {step: max(float(row[f"block_{step}"]), 1e-3) for step in ("read", "capture", "round")}
        steps["forward"] = max(float(row["seconds_per_block"]) - sum(steps.values()), 1e-3)
        moved = run.count * features(block)
        columns = sum(linear.inputs * linear.count for linear in block) * run.redundancy
        for step, other in (("capture", moved), ("round", columns), ("forward", moved)):
            work[step].append((ideal[step], other, steps[step]))
        machine = replace(
            machine,
            start=max(float(row["seconds_first_block"]) - float(row["seconds_per_block"]), 0.0),
            disk_read=block_weights(block) * WEIGHT_BYTES / steps["read"],
        )
    found = {step: two_rates(measurements) for step, measurements in work.items()}
    return machine, Efficiency(
        capture=1 / found["capture"][0],
        rounding=1 / found["round"][0],
        forward=1 / found["forward"][0],
        capture_feature=found["capture"][1],
        forward_feature=found["forward"][1],
        column=found["round"][1],
    )


def two_rates(measurements: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """a, b ≥ 0 with a·x + b·y = seconds for each measurement (x, y, seconds); b = 0 if there is one, or no such b."""
    if len(measurements) > 1:
        (x, y, s), (u, v, t) = measurements
        determinant = x * v - u * y
        if determinant:
            a, b = (s * v - t * y) / determinant, (x * t - u * s) / determinant
            if a > 0 and b >= 0:
                return a, b
    return sum(s / x for x, _, s in measurements) / len(measurements), 0.0


def rounding_rate(machine: Machine) -> float:
    """Efficiency of rounding from the largest linear of ``rounding_h100.csv``."""
    with (FOLDER / "rounding_h100.csv").open(newline="", encoding="utf-8") as file:
        row = max(csv.DictReader(file), key=lambda row: int(row["rows"]) * int(row["columns"]) ** 2)
    operations = 2.0 * int(row["rows"]) * int(row["columns"]) ** 2 * 3
    seconds = float(row["ldlq_seconds"]) + float(row["sweep_seconds"])
    return operations / seconds / machine.double


def calibrate(rows: list[dict[str, str]], run: Run) -> tuple[Machine, Efficiency, str, bool]:
    """Machine and efficiencies, how they were found, and whether a check that could be made failed."""
    machine = Machine()
    partial = [row for row in rows if int(row["blocks_measured"]) < int(row["blocks"])]
    full = [row for row in rows if row["shape"] == "7b" and row["blocks_measured"] == row["blocks"]]
    if not partial:
        text = (
            "NOT CHECKED against a whole run, and mostly not calibrated: there is no row of measured blocks in "
            "benchmarks/*.csv. Rounding runs at the rate of rounding_h100.csv; the other rates are assumptions."
        )
        return machine, replace(Efficiency(), rounding=rounding_rate(machine)), text, False
    chosen = [last for shape in ("70b", "7b") for last in [r for r in partial if r["shape"] == shape][-1:]]
    machine, efficiency = fit(chosen, run, machine)
    blocks = " and ".join(f"{row['blocks_measured']} of a {row['shape']}-shaped model" for row in chosen)
    text = f"Calibrated on measured blocks, {blocks}"
    if not full:
        return machine, efficiency, f"{text}; NOT CHECKED: there is no whole 7B-shaped run.", False
    error, seconds = whole_run_error(full[-1], run, machine, efficiency)
    verdict = "within" if abs(error) <= TOLERANCE else "OUTSIDE"
    text += (
        f"; checked: the whole 7B-shaped run took {seconds:.0f} s, predicted {(1 + error) * seconds:.0f} s "
    )
    text += f"({error:+.0%}), {verdict} {TOLERANCE:.0%}"
    if len(chosen) > 1:
        alone = whole_run_error(full[-1], run, *fit(chosen[:1], run, Machine()))[0]
        text += f"; blocks of the {chosen[0]['shape']}-shaped model alone predict it to {alone:+.0%}"
    return machine, efficiency, f"{text}.", abs(error) > TOLERANCE


def whole_run_error(
    row: dict[str, str], run: Run, machine: Machine, efficiency: Efficiency
) -> tuple[float, float]:
    """How far the prediction of a whole run is off, as a share of what it took; and that."""
    settings = replace(run, samples=int(row["samples"]), tokens=int(row["tokens"]))
    seconds = float(row["seconds"])
    return run_cost(MODELS[row["shape"]], 1, settings, machine, efficiency).total / seconds - 1, seconds


def table(
    model: Model, run: Run, machine: Machine, efficiency: Efficiency, basis: str
) -> list[dict[str, Any]]:
    """One row for each number of GPUs."""
    rows = []
    alone = run_cost(model, 1, run, machine, efficiency).total
    for devices in DEVICES:
        cost = run_cost(model, devices, run, machine, efficiency)
        need = memory(model, devices, run)
        slowest = max(cost.seconds, key=lambda step: cost.seconds[step])
        rows.append(
            {
                "model": model.name,
                "shared": "whole linears" if run.whole_linears else "rows",
                "gpus": devices,
                "hosts": -(-devices // machine.devices_per_host),
                "hours": round(cost.total / 3600, 2),
                "gpu_hours": round(cost.total / 3600 * devices, 1),
                "speed_up": round(alone / cost.total, 1),
                **{f"{step}_hours": round(value / 3600, 2) for step, value in cost.seconds.items()},
                "slowest": slowest,
                "network_tb": round(cost.network / 1e12, 1),
                "disk_tb": round(cost.disk / 1e12, 2),
                "device_gb": round(need["device"] / 1e9),
                "rounding_gb": round(need["rounding"] / 1e9),
                "host_gb": round(need["host"] / 1e9),
                "fits": "yes" if need["device"] <= machine.device_bytes else "NO",
                "basis": basis,
            }
        )
    return rows


COLUMNS = {
    "shared": "shared out", "gpus": "GPUs", "hosts": "hosts", "hours": "hours", "gpu_hours": "GPU-hours",
    "speed_up": "speed-up",
    "slowest": "slowest step", "network_tb": "network TB", "disk_tb": "disk TB", "device_gb": "device GB",
    "host_gb": "host GB", "fits": "fits 80 GB",
}  # fmt: skip


def markdown(rows: list[dict[str, Any]], note: str) -> str:
    """The tables for the documentation."""
    lines = [f"*{note}*", ""]
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += [f"### {name}", "", "| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
        lines += [
            "| " + " | ".join(str(r[key]) for key in COLUMNS) + " |" for r in rows if r["model"] == name
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=FOLDER, help="folder of CSV files")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    run = Run()
    machine, efficiency, note, failed = calibrate(measured(arguments.measured), run)
    print(note)
    print(efficiency, machine)
    basis = "assumed rates, NOT CHECKED" if note.startswith("NOT") else note.partition("; ")[2].rstrip(".")
    rows = [
        row
        for key, whole in (("405b", False), ("1t", False), ("1t", True))
        for row in table(MODELS[key], replace(run, whole_linears=whole), machine, efficiency, basis)
    ]
    for key in ("7b", "70b", "405b", "1t"):
        model = MODELS[key]
        block = block_cost(model, model.blocks[-1][1], 1, run, machine, efficiency)
        steps = ", ".join(f"{step} {seconds:.2f}" for step, seconds in block.seconds.items())
        print(f"{model.name}: {model.parameters / 1e9:.1f} G parameters; a block on one GPU: {steps} s")
    print(markdown(rows, note))
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
