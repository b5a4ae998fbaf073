"""Denoising after quantization: where a Wiener filter, a row gain and consistent reconstruction help, and where not.

    python experiments/denoising.py --quick

Two tables: ``denoising_theory``, vectors beside closed forms, and ``denoising``, models with the setting ``denoise``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bench import Record, Row, benches, parse, parse_row, parser, quality_column, shared

from framequant.codes.grid import GridKind, GridSpec, decode, encode, fit_grid
from framequant.quantizers.denoise import consistent_reconstruction, wiener_gains
from framequant.report.results import Plot

GRIDS = {
    "Lloyd–Max (centroids)": ("lloyd_max", 2.0),
    "uniform, least error": ("uniform", 2.0),
    "2σ clip": ("sigma_clip", 2.0),
    "3σ clip": ("sigma_clip", 3.0),
    "min–max": ("min_max", 2.0),
}
BASE = "framequant-paper:two_sided=false,redundancy=1.125"


def on_a_grid(kind: str, clip: float) -> Row:
    """Two-bit codes of Gaussian rows, shrunk by the Wiener gain: measured, and as if noise was uncorrelated."""
    values = torch.randn(64, 16384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = fit_grid(values, GridSpec(GridKind(kind), 4, clip_sigmas=clip))
    rounded = decode(encode(values, grid), grid, dtype=torch.float64)
    gains = wiener_gains(values, rounded)[:, None]
    plain = float((rounded - values).square().mean())
    filtered = float((gains * rounded - values).square().mean())
    return {"mse": plain, "filtered": filtered, "predicted": plain / (1 + plain), "helps": filtered < plain}


class RandomTightFrame(torch.nn.Module):
    """A Parseval frame of random vectors: analysis is a matrix with orthonormal columns."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(size)
        self.matrix = torch.linalg.qr(torch.randn(size, dim, generator=generator, dtype=torch.float64))[0]

    def analysis(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors @ self.matrix.T

    def synthesis(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients @ self.matrix


def consistent(ratio: float, iterations: int, dim: int = 24) -> list[Row]:
    """Error of linear and of consistent reconstruction from a fixed step per unit-norm frame vector."""
    frame = RandomTightFrame(dim, round(ratio * dim))
    vectors = torch.randn(400, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = frame.analysis(vectors)
    step = 1.0 / ratio**0.5  # unit-norm scaling: coefficients of the Parseval frame are smaller by √r
    low = (exact / step).floor() * step
    middle = low + step / 2
    found = consistent_reconstruction(frame, low, low + step, middle, iterations)  # type: ignore[arg-type]
    errors = {"linear": frame.synthesis(middle), "consistent": found}
    return [
        {
            "case": "consistent reconstruction",
            "line": name,
            "x": ratio,
            "mse": float((value - vectors).square().mean()),
            "predicted": 1 / 12 / ratio if name == "linear" else None,
        }
        for name, value in errors.items()
    ]


def theory(args: object) -> None:
    record = Record(args, "denoising_theory")  # type: ignore[arg-type]
    for name, (kind, clip) in GRIDS.items():
        found = on_a_grid(kind, clip)
        record.add(case="grid", line="plain", x=name, mse=found["mse"])
        record.add(
            case="grid", line="Wiener gain", x=name, mse=found["filtered"], predicted=found["predicted"],
            helps=found["helps"],
        )  # fmt: skip
    for ratio in (1.25, 1.5, 2, 4, 8, 16):
        for row in consistent(ratio, 300):
            record.add(**row)
    plots = [
        Plot(
            "Wiener gain on two-bit grids", "mse", "x", "line", {"case": "grid"}, "bars",
            y_title="mean squared error / σ²",
            caption="Shrinkage takes the noise for uncorrelated with the signal; on centroids it is not, and it hurts.",
        ),
        Plot(
            "Consistent reconstruction", "mse", "x", "line", {"case": "consistent reconstruction"}, log_x=True,
            log_y=True, predicted="predicted", x_title="redundancy r", y_title="mean squared error / step²",
            caption="Independent rounding. Where errors are fed forward, cells say nothing.",
        ),
    ]  # fmt: skip
    record.plots("Denoising: closed forms", "Vectors of Gaussian entries.", plots)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    theory(args)
    record = Record(args, "denoising")
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    grids = {
        "2σ clip": "clip_sigmas=2.0",
        "3σ clip": "clip_sigmas=3.0",
        "min–max": "grid=min_max",
        "Lloyd–Max": "grid=lloyd_max",
    }
    for bench in benches(args, record, [deit] if args.quick else [deit, "smollm2"]):
        for name, grid in list(grids.items())[:: 2 if args.quick else 1]:
            for rounding in ("ldlq",) if args.quick else ("ldlq", "nearest"):
                for kind in ("none", "wiener", "gain"):
                    settings = f"{BASE},{grid},rounding={rounding},denoise={kind}"
                    known = {
                        "model": bench.name,
                        "method": f"{kind}:{name}, {rounding}",
                        "grid": name,
                        "rounding": rounding,
                        "denoise": kind,
                    }
                    record.attempt(
                        lambda b=bench, s=settings: b.row(parse_row(s)[0]), **known, settings=settings
                    )
    describe(record)


def describe(record: Record) -> None:
    plots = []
    for model in dict.fromkeys(row["model"] for row in record.table if "denoise" in row):
        rows = [row for row in record.table if row.get("model") == model]
        where = {"model": model, "rounding": "ldlq"}
        best = quality_column(rows)
        for title, column in (("Loss of the layers", "mean_relative_loss"), ("Quality", best)):
            if column is not None and any(column in row for row in rows):
                log = column == "perplexity"
                plots.append(Plot(f"{title}, {model}", column, "grid", "denoise", where, "bars", log_y=log))
    record.plots(
        "Denoising on models",
        "Scales multiplied by a factor per row; the measured bits do not change.",
        plots,
    )


if __name__ == "__main__":
    main()
