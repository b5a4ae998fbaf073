"""MNIST: accuracy over N/d and levels, beside plain rounding and frame PCM at equal bits, and FrameQuant.

    python experiments/sigma_delta/mnist.py                       # every network, one seed: results/mnist.csv
    python experiments/sigma_delta/mnist.py --networks "three layers" --seeds 0 1 2

Networks are trained on 50 000 images; the other 10 000 of the training set are the validation set, on which N/d is
chosen; test accuracy is only printed beside. ``bits`` are measured from the stored bytes of weights and biases over
the number of weights. ``nearest`` rounds the rows of each linear to as many levels as the bits of its codes and
scales in the Sigma-Delta row above pay for, biases in float; its ``ratio`` is that row's. FrameQuant is calibrated on
1024 training images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import NETWORKS, RESULTS, Table, accuracy, mnist, nearest_twin, train
from torch import nn

import framequant as fq

COLUMNS = (
    "network", "seed", "method", "order", "levels", "dual", "vectors", "signs", "step", "passes", "ratio", "bits",
    "weight_error", "overloads", "bound_vacuous", "validation", "test", "float_validation", "float_test",
)  # fmt: skip


def settings(quick: bool) -> Iterator[dict[str, Any]]:
    """What is tried; every entry is a change of the preset."""
    for ratio in (2, 4, 8, 16) if quick else (1.5, 2, 3, 4, 6, 8, 12, 16):
        yield {"frame_size_ratio": ratio}
        yield {"frame_size_ratio": ratio, "flip_passes": 40}
    if quick:
        return
    for ratio in (2, 4, 8, 16):  # the paper's form, and with one thing more or less
        yield {"frame_size_ratio": ratio, "vectors": "columns", "random_signs": False, "step": "stable"}
        yield {"frame_size_ratio": ratio, "vectors": "columns", "random_signs": False}
    for ratio in (4, 8):
        yield {"frame_size_ratio": ratio, "vectors": "columns"}
        yield {"frame_size_ratio": ratio, "random_signs": False}
    for levels, ratios in ((4, (1.5, 2, 4)), (16, (1.5, 2))):
        for ratio in ratios:
            yield {"levels": levels, "frame_size_ratio": ratio}
            yield {"levels": levels, "frame_size_ratio": ratio, "flip_passes": 40}
    for order, levels, ratios in ((2, 4, (2, 4, 8)), (3, 8, (2, 4))):
        for ratio in ratios:
            for dual in ("canonical", "sobolev"):
                yield {"order": order, "levels": levels, "frame_size_ratio": ratio, "dual": dual}
    for levels, ratios in ((2, (2, 4, 8, 16)), (4, (2, 4))):
        for ratio in ratios:
            yield {"order": 0, "levels": levels, "frame_size_ratio": ratio}


def run_network(name: str, seed: int, quick: bool, table: Table) -> None:
    data = mnist()
    model = train(name, seed, data)
    reference = [accuracy(model, data["validation"]), accuracy(model, data["test"])]
    table.add(name, seed, "float", *[""] * 8, 32.0, 0.0, "", "", *reference, *reference)
    budgets: set[float] = set()
    for changes in settings(quick):
        config = fq.preset("sigma-delta", **changes)
        quantized = copy.deepcopy(model)
        report = fq.quantize_(quantized, config=config)
        error = sum(entry.proxy_loss for entry in report.linears) / _energy(model)
        overloads = sum(entry.details["overloads"] for entry in report.linears)
        found = [accuracy(quantized, data[part]) for part in ("validation", "test")]
        table.add(
            name, seed, "sigma-delta" if config.order else "frame PCM", config.order, config.levels,
            config.dual.value, config.vectors.value, config.random_signs,
            str(getattr(config.step, "value", config.step)), config.flip_passes,
            config.frame_size_ratio, report.bits_per_weight, error, overloads,
            report.bounds.get("a_posteriori", {}).get("vacuous", ""), *found, *reference,
        )  # fmt: skip
        if round(report.bits_per_weight, 2) not in budgets:
            budgets.add(round(report.bits_per_weight, 2))
            _nearest(name, seed, model, report, data, reference, table)
    _framequant(name, seed, model, data, reference, table)


def _energy(model: nn.Module) -> float:
    return sum(
        float(m.weight.detach().double().square().sum()) for m in model.modules() if isinstance(m, nn.Linear)
    )


def _nearest(
    name: str, seed: int, model: nn.Module, report: Any, data: Any, reference: list[float], table: Table
) -> None:
    rounded, counts, bits, error = nearest_twin(model, report)
    found = [accuracy(rounded, data[part]) for part in ("validation", "test")]
    table.add(
        name, seed, "nearest", "", counts, "", "", "", "mse", "", report.config["frame_size_ratio"], bits, error,
        "", "", *found, *reference,
    )  # fmt: skip


def run_nearest(name: str, seed: int, quick: bool, table: Table) -> None:
    """Only the rows of plain rounding."""
    data = mnist()
    model = train(name, seed, data)
    reference = [accuracy(model, data["validation"]), accuracy(model, data["test"])]
    budgets = set()
    for changes in settings(quick):
        config = fq.preset("sigma-delta", **{**changes, "step": "stable", "flip_passes": 0})
        budget = config.frame_size_ratio, config.levels
        if budget not in budgets:
            budgets.add(budget)
            report = fq.quantize_(copy.deepcopy(model), config=config)
            _nearest(name, seed, model, report, data, reference, table)


def _framequant(
    name: str, seed: int, model: nn.Module, data: Any, reference: list[float], table: Table
) -> None:
    calibration = list(data["train"][0][:1024].split(256))
    for bits, redundancy in ((1, 1.0), (2, 1.0), (2, 1.125), (3, 1.0), (4, 1.0), (8, 1.0)):
        quantized = copy.deepcopy(model)
        config = fq.FrameQuantConfig(bits=bits, redundancy=redundancy, include=(".",))
        report = fq.quantize_(quantized, calibration, config)
        found = [accuracy(quantized, data[part]) for part in ("validation", "test")]
        table.add(
            name, seed, "framequant", "", 2**bits, "", "", "", "", "", redundancy, report.bits_per_weight, "", "", "",
            *found, *reference,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="one-bit codes at four ratios only")
    parser.add_argument("--only-nearest", action="store_true", help="only the rows of plain rounding")
    parser.add_argument("--csv", type=Path, default=RESULTS / "mnist.csv")
    arguments = parser.parse_args()
    table = Table(arguments.csv, COLUMNS)
    for name in arguments.networks:
        for seed in arguments.seeds:
            (run_nearest if arguments.only_nearest else run_network)(name, seed, arguments.quick, table)
    if not arguments.only_nearest:
        summarize(table)


def summarize(table: Table) -> None:
    """For each network: the best one-bit row by validation accuracy, least N/d first."""
    columns = {name: number for number, name in enumerate(table.columns)}
    for name in dict.fromkeys(row[0] for row in table.rows):
        one_bit = [r for r in table.rows if r[0] == name and r[2] == "sigma-delta" and str(r[4]) == "2"]
        best = max(one_bit, key=lambda r: (float(r[columns["validation"]]), -float(r[columns["ratio"]])))
        drop = float(best[columns["float_test"]]) - float(best[columns["test"]])
        print(
            f"{name}: one-bit codes, N/d = {best[columns['ratio']]} chosen on validation images, "
            f"{best[columns['passes']]} flip passes: test {best[columns['test']]} %, "
            f"float {best[columns['float_test']]} %, {drop:+.2f} points lost, {best[columns['bits']]} bits per weight"
        )


if __name__ == "__main__":
    main()
