"""Quantization-aware training on MNIST: what training the codes gains over post-training quantization.

A residual network of four blocks on 14 × 14 pixels is trained in float, quantized, and its codes are then trained
for a few epochs with ``prepare_fake_quant_``. Accuracy on the 10 000 test images; training sees the training images
only. ``python experiments/qat_digits.py --csv experiments/results/qat_digits.csv`` (``--data`` for another folder).
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import framequant as fq

SHARED = Path(__file__).resolve().parents[2] / "shared"


class Digits(nn.Module):
    """196 pixels, four residual blocks of width 64, ten classes."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(196, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.embed(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    data = np.load(folder / f"mnist_{split}.npz")
    images, labels = (torch.from_numpy(data[key]) for key in sorted(data, key=lambda key: -data[key].ndim))
    pixels = functional.avg_pool2d(images.float().reshape(-1, 1, 28, 28) / 255, 2).flatten(1)
    return (pixels - 0.13) / 0.3, labels.long()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(256)[: len(images) // 256]:
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "mnist")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    images, labels = load(arguments.data, "train")
    tests = load(arguments.data, "test")
    rows = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        base = Digits()
        train(base, images, labels, arguments.epochs, 3e-3, seed)
        rows.append(
            {"seed": seed, "bits": 32, "stage": "float", "accuracy": accuracy(base, *tests), "seconds": ""}
        )
        for bits in (1, 2):
            model = copy.deepcopy(base)
            start = time.perf_counter()
            settings = fq.preset("framequant-scalar", bits=bits, redundancy=1.0, seed=seed)
            measured = fq.quantize_(model, images[:4096], settings).bits_per_weight
            taken = time.perf_counter() - start
            row = {"seed": seed, "bits": round(measured, 4)}
            rows.append(
                {**row, "stage": "quantized", "accuracy": accuracy(model, *tests), "seconds": f"{taken:.1f}"}
            )
            start = time.perf_counter()
            fq.prepare_fake_quant_(model)
            train(model, images, labels, arguments.epochs, 1e-3, seed)
            fq.bake_fake_quant_(model)
            taken = time.perf_counter() - start
            rows.append(
                {**row, "stage": "trained", "accuracy": accuracy(model, *tests), "seconds": f"{taken:.1f}"}
            )
        for row in rows[-5:]:
            print(row, flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
