r"""What a tuning should train: one quantized model, several kinds of trainable numbers, judged on other texts.

    python experiments/quality/tune_variants.py smollm2 --calibration ../shared/data/wikitext-2-raw/calibration.txt \\
        --judge TEXTS/wiki.txt --row framequant:bits=2.25,samples=512,train_ahead=32,mix=0.2,generated=0.5 \\
        --variant frame --variant out,bias --variant out,lora4 --variant ste:rate=0.003

Norms are trained in each variant. ``frame``: a factor per row of the coefficients (what ``--tune`` trains); ``out``
and ``in``: a factor per output or input; ``bias``: a bias per output; ``loraR``: R columns of low-rank factors;
``ste``: the coefficients themselves, encoded anew in every step, with straight-through gradients; ``embed``: the
token embeddings, which stay float. After a colon: ``steps``, ``rate`` of matrices (of embeddings relative to their
size), and ``vectors``, that of vectors relative to theirs.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sweep import Data, read_options, read_row
from torch import Tensor, nn
from torch.nn import functional

import framequant as fq
from framequant.cli.options import choose_device
from framequant.codes.trellis import decode_states, matrix_from_tiles, tiles_from_matrix
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.text import read_text
from framequant.integrations.sources import open_model
from framequant.kernels.viterbi import encode_tiles
from framequant.layers import FrameLinear
from framequant.model.tune_loss import distance
from framequant.model.walk import quantized_linears
from framequant.storage import decode_rows

SAMPLES_PER_STEP = 8


class Student(nn.Module):
    """A quantized linear as dense matrices, with the trainable numbers of a variant."""

    def __init__(self, layer: FrameLinear, kinds: list[str]) -> None:
        super().__init__()
        self.kinds, self.spec = kinds, layer.spec.code
        frame_in, frame_out = layer.frames
        rows, _ = layer.spec.coefficient_shape
        device = layer.tensors["scales"].device
        self.analysis = frame_in.analysis(torch.eye(layer.in_features, device=device))
        self.synthesis = frame_out.synthesis(torch.eye(rows, device=device))
        self.codes = decode_rows(layer.spec, layer.tensors, 0, rows, torch.float32)
        self.scale = layer.tensors["scales"].float()
        self.dense = self._dense(self.codes)
        self.size: Tensor | None = None
        out, n = layer.out_features, layer.in_features
        self.rank = next((int(kind[4:]) for kind in kinds if kind.startswith("lora")), 0)
        if "frame" in kinds:
            self.half = self.codes @ self.analysis.T
            self.frame = nn.Parameter(torch.ones(rows, device=device))
        if "out" in kinds:
            self.out = nn.Parameter(torch.ones(out, device=device))
        if "in" in kinds:
            self.inner = nn.Parameter(torch.ones(n, device=device))
        if "bias" in kinds:
            self.bias = nn.Parameter(torch.zeros(out, device=device))
        if self.rank:
            self.low_a = nn.Parameter(torch.randn(self.rank, n, device=device) / math.sqrt(n))
            self.low_b = nn.Parameter(torch.zeros(out, self.rank, device=device))
        if "ste" in kinds:
            self.shadow = nn.Parameter(self.codes / self.scale)
            self.start = self.codes

    def _dense(self, codes: Tensor) -> Tensor:
        return self.synthesis.T @ codes @ self.analysis.T

    @torch.no_grad()
    def encode(self) -> None:
        tiles = tiles_from_matrix(self.shadow, self.spec)
        states = encode_tiles(tiles, self.spec, check=False)
        values = decode_states(states, self.spec.state_bits, identifier=self.spec.codebook)
        self.codes = matrix_from_tiles(values, *self.shadow.shape, self.spec) * self.scale

    def forward(self, inputs: Tensor) -> Tensor:
        if "in" in self.kinds:
            inputs = inputs * self.inner
        if "ste" in self.kinds:
            through = self.codes + (self.shadow - self.shadow.detach()) * self.scale
            outputs = functional.linear(inputs, self._dense(through))
        elif "frame" in self.kinds:
            outputs = (functional.linear(inputs, self.half) * self.frame) @ self.synthesis
        else:
            outputs = functional.linear(inputs, self.dense)
        if self.rank:
            outputs = outputs + functional.linear(functional.linear(inputs, self.low_a), self.low_b)
        if "out" in self.kinds:
            outputs = outputs * self.out
        if "bias" in self.kinds:
            if self.size is None:
                self.size = outputs.detach().float().square().mean().sqrt()
            outputs = outputs + self.bias * self.size
        return outputs


def students(model: nn.Module, kinds: list[str]) -> nn.Module:
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    for name, layer in quantized_linears(copied).items():
        copied.set_submodule(name, Student(layer, kinds))
    if "embed" in kinds:
        copied.get_input_embeddings().weight.requires_grad_(True)
    return copied


def rates(student: nn.Module, rate: float, vectors: float) -> list[dict[str, Any]]:
    """Groups of an optimizer, each with the rate that it has at its highest."""
    groups: list[dict[str, Any]] = []
    embeddings = student.get_input_embeddings().weight
    for parameter in student.parameters():
        if parameter.requires_grad:
            size = max(float(parameter.detach().square().mean().sqrt()), 0.01)
            if parameter.ndim == 1:
                own = vectors * (size if bool(parameter.any()) else 1.0)
            else:
                own = rate * (size if parameter is embeddings else 1.0)
            groups.append({"params": [parameter], "own": own})
    return groups


def train(
    student: nn.Module, teacher: nn.Module, windows: Tensor, steps: int, rate: float, vectors: float
) -> list[float]:
    optimizer = torch.optim.Adam(rates(student, rate, vectors), lr=rate, betas=(0.9, 0.95))
    layers = encoded(student)
    draw, losses = np.random.RandomState(0), []
    passes = 1 + steps * SAMPLES_PER_STEP // len(windows)
    order = np.concatenate([draw.permutation(len(windows)) for _ in range(passes)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["own"] * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = windows[order[step * SAMPLES_PER_STEP : (step + 1) * SAMPLES_PER_STEP]]
        with torch.autocast(batch.device.type, torch.bfloat16):
            with torch.no_grad():
                target = teacher(batch).logits
            total, count = distance(student(batch).logits, target, None, "kl")
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            layer.encode()
        losses.append(float(total.detach() / count))
    return losses


def encoded(student: nn.Module) -> list[Student]:
    """The linears whose codes are chosen anew in every step."""
    return [layer for layer in student.modules() if isinstance(layer, Student) and "ste" in layer.kinds]


def flipped(student: nn.Module) -> float:
    layers = encoded(student)
    changed = sum(int((layer.codes != layer.start).sum()) for layer in layers)
    return changed / max(sum(layer.codes.numel() for layer in layers), 1)


def main(
    model: str,
    calibration: Annotated[Path, typer.Option()],
    row: Annotated[str, typer.Option()],
    variant: Annotated[list[str], typer.Option()],
    held: int = 24,
    device: str = "auto",
    sequence_length: int = 1024,
    judge: Annotated[list[Path] | None, typer.Option()] = None,
) -> None:
    opened = open_model(model, dtype="float32", device=choose_device(device))
    data = Data(opened, read_text(calibration), 128, sequence_length, held, judge or [])
    config, windows = read_row(row, data)
    quantized = copy.deepcopy(opened.model)
    report = fq.quantize_(quantized, windows, config)
    windows = windows.to(choose_device(device))
    print(row, round(report.bits_per_weight, 4), round(report.seconds, 1), "s", flush=True)
    base = {key: perplexity(opened.model, text).perplexity for key, text in data.texts.items()}
    for each in ["", *variant]:
        kinds, _, options = each.partition(":")
        given = {"steps": 300, "rate": 1e-3, "vectors": 1e-3, **read_options(options)}
        start = time.perf_counter()
        student = students(quantized, kinds.split(","))
        losses = (
            train(student, opened.model, windows, given["steps"], given["rate"], given["vectors"])
            if each
            else []
        )
        took = time.perf_counter() - start
        with torch.no_grad():
            ratios = {
                key: perplexity(student, text).perplexity / base[key] for key, text in data.texts.items()
            }
        print(
            each or "untuned", {key: round(value, 4) for key, value in ratios.items()},
            [round(float(np.mean(part)), 4) for part in np.array_split(losses, 6)] if losses else "",
            f"{took:.0f} s, changed {flipped(student):.4f}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
