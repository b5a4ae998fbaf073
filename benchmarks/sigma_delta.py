"""Seconds to quantize a matrix by Sigma-Delta, on the CPU and, where there is one, on the GPU: a table and a CSV.

    python benchmarks/sigma_delta.py --csv benchmarks/sigma_delta_h100.csv       # both devices
    python benchmarks/sigma_delta.py --devices cpu --csv benchmarks/sigma_delta_cpu.csv

A row is one setting for a Gaussian matrix of ``--size`` rows and columns at ``--ratio`` N/d: from the float weight on
the device to packed codes and scales, the errors measured. ``cpu_seconds`` are those of all threads of this process:
on a machine that others use (see ``load``), they say what one idle core would take. ``stable`` is one pass of the
recursion, ``mse`` tries several steps (the preset), ``flips`` adds twenty passes of the post-pass. The first run
compiles and is not counted.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from pathlib import Path

import torch
from measure import commit

from framequant.codes.packing import pack_codes
from framequant.frames import DualStage, HarmonicFrame, frame_size
from framequant.quantizers.sigma_delta import SigmaDelta

COLUMNS = (
    "size", "ratio", "setting", "seconds", "cpu_seconds", "relative_error", "bits", "device", "torch", "load", "commit",
)  # fmt: skip
SETTINGS = {
    "stable": SigmaDelta(step="stable"),
    "mse": SigmaDelta(),
    "order 2, 4 levels": SigmaDelta(2, 4),
    "flips": SigmaDelta(passes=20),
}


def quantize(weight: torch.Tensor, stage: DualStage, quantizer: SigmaDelta) -> tuple[float, float]:
    """Relative squared error and bits per weight."""
    found = quantizer.quantize(weight, stage)
    packed = pack_codes(found.codes, quantizer.levels)
    error = float(found.errors.square().sum() / weight.double().square().sum())
    return error, 8 * (packed.numel() + 2 * found.scales.numel()) / weight.numel()


def measure(size: int, ratio: float, name: str, device: str, repeats: int) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(device)
    stage = DualStage(HarmonicFrame(size, frame_size(size, ratio), seed=1))
    quantize(weight[:64], stage, SETTINGS[name])  # compiles
    seconds, used, load = [], [], os.getloadavg()[0]
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start, start_used = time.perf_counter(), time.process_time()
        error, bits = quantize(weight, stage, SETTINGS[name])  # reads a number back, so it is complete
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - start_used)
    where = torch.cuda.get_device_name() if device != "cpu" else f"{_cpu()} x{torch.get_num_threads()}"
    times = f"{min(seconds):.3f}", f"{min(used):.3f}"
    return (
        size,
        ratio,
        name,
        *times,
        f"{error:.3e}",
        f"{bits:.4f}",
        where,
        torch.__version__,
        f"{load:.1f}",
        commit(),
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument(
        "--devices", nargs="+", default=["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    )
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    rows = []
    for device in arguments.devices:
        for name in arguments.settings:
            if device == "cpu" and name == "flips" and arguments.size > 2048 and len(arguments.settings) > 1:
                continue  # minutes; ask for it alone
            rows.append(measure(arguments.size, arguments.ratio, name, device, 1 if device == "cpu" else 3))
            print(" | ".join(map(str, rows[-1])), flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
