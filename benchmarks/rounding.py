"""Seconds of LDLQ and of one sweep of refinement, for each backend: a table, and a CSV with ``--csv``.

    python benchmarks/rounding.py --device cuda --csv benchmarks/rounding_h100.csv
    python benchmarks/rounding.py --device cpu --shapes 960x648 576x1728

``torch`` is the plain path; the last column counts codes that differ from its. Coefficients are Gaussian,
the inputs correlated, the code has two bits. Figures are the best of several runs after one that compiles.
``--rows 2 4 8`` compares numbers of rows a warp of the Triton kernel.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from pathlib import Path

import torch
from measure import best_seconds, commit

from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import damped, feedback_factor
from framequant.quantizers.refine import refine_codes
from framequant.quantizers.rounding import proxy_loss, round_ldlq

COLUMNS = (
    "rows", "columns", "grid", "backend", "ldlq_seconds", "sweep_seconds",
    "sweep_loss", "codes_that_differ", "device", "commit",
)  # fmt: skip
SHAPES = ("960x648", "3072x648", "576x1728", "4096x4608")
GRIDS = {
    "sigma_clip": GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    "lloyd_max": GridSpec(GridKind.LLOYD_MAX, 4, ZeroPoint.SYMMETRIC),
    "group_64": GridSpec(GridKind.MIN_MAX, 16, ZeroPoint.INTEGER, group_size=64),
}


def problem(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian coefficients and the damped Hessian of inputs whose spectrum falls over three decades."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator).to(device, torch.float64)
    mixing *= torch.logspace(0, -1.5, columns, dtype=torch.float64, device=device)
    coefficients = torch.randn(rows, columns, generator=generator).to(device, torch.float64)
    return coefficients, damped(mixing @ mixing.T, 0.01)


def measure(
    rows: int, columns: int, grid: str, backends: list[tuple[str, int | None]], device: str, repeats: int
) -> list[tuple[object, ...]]:
    cuda, found, reference = device != "cpu", [], None
    coefficients, hessian = problem(rows, columns, device)
    upper = feedback_factor(hessian, 0).upper
    for backend, rows_a_warp in backends:
        name = backend if rows_a_warp is None else f"{backend}-{rows_a_warp}"
        if rows_a_warp is not None:
            from framequant.kernels import feedback_triton

            feedback_triton.ROWS = rows_a_warp
        coder = ScalarCoder([coefficients], GRIDS[grid], backend)
        times = repeats if backend != "torch" else 1
        seconds = best_seconds(lambda coder=coder: round_ldlq(coefficients, upper, coder), cuda, times)
        rounded = round_ldlq(coefficients, upper, coder)
        sweep = best_seconds(
            lambda coder=coder, rounded=rounded: refine_codes(coefficients, rounded, hessian, coder, 1),
            cuda,
            times,
        )
        refined = refine_codes(coefficients, rounded, hessian, coder, 1)
        losses = [proxy_loss(values - coefficients, hessian) for values in (refined, rounded)]
        reference = rounded if reference is None else reference
        differ = int((rounded != reference).sum())
        found.append(
            (
                rows,
                columns,
                grid,
                name,
                f"{seconds:.4f}",
                f"{sweep:.4f}",
                f"{losses[0] / losses[1]:.4f}",
                differ,
            )
        )
        print(" ".join(f"{value!s:>17}" for value in found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--grids", nargs="+", default=["sigma_clip"], choices=GRIDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[], help="rows a warp, instead of the default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-torch", action="store_true", help="compare with the first fast backend")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    cuda = arguments.device != "cpu"
    fast = [("triton", rows) for rows in arguments.rows or [None]] if cuda else [("cpu", None)]
    backends = fast if arguments.without_torch else [("torch", None), *fast]
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor()} x{torch.get_num_threads()}"
    print(f"{where}, torch {torch.__version__}" + ("" if cuda else f", load {os.getloadavg()[0]:.1f}"))
    print(" ".join(f"{name:>17}" for name in COLUMNS[:-2]))
    rows = []
    for shape in arguments.shapes:
        for grid in arguments.grids:
            height, width = (int(size) for size in shape.split("x"))
            rows += measure(height, width, grid, backends, arguments.device, arguments.repeats)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((*row, where, commit()) for row in rows)


if __name__ == "__main__":
    main()
