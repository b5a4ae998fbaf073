"""The figures of docs/sigma-delta.md from the CSV files alone.

python experiments/sigma_delta/plots.py      # needs matplotlib
"""

from __future__ import annotations

import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS, ROOT

FIGURES = ROOT / "docs" / "figures"
plt.rcParams.update(
    {
        "font.size": 8,
        "svg.hashsalt": "framequant",
        "svg.fonttype": "none",
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
)


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def save(figure: plt.Figure, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    path = FIGURES / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path, path.stat().st_size)


def one_bit(row: dict[str, str]) -> bool:
    plain = (row["order"], row["levels"], row["vectors"], row["signs"], row["step"])
    return plain == ("1", "2", "rows", "True", "mse")


SERIES = {
    "plain rounding": ("black", "o", lambda row: row["method"] == "nearest"),
    "FrameQuant (calibrated)": ("tab:green", "s", lambda row: row["method"] == "framequant"),
    "frame PCM, one bit": (
        "tab:gray",
        "x",
        lambda row: row["method"] == "frame PCM" and row["levels"] == "2",
    ),
    "Sigma-Delta, one bit": ("tab:blue", "v", lambda row: one_bit(row) and row["passes"] == "0"),
    "the same, codes flipped": ("tab:red", "^", lambda row: one_bit(row) and row["passes"] == "40"),
}


def mnist(column: str, label: str, name: str, log: bool) -> None:
    rows = read("mnist.csv")
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(2.4 * len(networks), 2.4), sharey=True)
    for axis, network in zip(axes, networks, strict=True):
        for series, (color, marker, choose) in SERIES.items():
            chosen = [row for row in rows if row["network"] == network and choose(row) and row[column]]
            points = sorted((float(row["bits"]), float(row[column])) for row in chosen)
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1, color=color, label=series)
        axis.set(title=network, xlabel="bits per weight", xscale="log", xticks=[1, 2, 4, 8, 16])
        axis.set_xticklabels(["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(90, 99.2)
            axis.axhline(float(chosen[0]["float_test"]) if chosen else 0, color="black", lw=0.5, ls=":")
    axes[0].set_ylabel(label)
    axes[-1].legend(fontsize=6)
    save(figure, name)


def slopes() -> None:
    rows = [row for row in read("slopes.csv") if row["dim"] == "16"]
    figure, axis = plt.subplots(figsize=(4.2, 2.8))
    for row in rows:
        ratios = [int(key.removeprefix("rms_")) for key in row if key.startswith("rms_")]
        errors = [float(row[f"rms_{ratio}"]) for ratio in ratios]
        style = "--" if row["dual"] == "canonical" else "-"
        label = f"order {row['order']}, {row['levels']} levels, {row['dual']}: {float(row['slope']):.2f}"
        axis.plot(ratios, errors, style, marker=".", ms=3, lw=1, color=f"C{row['order']}", label=label)
    axis.set(xscale="log", yscale="log", xlabel="N/d", ylabel="rms error (d = 16, unit vectors)")
    axis.set_xticks([6, 12, 24, 48], ["6", "12", "24", "48"])
    axis.minorticks_off()
    axis.legend(fontsize=5)
    save(figure, "sigma_delta_slopes")


def main() -> None:
    mnist("test", "MNIST test accuracy, %", "sigma_delta_mnist", log=False)
    mnist("weight_error", "relative squared weight error", "sigma_delta_weights", log=True)
    slopes()


if __name__ == "__main__":
    main()
