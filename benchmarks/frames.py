"""Two small facts about frames for the documentation: what one looks like, and what error feedback gains by it.

``python benchmarks/frames.py`` writes ``frame_example.csv``, an analysis operator, and ``noise_shaping.csv``: the
relative mean squared error of a Gaussian matrix in its frame at two bits a coefficient, against redundancy: rounded
to nearest, and with errors fed forward. H is the identity, so that feedback gains by redundancy and nothing else.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from framequant.codes.grid import GridKind, GridSpec
from framequant.frames import FrameKind, FrameSpec, FusionFrame, build_frame, choose_frame
from framequant.quantizers.coders import make_coder
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.rounding import round_ldlq, round_nearest

HERE = Path(__file__).parent
DIM, ROWS, SEED, DAMPING = 256, 256, 0, 0.01
REDUNDANCIES = (1.0, 1.0625, 1.125, 1.25, 1.375, 1.5, 1.75)


def error(weight: torch.Tensor, redundancy: float, clip: float, feedback: bool) -> tuple[float, float]:
    """True redundancy and relative squared error of one way."""
    spec = choose_frame(DIM, redundancy, SEED) if redundancy > 1 else FrameSpec(FrameKind.HADAMARD, DIM)
    frame = build_frame(spec)
    coefficients = frame.analysis(weight)
    coder = make_coder([coefficients], GridSpec(kind=GridKind.SIGMA_CLIP, num_levels=4, clip_sigmas=clip))
    if feedback:
        gram = frame.analysis(frame.analysis(torch.eye(DIM, dtype=torch.float64)).T)
        rounded = round_ldlq(coefficients, feedback_factor(gram, DAMPING).upper, coder)
    else:
        rounded = round_nearest(coefficients, coder)
    difference = frame.synthesis(rounded) - weight
    return frame.num_coefficients / DIM, float(difference.square().sum() / weight.square().sum())


def best(weight: torch.Tensor, redundancy: float, feedback: bool) -> dict[str, object]:
    """The grid's range is chosen for each way by itself, so that neither is handicapped by it."""
    tried = [(error(weight, redundancy, clip / 20, feedback), clip / 20) for clip in range(24, 61, 2)]
    (true, value), clip = min(tried, key=lambda entry: entry[0][1])
    way = "fed forward" if feedback else "nearest"
    return {
        "rounding": way,
        "redundancy": true,
        "bits": 2 * true,
        "relative_error": round(value, 5),
        "clip": clip,
    }


def write(name: str, rows: list[dict[str, object]]) -> None:
    with (HERE / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    write("noise_shaping.csv", [best(weight, r, way) for way in (False, True) for r in REDUNDANCIES])
    frame = FusionFrame(20, 6, 4)
    matrix = frame.analysis(torch.eye(20, dtype=torch.float64)).T
    rows = [{f"x{j}": round(float(value), 4) for j, value in enumerate(row)} for row in matrix]
    write("frame_example.csv", rows)


if __name__ == "__main__":
    main()
