"""What moves into our linears and our attention: found in compiled blocks, and the same logits after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from framequant.integrations.block_graphs import calls, fuse_graph_
from tests.kernels.test_prompts import run

pytest.importorskip("triton")

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
GROUPS = {"gate_proj": 1, "up_proj": 1, "o_proj": 2, "down_proj": 3}
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
            last = name.split(".")[-1]
            model.set_submodule(name, layer(module, number, GROUPS.get(last, 0)))
    return Decoder(model, 8, graph=False)
made = []
fuse = block_graphs.fuse_graph_
block_graphs.fuse_graph_ = lambda graph: made.append(fuse(graph))
def check(found, moves):
    before = found._first_logits()  # by plain torch
    assert fuse_(found.model)
    assert can_fuse(found.model, found.cache)
    attention = found.model.config._attn_implementation
    with torch.no_grad(), fused_blocks(found.model, found.cache, epilogue_fusion=True):
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

LONG = (
    STEPS
    + """
from framequant.kernels import launches
launches.SHARED_POSITIONS = 4
check(decoder(64, 32, 2, 1, 32, ("o_proj",)), 1)  # a sum; angles stay with torch's attention
"""
)


def test_a_long_cache_that_heads_share_is_left_to_torch(tmp_path: Path) -> None:
    run(LONG, tmp_path, TRITON_INTERPRET="1")


def test_sums_gates_and_angles_move(tmp_path: Path) -> None:
    run(SUMS, tmp_path, TRITON_INTERPRET="1")


def test_norms_move(tmp_path: Path) -> None:
    run(NORMS, tmp_path, TRITON_INTERPRET="1")


ONE = torch.ones(1)


def lane(x: Tensor, width: int = 4096, block: int = 32, columns: bool = False) -> Tensor:
    """A linear of one token, 32 outputs: its arguments matter, not its tensors."""
    one = ONE
    sizes = {4096: [64, 1, 64, 72], 512: [32, 1, 16, 18]}[width] + [64, 1, 64, 128]
    found, _ = torch.ops.framequant.lane_linear(
        one, x.reshape(-1, width), one, [], [one] if columns else [], sizes, [18, 16], 1.0, one, one, one, None, 32,
        block, [0, 2, 0, 0, 4, 1168], 1.0, torch.float16,
    )  # fmt: skip
    return found.view(1, 1, 32)


def norm(x: Tensor, weight: Tensor, power: int = 2) -> Tensor:
    whole = x.to(torch.float32)
    whole = whole * torch.rsqrt(whole.pow(power).mean(-1, keepdim=True) + 1e-5)
    return weight * whole.to(torch.float16)


def graph_of(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """What ``torch.compile`` gives to a backend; nothing is run."""
    seen: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append(graph)
        return lambda *arguments: [torch.zeros(1) for _ in graph.graph.output_node().args[0]]

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return seen[0]


HIDDEN, WEIGHT = torch.ones(1, 1, 4096).half(), torch.ones(4096).half()
SMALL, OUTPUT = torch.ones(1, 1, 512).half(), torch.ones(1, 1, 32).half()


@pytest.mark.parametrize(
    ("function", "inputs", "moved"),
    [
        (lambda x, w: lane(norm(x, w)), (HIDDEN, WEIGHT), {"weight", "epsilon"}),
        (
            lambda x, w: lane(functional.rms_norm(x, (4096,), w, 1e-5)),
            (HIDDEN, WEIGHT),
            {"weight", "epsilon"},
        ),
        (lambda x, w: lane(norm(x, w, 3)), (HIDDEN, WEIGHT), set()),
        (lambda x, w: lane(norm(x, w), 512), (SMALL, WEIGHT[:512]), set()),  # another launch analyses
        (lambda g, x: lane(functional.silu(g) * x, 512, columns=True), (SMALL, SMALL + 1), {"gate"}),
        (lambda g, x: lane(x * functional.silu(g), 512, columns=True), (SMALL, SMALL + 1), {"gate"}),
        (lambda g, x: lane(functional.gelu(g) * x, 512, columns=True), (SMALL, SMALL + 1), set()),
        (lambda g, x: lane(functional.silu(g) * x, 512), (SMALL, SMALL + 1), set()),
        (lambda g, x: lane(functional.silu(g) * x, 512, columns=True), (SMALL[..., :1], SMALL), set()),
        (lambda x, r: r + lane(x), (HIDDEN, OUTPUT), {"added"}),
        (lambda x, r: lane(x) + r, (HIDDEN, OUTPUT), {"added"}),
        (lambda x, r: lane(x, block=0) + r, (HIDDEN, OUTPUT), set()),
        (lambda x, r: lane(x) + r, (HIDDEN, OUTPUT[..., :1]), set()),
        (lambda x, r: lane(x) + r, (HIDDEN, OUTPUT.float()), set()),
        (lambda x, r: lane(x) * r, (HIDDEN, OUTPUT), set()),
        (lambda x: lane(x) + 1.0, (HIDDEN,), set()),
    ],
)
def test_what_moves_and_what_stays(function, inputs, moved) -> None:
    import framequant.kernels.lane_ops  # noqa: F401

    module = graph_of(function, *inputs)
    before = {node.target for node in module.graph.nodes if node.op != "placeholder"}
    assert fuse_graph_(module) == bool(moved)
    (node,) = calls(module.graph, "lane_linear")
    assert set(node.kwargs) == moved
    after = {node.target for node in module.graph.nodes if node.op != "placeholder"}
    assert bool(before - after) == bool(moved)  # what moved is gone


def test_a_sum_that_others_need_as_well_stays_one() -> None:
    import framequant.kernels.lane_ops  # noqa: F401

    def both(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        y = lane(x)
        return y + r, y

    module = graph_of(both, HIDDEN, OUTPUT)
    assert fuse_graph_(module) == 0


def test_what_is_written_in_place_stays() -> None:
    """Fx takes calls without users for dead code, whatever they do."""

    def step(x: Tensor, kept: Tensor) -> Tensor:
        kept.index_copy_(1, torch.zeros(1, dtype=torch.long), x[:, :1])
        kept[:, 1] = x[:, 1]
        kept[:, 2:3] += x[:, 2:3]
        torch.add(x[:, :1], 1.0, out=kept[:, 3:4])
        return lane(x).reshape(1, 32)

    graph = graph_of(step, SMALL.reshape(1, 512).repeat(1, 8), torch.zeros(1, 4).half())
    before = {node.name for node in graph.graph.nodes}
    assert fuse_graph_(graph) == 0
    assert {node.name for node in graph.graph.nodes} == before
