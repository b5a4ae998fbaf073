r"""Does a Hadamard transform in blocks of outputs cost quality, beside one of all? SmolLM2, some of its layers.

    PYTHONPATH=src python experiments/quality/output_blocks.py ../shared/data/wikitext-2-raw/calibration.txt \
        --csv out.csv

Calibration takes windows of the first four fifths of the text, the last fifth is held out; no test text is read. A
row is a configuration and a seed: geometric mean of the linears' relative proxy losses over those of one transform
with the same seed, and KL divergence from the float model on held-out windows, in nats a token. With ``--apart`` each
linear is rounded by itself against the float model's second moments, so that losses differ by its own rounding only.
``--side in``: blocks of inputs instead, which no setting of the library makes; with ``--apart``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import framequant as fq
from framequant.evaluation.text import read_text, tokenize, windows
from framequant.frames import FrameSpec
from framequant.frames.block_hadamard import block_frame
from framequant.integrations.sources import open_model
from framequant.quantizers import weight
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import quantize_group

BLOCKS = r"layers\.(2|10|18|26)\."
CONFIGS: dict[str, dict[str, Any]] = {
    "trellis": {"preset": "framequant", "bits": 2.0, "state_bits": 10, "allocation": "uniform"},
    "trellis, rows apart": {
        "preset": "framequant",
        "bits": 2.0,
        "state_bits": 10,
        "allocation": "uniform",
        "output_feedback": False,
        "token_weights": 0.0,
    },
    "scalar": {"preset": "framequant-scalar"},
}


@torch.no_grad()
def logits(model: torch.nn.Module, held: torch.Tensor) -> list[torch.Tensor]:
    return [model(window[None]).logits[0].float().log_softmax(-1).to(torch.bfloat16) for window in held]


@torch.no_grad()
def divergence(model: torch.nn.Module, held: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """Mean KL(float ‖ quantized) over tokens."""
    total = 0.0
    for window, reference in zip(held, expected, strict=True):
        p = reference.float()
        q = model(window[None]).logits[0].float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(held)


def layer_moments(model: torch.nn.Module, data: torch.Tensor) -> dict[str, tuple[torch.Tensor, Moments]]:
    """Weight and second moments of the inputs of every linear of the blocks, in the float model."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(BLOCKS, name)
    }
    found = {
        name: (layer.weight.detach().float(), Moments(layer.in_features)) for name, layer in layers.items()
    }
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, m=found[name][1]: m.add(x[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for window in data:
            model(window[None])
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def inputs_in_blocks(size: int) -> Iterator[None]:
    """Input frames are Hadamard transforms of so many inputs, where these divide all; 0 for the frames as they are."""
    plain = weight.frame_specs

    def specs(config: fq.FrameQuantConfig, inputs: int, *others: Any) -> tuple[FrameSpec, FrameSpec]:
        frame_in, frame_out = plain(config, inputs, *others)
        return block_frame(inputs, size, frame_in.seed) if size else frame_in, frame_out

    weight.frame_specs = specs
    try:
        yield
    finally:
        weight.frame_specs = plain


def apart(found: dict[str, tuple[torch.Tensor, Moments]], config: fq.FrameQuantConfig) -> dict[str, float]:
    """Relative loss of each linear, rounded by itself."""
    return {
        name: quantize_group({name: matrix}, moments, {name: config}, name)[name].loss.relative
        for name, (matrix, moments) in found.items()
    }


def means(losses: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Geometric means of losses, of their ratios, and of those for each kind of linear."""
    ratios = {key: math.log(losses[key] / base[key]) for key in losses}
    row = {"loss": math.exp(sum(map(math.log, losses.values())) / len(losses))}
    row["loss_ratio"] = math.exp(sum(ratios.values()) / len(ratios))
    for last in ("q", "k", "v", "o", "gate", "up", "down"):
        found = [ratio for key, ratio in ratios.items() if key.endswith(f".{last}_proj")]
        row[last] = math.exp(sum(found) / len(found))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 128, 64, 32], help="0: one transform")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--apart", action="store_true", help="each linear by itself, no walk")
    parser.add_argument("--side", choices=("out", "in"), default="out")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held", type=int, default=12)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if arguments.side == "in" and not arguments.apart:
        parser.error("--side in goes with --apart")
    opened = open_model("smollm2", dtype="bfloat16", device="cpu")
    pieces = windows(tokenize(opened.require_tokenizer(), read_text(arguments.calibration)), arguments.length)
    split = len(pieces) * 4 // 5
    order = torch.randperm(split, generator=torch.Generator().manual_seed(0))
    calibration, held = pieces[order[: arguments.samples]], pieces[split:][: arguments.held]
    expected = [] if arguments.apart else logits(opened.model, held)
    found = layer_moments(opened.model, calibration) if arguments.apart else {}
    rows: list[dict[str, Any]] = []
    for name in arguments.configs:
        for seed in arguments.seeds:
            base: dict[str, float] = {}
            for size in arguments.sizes:
                begin, settings = time.perf_counter(), dict(CONFIGS[name])
                config = fq.preset(settings.pop("preset"), **settings, include=[BLOCKS], seed=seed,
                                   output_hadamard_block=(arguments.side == "out" and size) or None)  # fmt: skip
                if arguments.apart:
                    with inputs_in_blocks(size if arguments.side == "in" else 0):
                        losses, kl = apart(found, config), float("nan")
                else:
                    model = copy.deepcopy(opened.model)
                    report = fq.quantize_(model, calibration, config)
                    losses = {entry.name: entry.relative_loss for entry in report.linears}
                    kl = divergence(model, held, expected)
                base = base or losses
                row = {"config": name, "seed": seed, "block": size or "all", **means(losses, base), "kl": kl}
                row["seconds"] = time.perf_counter() - begin
                rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
                print(rows[-1], flush=True)
                if arguments.csv:
                    with arguments.csv.open("w", newline="") as file:
                        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
