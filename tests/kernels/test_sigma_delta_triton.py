"""The Sigma-Delta recursion in Triton: interpreted in a subprocess, compiled without a GPU, and for real on one."""

from pathlib import Path

import pytest
import torch

from framequant.kernels.sigma_delta import quantize_sequences
from tests.kernels.test_feedback_triton import run

pytest.importorskip("triton")

INTERPRETED = """
import torch
from framequant.kernels.sigma_delta import quantize_sequences
torch.manual_seed(0)
cases = [(3, 17, 2, 1), (33, 9, 6, 2), (1, 20, 8, 3), (2, 1, 256, 1), (5, 12, 2, 0), (4, 9, 2, 3)]
for vectors, size, levels, order in cases:
    c = torch.randn(vectors, size, dtype=torch.float64)
    steps = torch.rand(vectors, dtype=torch.float64) + 0.1
    slow, fast = (quantize_sequences(c, steps, levels, order, backend) for backend in ("torch", "triton"))
    assert all(torch.equal(one, two) for one, two in zip(slow, fast)), (vectors, size, levels, order)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.kernels import sigma_delta_triton
types = dict.fromkeys(("coefficients", "inverse", "peaks", "energies"), "*fp64")
types |= {"codes": "*u8", "overloads": "*i32", "vectors": "i32", "size": "i32"}
for order in range(4):
    constants = {"LEVELS": 8, "ORDER": order, "LIMIT": 0.5 + 1e-9, "LANES": sigma_delta_triton.LANES}
    source = ASTSource(sigma_delta_triton._quantize, types | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn.f64" not in ptx
"""


def test_interpreter_agrees_with_torch(tmp_path: Path) -> None:
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


def test_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("order", "levels"), [(0, 4), (1, 2), (2, 4), (3, 8)])
@pytest.mark.parametrize(("vectors", "size"), [(1, 1), (77, 301), (500, 2048)])
def test_gpu_equals_torch(order: int, levels: int, vectors: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(vectors, size, generator=generator, dtype=torch.float64)
    steps = torch.rand(vectors, generator=generator, dtype=torch.float64) + 0.5
    slow = quantize_sequences(c, steps, levels, order, "torch")
    fast = quantize_sequences(c.cuda(), steps.cuda(), levels, order, "triton")
    assert torch.equal(slow.codes, fast.codes.cpu())
    assert torch.equal(slow.overloads, fast.overloads.cpu())
    torch.testing.assert_close(slow.energies, fast.energies.cpu(), rtol=1e-12, atol=0)
