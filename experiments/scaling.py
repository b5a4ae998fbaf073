"""Loss against size × bits over models and rates, and the theory's slopes with their predicted lines.

python experiments/scaling.py --quick
python experiments/scaling.py --model HuggingFaceTB/SmolLM2-135M --model HuggingFaceTB/SmolLM2-360M --dtype bfloat16
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from bench import Bench, Record, Row, benches, default_models, parse, parse_row, parser

from framequant.codes.grid import GridKind, GridSpec, gaussian_error
from framequant.frames import build_frame, choose_frame
from framequant.report.results import Plot


def measured(bench: Bench, settings: str) -> Row:
    """Size in memory, quality, and divergence from the float model."""
    config = parse_row(settings)[0]
    model, report, row = bench.quantized(config)
    model = bench.dense(model, config)
    weights = sum(entry.num_weights for entry in report.linears)
    size = {"weights": weights, "megabytes": round(row["bits_per_weight"] * weights / 8e6, 4)}
    return {**row, **size, "divergence": bench.divergence(model), **bench.evaluate(model)}


def noise_rows(dim: int = 1024) -> list[Row]:
    """White noise on unit-norm coefficients: what synthesis leaves, and 1/r."""
    rows = []
    for redundancy in (1.0, 1.125, 1.25, 1.5, 2.0, 3.0, 4.0):
        spec = choose_frame(dim, redundancy, seed=1)
        frame = build_frame(spec)
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(256, spec.num_coefficients, generator=generator, dtype=torch.float64)
        left = frame.synthesis(noise / math.sqrt(spec.redundancy))
        rows.append(
            {
                "check": "white noise",
                "line": "fusion frame",
                "x": spec.redundancy,
                "mse": float(left.square().mean()),
                "predicted": 1 / spec.redundancy,
            }
        )
    return rows


def code_rows() -> list[Row]:
    """Gaussian error of scalar grids at one to four bits, and the rate–distortion bound."""
    grids = {"2σ clip": GridKind.SIGMA_CLIP, "uniform": GridKind.UNIFORM, "Lloyd–Max": GridKind.LLOYD_MAX}
    return [
        {
            "check": "codes",
            "line": name,
            "x": bits,
            "mse": gaussian_error(GridSpec(kind, 2**bits)),
            "predicted": 4.0**-bits,
        }
        for name, kind in grids.items()
        for bits in (1, 2, 3, 4)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    theory = Record(args, "theory")
    for row in [*noise_rows(), *code_rows()]:
        theory.add(**row)
    theory.plots(
        "Theory checks",
        "Measured beside what is predicted. Slopes of Sigma-Delta codes are on their own page.",
        [
            Plot(
                "Noise left by synthesis", "mse", "x", "line", {"check": "white noise"}, log_x=True, log_y=True,
                predicted="predicted", x_title="redundancy r", y_title="noise variance",
                caption="Averaging alone gives 1/r.",
            ),
            Plot(
                "Error of codes for a Gaussian", "mse", "x", "line", {"check": "codes"}, log_y=True,
                predicted="predicted", x_title="bits", y_title="mean squared error / σ²",
                caption="Broken line: the rate–distortion bound 4^-bits.",
            ),
        ],
    )  # fmt: skip
    record = Record(args, "scaling")
    rates = () if args.quick else (1.5, 2.0, 2.5, 3.0, 4.0)
    for bench in benches(args, record, default_models()[1:] if args.quick else None):
        for bits in rates:
            settings = f"framequant:bits={bits},allocation=uniform"
            known = {"model": bench.name, "method": f"trellis:{bits:g} bits", "settings": settings}
            record.attempt(lambda b=bench, s=settings: measured(b, s), **known)
        for bits in (2, 3, 4):
            settings = f"framequant-paper:redundancy=1.0,bits={bits}"
            known = {"model": bench.name, "method": f"FrameQuant, r = 1:{bits} bits", "settings": settings}
            record.attempt(lambda b=bench, s=settings: measured(b, s), **known)
    text = (
        "Divergence from the float model (language and vision: KL in nats; sentences: 1 − cosine) against the "
        "megabytes of the quantized linears. Models differ in task and family, so lines show slopes and no ranking."
    )
    plots = [
        Plot(
            "Divergence against size",
            "divergence",
            "megabytes",
            "model",
            kind="points",
            log_x=True,
            log_y=True,
        )
    ]
    record.plots("Scaling: loss against size × bits", text, plots)


if __name__ == "__main__":
    main()
