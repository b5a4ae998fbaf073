"""Fused linears: the outputs, bytes and names of the single ones, through Triton's interpreter and without it.

The interpreter's switch is read when triton loads, so what needs it runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import framequant as fq
from framequant.fused import fuse_, groups
from tests.kernels.test_cpu import CODES, make_layer


class Attention(nn.Module):
    """Four linears, three of which read the same input."""

    def __init__(self, code, sizes=(64, 32, 32), dim=64, block=None):
        super().__init__()
        self.query, self.key, self.value = (
            make_layer(code, (dim, size), seed=4, bias=number != 1, codes=number, block=block)
            for number, size in enumerate(sizes)
        )
        self.output = make_layer(code, (sizes[0], dim), seed=9, block=block)

    def forward(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)
        return self.output(query * torch.cat([key, value], -1).sigmoid())


def make_model(code=CODES[0], dtype=torch.float16, count=2, **options):
    blocks = nn.ModuleList(Attention(code, **options) for _ in range(count))
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(64, 4)}).to(dtype).eval()
    return model.requires_grad_(False)


def set_backend(model, backend):
    for module in model.modules():
        if isinstance(module, fq.FrameLinear):
            module.backend = backend
    return model


def run(model, x):
    for block in model["blocks"]:
        x = block(x)
    return x


def test_groups_are_found_by_input_frame():
    model = make_model()
    first = model["blocks"][0]
    found = list(groups(model, anywhere=True))
    assert found[:2] == [[f"blocks.0.{name}" for name in ("query", "key", "value")], ["blocks.0.output"]]
    assert len(found) == 4
    spec = first.key.spec  # other signs: another transform of the input
    first.key.spec = replace(spec, frame_in=replace(spec.frame_in, seed=77))
    assert list(groups(model, anywhere=True))[:2] == [["blocks.0.query", "blocks.0.value"], ["blocks.0.key"]]
    first.value.backend = "reference"
    first.query.register_forward_hook(lambda *_: None)
    assert next(groups(model, anywhere=True)) == ["blocks.0.key"]


def test_on_a_cpu_without_kernels_nothing_is_fused():
    model = make_model()
    before = run(model, torch.ones(1, 64).half())
    assert fuse_(model) == []
    assert torch.equal(run(model, torch.ones(1, 64).half()), before)


PROGRAM = """
import copy, pathlib, sys, tempfile
import pytest, torch
import framequant as fq
from framequant.errors import CheckpointError
from framequant.fused import FusedLinear, fuse_, unfuse_
from framequant.kernels import launches
from tests.kernels.test_cpu import CODES
from tests.test_fused import make_model, run, set_backend
torch.manual_seed(0)
code, block = CODES[int(sys.argv[1])], int(sys.argv[2]) or None
model = make_model(code, count=1, block=block)
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
launches.FEW_TOKENS = 4
launches.panel_tile = lambda _: launches.PanelTile(32, 16, 32, 4)  # the interpreter is slow
launches.PACKED_PANEL_TILE = launches.PanelTile(16, 16, 128, 4)
one, many = torch.randn(1, 64).half(), torch.randn(6, 64).half()
before, expected = (run(set_backend(model, "triton"), x) for x in (one, many))
made = fuse_(model)
first = ("blocks.0.query", "blocks.0.key", "blocks.0.value")
assert made == [first, ("blocks.0.output",)], made
block, fused = model["blocks"][0], model["blocks"][0].query.group
assert torch.equal(run(model, one), before)  # rows are split alike here, so sums have one order
assert torch.equal(run(model, many), expected)
assert fused._input is None and all(output is None for output in fused._outputs)
if code is CODES[0]:
    alone = set_backend(unfuse_(copy.deepcopy(model)), "triton")["blocks"][0]
    a, b = torch.randn(2, 1, 64).half()
    for name, x in (("key", a), ("query", b), ("key", b), ("key", b), ("query", a)):
        assert torch.equal(getattr(block, name)(x), getattr(alone, name)(x)), name
    x = torch.randn(2, 2, 64).half().transpose(0, 1)  # batched, not contiguous, empty
    assert torch.equal(block.key(x), alone.key(x)) and block.key(x[:0]).shape == (0, 2, 32)
    assert torch.equal(block.key.weight, alone.key.weight) and block.key.bias is None
    for other in (copy.deepcopy(model), model.to("cpu")):
        assert torch.equal(run(other, one), before)
    with pytest.raises(CheckpointError, match="unfuse_"):
        fq.save_pretrained(model, pathlib.Path(tempfile.mkdtemp()) / "out")
    compiled = torch.compile(lambda x: block(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(one), before) and torch.equal(compiled(many), expected)
after = unfuse_(model).state_dict()
assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
assert not any(isinstance(module, FusedLinear) for module in model.modules())
print("all right")
"""


@pytest.mark.parametrize(("code", "block"), [(0, 0), (0, 32), (4, 0), (5, 0), (5, 32), (7, 0), (7, 32)])
def test_fused_linears_through_the_interpreter(code, block):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(code), str(block)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("all right")
