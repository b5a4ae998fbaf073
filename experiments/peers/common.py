"""What the runners of peers share. Imports no framequant: a runner lives in the environment of its peer.

A runner reads a transformers directory and token windows, quantizes every linear inside the blocks, and writes the
dequantized model in float32, so that it is evaluated like all others, with ``peer.json``: measured bits and seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def arguments() -> argparse.Namespace:
    """The options of every runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="a transformers directory with safetensors")
    parser.add_argument("windows", type=Path, help="token windows (n, length) as safetensors, key 'windows'")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    """The float model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.to(args.device).eval()


def windows(args: argparse.Namespace) -> torch.Tensor:
    """The calibration windows."""
    from safetensors.torch import load_file

    return load_file(args.windows)["windows"]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear below the longest list of blocks."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    prefix = max(lists, key=lambda entry: len(entry[1]))[0]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{prefix}.")
    }


def replace_weights(model: nn.Module, quantize: Callable[[nn.Linear], tuple[torch.Tensor, int]]) -> float:
    """Put what a peer makes of every weight in its place.

    Args:
        model: changed in place.
        quantize: returns the dequantized weight and the bytes that it is stored in.

    Returns:
        Bits per weight.
    """
    stored = weights = 0
    for linear in block_linears(model).values():
        value, size = quantize(linear)
        stored, weights = stored + size, weights + linear.weight.numel()
        with torch.no_grad():
            linear.weight.copy_(value.reshape(linear.weight.shape).to(linear.weight))
    return 8 * stored / weights


def finish(args: argparse.Namespace, model: Any, bits: float, start: float, note: str = "") -> None:
    """Write the dequantized model and what was measured."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.config.__dict__.pop("quantization_config", None)
    model.float().cpu().save_pretrained(args.out)
    found = {"bits_per_weight": bits, "quantize_seconds": time.perf_counter() - start, "note": note}
    (args.out / "peer.json").write_text(json.dumps(found))
