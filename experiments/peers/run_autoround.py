"""AutoRound (Cheng et al. 2023, arXiv 2309.05516): signed gradient descent on rounding and ranges."""

from __future__ import annotations

import time

import torch
from auto_round import AutoRound
from common import arguments, block_linears, finish, load, windows
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

args = arguments()
model = load(args)
tokens = windows(args)
start = time.perf_counter()
rounder = AutoRound(
    model,
    AutoTokenizer.from_pretrained(args.model),
    bits=args.bits,
    group_size=args.group_size,
    sym=False,
    dataset=DataLoader(list(tokens), batch_size=1),
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    iters=200 if torch.cuda.is_available() else 20,
    device_map=args.device,
)
found, _ = rounder.quantize()
# Codes, and of every group a scale in 16 bits and a zero point as wide as a code: its own packed format.
groups = sum(
    linear.weight.shape[0] * -(-linear.weight.shape[1] // args.group_size)
    for linear in block_linears(found).values()
)
weights = sum(linear.weight.numel() for linear in block_linears(found).values())
bits = args.bits + (16 + args.bits) * groups / weights
finish(args, found, bits, start, "bits from its packed format, not from a file")
