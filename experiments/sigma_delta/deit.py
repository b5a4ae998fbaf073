"""DeiT-Tiny by Sigma-Delta without calibration data, N/d = 2 … 8, beside plain rounding: results/deit_tiny.csv.

    python experiments/sigma_delta/deit.py [--device cuda]

All linears are quantized (blocks and head) with their biases; accuracy is on the 1300 ImageNet validation images of
``../shared``, with the weights synthesised once (``to_linear``). ``nearest`` rounds the rows of each linear to as
many levels as the bits of its codes in the row above pay for. Nothing is chosen here: every row that was run is in
the table.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import RESULTS, Table, nearest_twin, shared
from torch import nn

import framequant as fq
from framequant.evaluation.accuracy import accuracy
from framequant.evaluation.images import labelled_images
from framequant.integrations.sources import OpenedModel, open_model
from framequant.integrations.transformers import dequantize_

COLUMNS = ("method", "levels", "ratio", "passes", "bits", "weight_error", "top1", "top5", "images", "seconds")
#: N/d, levels, passes of the post-pass.
RUNS = ((4, 2, 0), (8, 2, 0), (2, 2, 0), (4, 2, 20), (2, 2, 20), (8, 2, 20), (3, 2, 0), (6, 2, 0), (2, 4, 20))


def evaluate(opened: OpenedModel, model: nn.Module, images: object) -> tuple[float, float, int]:
    found = accuracy(model, images, opened.require_images())
    return 100 * found.top1, 100 * found.top5, found.images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="only the first so many")
    parser.add_argument("--csv", type=Path, default=RESULTS / "deit_tiny.csv")
    arguments = parser.parse_args()
    opened = open_model(str(shared() / "models" / "deit_tiny_patch16_224"), device=arguments.device)
    images = labelled_images(shared() / "data" / "imagenet" / "val", 1000, opened.labels)
    table = Table(arguments.csv, COLUMNS)
    if arguments.device != "cpu":
        table.origin[1] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    table.add("float", "", "", "", 32.0, 0.0, *evaluate(opened, opened.model, images), "")
    energy = sum(
        float(m.weight.detach().double().square().sum())
        for m in opened.model.modules()
        if isinstance(m, nn.Linear)
    )
    seen = set()
    for ratio, levels, passes in RUNS[: arguments.runs]:
        model = copy.deepcopy(opened.model)
        config = fq.preset("sigma-delta", frame_size_ratio=ratio, levels=levels, flip_passes=passes)
        report = fq.quantize_(model, config=config)
        error = sum(entry.proxy_loss for entry in report.linears) / energy
        found = evaluate(opened, dequantize_(model), images)
        table.add("sigma-delta", levels, ratio, passes, report.bits_per_weight, error, *found, report.seconds)
        budget = round(report.bits_per_weight, 2)
        if budget not in seen:
            seen.add(budget)
            plain, counts, bits, error = nearest_twin(opened.model, report)
            table.add("nearest", counts, "", "", bits, error, *evaluate(opened, plain, images), "")


if __name__ == "__main__":
    main()
