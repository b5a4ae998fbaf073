"""Error over N for orders 0–3 and both duals, against theory: results/slopes.csv.

    python experiments/sigma_delta/slopes.py

Vectors are uniform on the sphere of R^d, the step is that of the norm (so it does not change with N), the frame is
harmonic with d and N even. The slope is that of log rms error over log N. Theory: with states like white noise the
bulk of order ρ leaves N^-(ρ + 1/2). The canonical dual adds boundary terms: none for order 1 (a zero-sum frame with N
even ends in u_N = 0); ``(d/N) ‖e_{N-1} - e_N‖ u_N ~ N^-2`` for order 2, so its slope lies between -2 and -2.5; a term
~ N^-1 for order 3, since the second difference of its states does not end in zero. Memoryless codes of coefficients
far below a step are not white: at a step of the norm PCM does not fall with N at all; it is in the table as such.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Table

from framequant.frames import DualStage, HarmonicFrame
from framequant.quantizers.sigma_delta import SigmaDelta

RATIOS = (6, 8, 12, 16, 24, 32, 48, 64)
#: (order, levels, dual) and the slope of theory; None where it lies between two.
CASES = {
    (0, 8, "canonical"): None,
    (1, 2, "canonical"): -1.5,
    (1, 2, "sobolev"): -1.5,
    (1, 8, "canonical"): -1.5,
    (1, 8, "sobolev"): -1.5,
    (2, 4, "canonical"): None,
    (2, 4, "sobolev"): -2.5,
    (3, 8, "canonical"): -1.0,
    (3, 8, "sobolev"): -3.5,
}


def rms_errors(dim: int, order: int, levels: int, dual: str, vectors: int, seed: int) -> list[float]:
    """Root-mean-square ‖x - x̂‖ at each ratio of ``RATIOS``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(vectors, dim, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    quantizer = SigmaDelta(order, levels, "norm", dual)
    found = []
    for ratio in RATIOS:
        stage = DualStage(HarmonicFrame(dim, ratio * dim), quantizer.dual_order)
        found.append(float(quantizer.quantize(x, stage).errors.square().mean().sqrt()))
    return found


def slope(errors: list[float]) -> float:
    """Slope of log error over log N by least squares."""
    return float(np.polyfit(np.log(RATIOS), np.log(errors), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--vectors", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "slopes.csv")
    arguments = parser.parse_args()
    columns = ("dim", "order", "levels", "dual", "seed", "slope", "theory", *(f"rms_{r}" for r in RATIOS))
    table = Table(arguments.csv, columns)
    for dim in arguments.dims:
        for (order, levels, dual), theory in CASES.items():
            errors = rms_errors(dim, order, levels, dual, arguments.vectors, arguments.seed)
            expected = "" if theory is None else theory
            table.add(dim, order, levels, dual, arguments.seed, slope(errors), expected, *errors)


if __name__ == "__main__":
    main()
