"""What the Sigma-Delta experiments share: MNIST, networks trained in a minute, and CSV rows with their origin."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from framequant.model.report import QuantizationReport
from framequant.quantizers.equal_bits import SCALE_BITS, equal_levels, round_to_nearest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
#: Images held out of the training set: everything that is chosen is chosen on them.
VALIDATION = 10_000


def shared() -> Path:
    return Path(os.environ.get("FRAMEQUANT_SHARED", ROOT.parent / "shared"))


def mnist() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 784) in [0, 1] and labels: ``train`` (50 000), ``validation`` (10 000), ``test`` (10 000)."""
    parts = {}
    for name in ("train", "test"):
        with np.load(shared() / "data" / "mnist" / f"mnist_{name}.npz") as file:
            images = torch.from_numpy(file["x"]).float().flatten(1) / 255
            parts[name] = images, torch.from_numpy(file["y"]).long()
    images, labels = parts["train"]
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(0)
    )  # the file is sorted by class
    images, labels = images[order], labels[order]
    return {
        "train": (images[:-VALIDATION], labels[:-VALIDATION]),
        "validation": (images[-VALIDATION:], labels[-VALIDATION:]),
        "test": parts["test"],
    }


class Layer(nn.Module):
    """A linear, and a ReLU unless it is the last."""

    def __init__(self, inputs: int, outputs: int, last: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = nn.Identity() if last else nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activation(self.linear(inputs))


class FeedForward(nn.Module):
    """Fully connected layers of the given widths."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(Layer(a, b, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs))

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


class ResidualBlock(nn.Module):
    """``h + V relu(W h + b) + c``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.activation = nn.ReLU()
        self.outer = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.outer(self.activation(self.inner(inputs)))


class Residual(nn.Module):
    """A linear, residual blocks, and a linear."""

    def __init__(self, width: int = 128, hidden: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(784, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.stem(inputs)
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


NETWORKS = {
    "two layers": lambda: FeedForward([784, 256, 10]),
    "three layers": lambda: FeedForward([784, 256, 128, 10]),
    "five layers": lambda: FeedForward([784, 256, 256, 128, 64, 10]),
    "residual": Residual,
}


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], batch: int = 2000) -> float:
    """Share of images classified rightly, in percent."""
    images, labels = data
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return 100 * right / len(labels)


def train(name: str, seed: int, data: dict[str, tuple[Tensor, Tensor]], epochs: int = 20) -> nn.Module:
    """Train a network on the training part: Adam, one cycle, images shifted by up to two pixels."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    images, labels = data["train"]
    batch = 200
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).view(-1, batch):
            shifts = torch.randint(-2, 3, (2,)).tolist()
            inputs = images[index].view(-1, 28, 28).roll(shifts, (1, 2)).flatten(1)
            loss = functional.cross_entropy(model(inputs), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


def device_name() -> str:
    return (
        f"{platform.processor() or platform.machine()} x{torch.get_num_threads()}, torch {torch.__version__}"
    )


def nearest_twin(model: nn.Module, report: QuantizationReport) -> tuple[nn.Module, str, float, float]:
    """A copy whose linears are rounded to nearest, each at the bits that its Sigma-Delta codes and scales take.

    Returns:
        The copy; the numbers of levels; bits per weight over all; and the relative squared weight error.
    """
    twin, error, energy, stored, weights, counts = copy.deepcopy(model), 0.0, 0.0, 0.0, 0, set()
    for entry in report.linears:
        module = twin.get_submodule(entry.name)
        weight = module.weight.detach()
        bits = 8 * (entry.bytes["packed_codes"] + entry.bytes["scales"]) / entry.num_weights
        levels = equal_levels(bits, weight.shape[1])
        value = round_to_nearest(weight, levels) if levels else torch.zeros_like(weight)
        width = math.log2(levels) + SCALE_BITS / weight.shape[1] if levels else 0.0
        error += float((value - weight).square().sum())
        energy += float(weight.double().square().sum())
        stored, weights = stored + width * weight.numel(), weights + weight.numel()
        counts.add(levels)
        module.weight.data = value.to(weight.dtype)
    return twin, "/".join(map(str, sorted(counts))), stored / weights, error / energy


class Table:
    """Rows that are printed and kept as CSV, each with seed, commit and device."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, (*columns, "commit", "device")
        self.rows: list[list[object]] = []
        self.origin = [commit(), device_name()]
        self.start = time.perf_counter()
        print(" | ".join(self.columns[:-2]))

    def add(self, *values: object) -> None:
        shown = [f"{value:.5g}" if isinstance(value, float) else value for value in values]
        self.rows.append([*shown, *self.origin])
        print(" | ".join(map(str, shown)), f"[{time.perf_counter() - self.start:.0f} s]", flush=True)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows)
