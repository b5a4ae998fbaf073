"""bitsandbytes NF4 (Dettmers et al. 2023), which has no width below four bits and takes no calibration data."""

from __future__ import annotations

import time

import torch
from common import arguments, finish, load, replace_weights
from torch import nn

args = arguments()
if args.bits != 4:
    raise SystemExit(f"bitsandbytes has no {args.bits}-bit code; 4 is the least")
from bitsandbytes import functional as bnb  # noqa: E402

model = load(args)
start = time.perf_counter()


def quantize(linear: nn.Linear) -> tuple[torch.Tensor, int]:
    """Weight and bytes: packed codes, and one float32 per block of 64."""
    packed, state = bnb.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    size = packed.numel() * packed.element_size() + state.absmax.numel() * state.absmax.element_size()
    return bnb.dequantize_4bit(packed, state), size


finish(args, model, replace_weights(model, quantize), start)
