"""HQQ (Badri and Shaji 2023), which takes no calibration data."""

from __future__ import annotations

import time

import torch
from common import arguments, finish, load, replace_weights
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn

args = arguments()
model = load(args)
start = time.perf_counter()
settings = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=1)


def quantize(linear: nn.Linear) -> tuple[torch.Tensor, int]:
    """Weight and bytes: packed codes, and scale and zero point of every group in 16 bits."""
    layer = HQQLinear(linear, settings, del_orig=False, compute_dtype=torch.float32, device=args.device)
    values = [layer.meta["scale"], layer.meta["zero"]]
    size = layer.W_q.numel() * layer.W_q.element_size() + sum(2 * value.numel() for value in values)
    return layer.dequantize(), size


bits = replace_weights(model, quantize)
finish(args, model, bits, start, "3-bit codes are packed ten to a 32-bit word" if args.bits == 3 else "")
