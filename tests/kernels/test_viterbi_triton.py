"""The Triton search: through the interpreter in a subprocess, compiled without a GPU, and for real on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framequant.codes.trellis import TrellisSpec, codebook_values
from framequant.kernels.viterbi import encode_tiles, search

pytest.importorskip("triton")

INTERPRETED = """
import torch
from framequant.kernels import viterbi, viterbi_triton
torch.manual_seed(0)
for bits, rates, each in ((6, (2,), 1), (6, (1, 2), 1), (5, (2, 1), 1), (7, (2, 2, 2, 3), 1), (6, (1, 3), 1),
                          (6, (3,), 1), (6, (2,), 2), (7, (2, 3), 2)):
    for ring in (False, True):
        values, weights, table = torch.randn(3, 16), torch.rand(3, 16) + 0.1, torch.randn(1 << bits, each)
        values, weights = (x[:, :len(rates) * (16 // len(rates))] for x in (values, weights))
        ends = torch.tensor([1, 0, 2]) if ring else torch.full((3,), -1)
        options = {"num_warps": 1}
        fast = viterbi_triton.search(values, weights, table, rates, ends, bits, options)
        slow = viterbi.search(values, table, rates, overlap=ends, weights=weights, backend="torch")
        costs = [(weights * (values - table[s.long()].flatten(1)) ** 2).sum(1) for s in (fast, slow)]
        torch.testing.assert_close(*costs, rtol=1e-4, atol=0)
        if ring:
            assert torch.equal(fast[:, 0] >> rates[0], ends.int())
            assert torch.equal(fast[:, -1] & ((1 << bits - rates[0]) - 1), ends.int())
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.kernels import viterbi_triton
types = {"values": "*fp32", "weights": "*fp32", "table": "*fp16", "overlap": "*i64", "back": "*i32"}
types["states"] = "*i32"
types |= dict.fromkeys(("steps", "rates", "period"), "i32")
for bits, low, high, each in ((8, 2, 2, 1), (12, 2, 3, 1), (12, 1, 2, 1), (16, 2, 3, 1), (16, 4, 4, 2), (16, 4, 5, 2)):
    options = viterbi_triton.launch_options(bits)
    constants = {"L": bits, "LOW": low, "HIGH": high, "STRIDE": 1 << bits, "EACH": each}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(viterbi_triton._viterbi, signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["num_warps"]})
"""


def run(code: str, tmp_path: Path, **environment: str) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_interpreter_agrees_with_torch(tmp_path: Path) -> None:
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


def test_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rates", [(1,), (2,), (3,), (4,), (1, 2), (2, 2, 2, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("state_bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("codebook", ["bytesum-1", "bytepair-1"])
def test_gpu_agrees_with_torch(rates: tuple[int, ...], state_bits: int, codebook: str) -> None:
    values = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).cuda()
    table = codebook_values(state_bits, device="cuda", identifier=codebook)
    for ends in (None, torch.arange(9, device="cuda")):
        costs = []
        for backend in ("torch", "triton"):
            states = search(values, table, rates, overlap=ends, backend=backend)
            costs.append(((values - table[states.long()].flatten(1)) ** 2).sum(1))
        torch.testing.assert_close(*costs, rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_tiles_cost_what_cpu_tiles_cost() -> None:
    spec = TrellisSpec(12, (2, 2, 2, 3))
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    table = codebook_values(12)
    states = (encode_tiles(values, spec), encode_tiles(values.cuda(), spec).cpu())
    costs = [((values - table[s.long()].flatten(1)) ** 2).sum().item() for s in states]
    assert abs(costs[0] - costs[1]) < 1e-3 * costs[0]
