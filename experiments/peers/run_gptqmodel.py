"""GPTQModel's GPTQ (Frantar et al. 2022, arXiv 2210.17323)."""

from __future__ import annotations

import os
import time

import torch
from common import arguments, block_linears, finish, load, windows

SETTINGS = {
    # Its loaders alone want two of its CPU workers; on two cores it would make one of them, and end there.
    "GPTQMODEL_CPU_WORKERS": "4",
    # The same arithmetic in PyTorch alone: no kernels that a compiler must first build, no special allocator.
    "GPTQMODEL_DISABLE_GPTQ_CUDA": "1",
    "GPTQMODEL_DISABLE_PACK_EXT": "1",
    "GPTQ_TORCH_TRITON_DEQUANT": "0",
    "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    # It would spread over all GPUs, even where its device is one.
    "CUDA_VISIBLE_DEVICES": "0",
}
for key, value in SETTINGS.items():
    os.environ.setdefault(key, value)
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402

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
        # The class's method: that of the layer is one that torch.compile would first compile.
        linear.weight.copy_(type(layer).dequantize_weight(layer).T.to(linear.weight))
    # What its file holds of a layer; a loaded one has tables of shifts besides.
    tensors = [layer.qweight, layer.qzeros, layer.scales, layer.g_idx]
    stored += sum(t.numel() * t.element_size() for t in tensors)
    weights += linear.weight.numel()
finish(args, model, 8 * stored / weights, start)
