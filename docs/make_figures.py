"""The figures of the documentation, drawn from CSV files of this repository: ``make figures``.

Reads ``benchmarks`` and ``experiments/results``; writes small SVG files, the same bytes for the same data.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
plt.rcParams.update(
    {"svg.hashsalt": "framequant", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def read(file: str) -> list[dict[str, str]]:
    """Rows of a CSV of this repository."""
    with (ROOT / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def save(figure: plt.Figure, name: str) -> None:
    """Write one SVG without a date in it."""
    figure.tight_layout()
    figure.savefig(HERE / "figures" / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def frame() -> None:
    """An analysis operator of a tight fusion frame beside its Gram matrices."""
    matrix = np.array(
        [[float(value) for value in row.values()] for row in read("benchmarks/frame_example.csv")]
    )
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), width_ratios=(20, 20, 24))
    for axis, values, title in zip(
        axes,
        (matrix, matrix.T @ matrix, matrix @ matrix.T),
        ("T (24 × 20)", "TᵀT = I", "T Tᵀ, a projection"),
        strict=True,
    ):
        axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    for row in range(4, 24, 4):
        axes[0].axhline(row - 0.5, color="black", linewidth=0.5)
    save(figure, "frame")


def noise_shaping() -> None:
    """Error against redundancy, with and without feedback."""
    rows = read("benchmarks/noise_shaping.csv")
    figure, axis = plt.subplots(figsize=(4.8, 3))
    for way, marker in (("nearest", "o"), ("fed forward", "s")):
        points = [(float(r["redundancy"]), float(r["relative_error"])) for r in rows if r["rounding"] == way]
        axis.plot(*zip(*points, strict=True), marker=marker, label=way)
    first = next(float(r["relative_error"]) for r in rows if r["rounding"] == "nearest")
    grid = np.linspace(1, 1.75)
    axis.plot(grid, first / grid, "--", color="grey", label="1/r")
    axis.plot(grid, 2.0 ** (-4 * grid), ":", color="black", label="rate–distortion bound")
    axis.set(xlabel="redundancy r (2 r bits per weight)", ylabel="relative squared error", yscale="log")
    axis.legend(frameon=False)
    save(figure, "noise_shaping")


def codes() -> None:
    """What codes leave of a unit Gaussian at two bits."""
    rows = [row for row in read("benchmarks/codebook.csv") if float(row["rate"]) == 2.0]
    figure, axis = plt.subplots(figsize=(4.8, 3))
    states = [int(row["state_bits"]) for row in rows]
    axis.plot(
        states, [float(row["computed"]) for row in rows], marker="o", label="trellis, computed codebook"
    )
    axis.plot(states, [float(row["random"]) for row in rows], marker="x", label="trellis, random codebook")
    axis.axhline(float(rows[0]["bound"]), color="black", linestyle=":", label="rate–distortion bound")
    axis.set(xlabel="state bits", ylabel="mean squared error at 2 bits")
    axis.legend(frameon=False)
    save(figure, "codes")


#: Colour and marker of every preset and its variants.
LOOKS = {
    "framequant": "o",
    "framequant-scalar": "s",
    "framequant-paper": "D",
    "quip": "^",
    "gptq": "v",
    "rtn": "X",
}


def quality() -> None:
    """Quality against measured bits, of every row of the tables."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
    panels = (
        (left, ["main_smollm2"], "ratio"),
        (right, ["main_deit_tiny", "deit_tiny_trellis"], "top1"),
    )
    for axis, files, key in panels:
        for row in (row for file in files for row in read(f"experiments/results/{file}.csv")):
            preset, _, variant = row["row"].partition(":")
            if preset == "float":
                continue
            index = list(LOOKS).index(preset)
            hollow = "clip_coefficients" in variant
            axis.plot(
                float(row["bits_per_weight"]),
                float(row[key]),
                LOOKS[preset],
                color=f"C{index}",
                fillstyle="none" if hollow else "full",
                markersize=6,
            )
        axis.margins(x=0.1)
        axis.set_xlabel("measured bits per weight")
    left.set(yscale="log", ylabel="perplexity ÷ float", title="SmolLM2-135M")
    top1 = next(
        float(row["top1"]) for row in read("experiments/results/main_deit_tiny.csv") if row["row"] == "float"
    )
    right.axhline(top1, color="black", linestyle=":")
    right.set(ylabel="top-1, %", title="DeiT-Tiny (float dotted)")
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=f"C{index}", label=name)
        for index, (name, marker) in enumerate(LOOKS.items())
    ]
    handles.append(
        plt.Line2D([], [], linestyle="", marker="D", fillstyle="none", color="C2", label="… clamped")
    )
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=4, frameon=False)
    save(figure, "quality")


if __name__ == "__main__":
    for draw in (frame, noise_shaping, codes, quality):
        draw()
