"""GPTQModel's GPTQ (Frantar et al. 2022, arXiv 2210.17323)."""

from __future__ import annotations

import time

import torch
from common import arguments, block_linears, finish, load, windows
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

args = arguments()
tokens = windows(args)
start = time.perf_counter()
settings = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=False, desc_act=False)
quantized = GPTQModel.load(str(args.model), settings, device=args.device)
quantized.quantize(
    [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens], batch_size=1
)
saved = args.out.with_name(f"{args.out.name}-packed")
quantized.save(str(saved))
packed = GPTQModel.load(str(saved), backend=BACKEND.TORCH, device=args.device)
layers = {name: m for name, m in packed.model.named_modules() if hasattr(m, "dequantize_weight")}
model = load(args)
stored = weights = 0
for name, linear in block_linears(model).items():
    layer = layers[name]
    with torch.no_grad():
        linear.weight.copy_(layer.dequantize_weight().T.to(linear.weight))
    tensors = [*layer.buffers()]
    stored += sum(t.numel() * t.element_size() for t in tensors if t.dtype != torch.int64)
    weights += linear.weight.numel()
finish(args, model, 8 * stored / weights, start)
