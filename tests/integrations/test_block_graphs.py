"""What moves into our linears and our attention: found in compiled blocks, and the same logits after it."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.test_prompts import run

STEPS = """
import sys
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from framequant import FrameLinear, fuse_, storage
from framequant.codes.grid import GridSpec
from framequant.frames import block_frame, choose_frame
from framequant.fused import FusedLinears
from framequant.integrations import block_graphs, decoding
from framequant.integrations.compiled_blocks import can_fuse, fused_blocks
from framequant.integrations.decoding import Decoder
from framequant.spec import LinearSpec
decoding._CHECKED_STEPS = 2
def layer(linear, number, group):
    frames = choose_frame(linear.in_features, 1.125, group), block_frame(linear.out_features, 32, number)
    spec = LinearSpec(linear.in_features, linear.out_features, *frames, GridSpec("sigma_clip", 4, "symmetric"))
    tensors = {}
    for key, (size, stored) in storage.layout(spec).items():
        tensors[key] = torch.full(size, 0.03, dtype=stored)
    tensors["packed_codes"] = torch.randint(0, 256, tensors["packed_codes"].shape, dtype=torch.uint8)
    return FrameLinear.from_tensors(spec, tensors).eval()
def decoder(hidden, intermediate, heads, values, dim, quantized):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, vocab_size=61,
                         num_attention_heads=heads, num_key_value_heads=values, head_dim=dim, rms_norm_eps=1e-3)
    model = LlamaForCausalLM(config).half().eval().requires_grad_(False)
    for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    for number, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and name.split(".")[-1] in quantized:
            model.set_submodule(name, layer(module, number, int("mlp" in name)))
    return Decoder(model, 8, graph=False)
made = []
fuse = block_graphs.fuse_graph_
block_graphs.fuse_graph_ = lambda graph: made.append(fuse(graph))
def check(found, moves):
    before = found._first_logits()  # by plain torch
    assert fuse_(found.model)
    assert can_fuse(found.model, found.cache)
    attention = found.model.config._attn_implementation
    with torch.no_grad(), fused_blocks(found.model, found.cache):
        found._counts = True
        after = found._first_logits()
    assert made == [moves], made
    assert found.model.config._attn_implementation == attention
    assert [int(layer.cumulative_length) for layer in found.cache.layers] == [2]
    error = float((after - before).norm() / before.norm())
    assert error < 0.01, error
"""

SUMS = (
    STEPS
    + """
names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
check(decoder(64, 512, 2, 1, 32, names), 4)  # two sums, a gate, angles
"""
)

NORMS = (
    STEPS
    + """
check(decoder(4096, 32, 1, 1, 32, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")), 3)  # two norms, angles
"""
)


def test_sums_gates_and_angles_move(tmp_path: Path) -> None:
    run(SUMS, tmp_path, TRITON_INTERPRET="1")


def test_norms_move(tmp_path: Path) -> None:
    run(NORMS, tmp_path, TRITON_INTERPRET="1")
