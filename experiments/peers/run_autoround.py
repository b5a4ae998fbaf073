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
    enable_torch_compile=False,  # the same steps; a model this small is done before its compiler would pay
    device_map=args.device,
)
found = block_linears(rounder.quantize()[0])
# It casts the whole model to bfloat16; what it does not quantize is taken as it was.
model = load(args)
for name, linear in block_linears(model).items():
    with torch.no_grad():
        linear.weight.copy_(found[name].weight)
# Codes, and of every group a scale in 16 bits and a zero point as wide as a code: its own packed format.
shapes = [linear.weight.shape for linear in block_linears(model).values()]
groups = sum(rows * -(-columns // args.group_size) for rows, columns in shapes)
bits = args.bits + (16 + args.bits) * groups / sum(shape.numel() for shape in shapes)
finish(args, model, bits, start, "bits from its packed format, not from a file")
