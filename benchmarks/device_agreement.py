"""Quantize one model on the CPU and on CUDA with the same seed and count the codes that agree.

    python benchmarks/device_agreement.py MODEL --calibration PATH --samples 32 [--dtype float64] [--csv FILE]

The whole walk is run on each device. A code that differs changes the activations of every later linear, so in
float32 agreement falls with depth; rounding itself is float64, and with ``--dtype float64`` all of the walk is.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import commit

import framequant as fq
from framequant.cli.console import Reporter
from framequant.cli.inputs import calibration_tensor, find_calibration
from framequant.codes.packing import unpack_codes
from framequant.integrations.sources import open_model
from framequant.model.walk import quantized_linears


def codes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: unpack_codes(
            layer.packed_codes.cpu(), layer.spec.code.num_levels, layer.spec.coefficient_shape[1]
        )
        for name, layer in quantized_linears(model).items()
    }


def main(
    model: str,
    calibration: Annotated[Path, typer.Option()],
    samples: int = 32,
    sequence_length: int = 512,
    dtype: str = "float32",
    preset: str = "framequant-scalar",
    csv_file: Annotated[Path | None, typer.Option("--csv")] = None,
) -> None:
    found, seconds = {}, {}
    for device in ("cpu", "cuda"):
        opened = open_model(model, dtype="float32", device=device)
        source = find_calibration(str(calibration))
        batches = calibration_tensor(source, opened, samples, sequence_length, 0, Reporter(False))
        start = time.perf_counter()
        fq.quantize_(opened.model, batches, fq.preset(preset, walk_dtype=dtype))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[device] = time.perf_counter() - start
        found[device] = codes(opened.model)
    equal = sum(int((found["cpu"][name] == found["cuda"][name]).sum()) for name in found["cpu"])
    total = sum(values.numel() for values in found["cpu"].values())
    worst = min((found["cpu"][name] == found["cuda"][name]).float().mean().item() for name in found["cpu"])
    row = {
        "model": model,
        "preset": preset,
        "dtype": dtype,
        "samples": samples,
        "equal_codes": f"{equal / total:.6f}",
        "worst_linear": f"{worst:.6f}",
        "cpu_seconds": f"{seconds['cpu']:.1f}",
        "cuda_seconds": f"{seconds['cuda']:.1f}",
        "device": torch.cuda.get_device_name(),
        "commit": commit(),
    }
    print(row)
    if csv_file:
        new = not csv_file.exists()
        with csv_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    typer.run(main)
