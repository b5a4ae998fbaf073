"""LDLQ's inner loop in Triton: interpreted in a subprocess, compiled without a GPU, and for real on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from framequant.codes.grid import GridKind, GridSpec, ZeroPoint, fit_grid
from framequant.kernels.feedback import GridTable, round_block
from framequant.quantizers.coders import ScalarCoder
from framequant.quantizers.hessian import damped, feedback_factor
from framequant.quantizers.refine import refine_codes
from framequant.quantizers.rounding import proxy_loss, round_ldlq

pytest.importorskip("triton")

INTERPRETED = """
import torch
from framequant.codes.grid import GridSpec, fit_grid
from framequant.kernels import feedback
torch.manual_seed(0)
specs = [GridSpec("sigma_clip", 4, "symmetric"), GridSpec("uniform", 5, group_size=3)]
specs += [GridSpec("min_max", 256, "integer", group_size=2), GridSpec("lloyd_max", 4)]
for spec in specs:
    for rows, columns in ((3, 5), (9, 8), (1, 1)):
        for moves in (False, True):
            work = torch.randn(columns, rows, dtype=torch.float64)
            factor = torch.randn(columns, columns, dtype=torch.float64) / 3
            factor.diagonal().abs_().add_(1)
            table = feedback.GridTable.of(fit_grid(work.T, spec), rows)
            order, previous = torch.randperm(columns), work.roll(1, 0) if moves else None
            slow, fast = (
                feedback.round_block(work, factor, table, order, previous=previous, backend=backend)
                for backend in ("torch", "triton")
            )
            assert torch.equal(slow.codes, fast.codes) and torch.equal(slow.values, fast.values)
            torch.testing.assert_close(slow.solved, fast.solved, rtol=1e-12, atol=1e-12)
one = torch.ones(1, 1, dtype=torch.float64)
for kind in ("sigma_clip", "lloyd_max"):
    spec = GridSpec(kind, 4, "symmetric")
    work = torch.cat([torch.arange(-9, 10).double() / 4, torch.tensor([-1e30, 1e30, torch.nan])])[None]
    grid = fit_grid(torch.ones(1, 1), spec)
    grid.scales = one.float()
    table, first = feedback.GridTable.of(grid, work.shape[1]), torch.tensor([0])
    slow, fast = (feedback.round_block(work, one, table, first, backend=name) for name in ("torch", "triton"))
    assert torch.equal(slow.codes[:, :-1], fast.codes[:, :-1])
    torch.testing.assert_close(slow.values, fast.values, rtol=0, atol=0, equal_nan=True)
"""

COMPILED = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.kernels import feedback_triton
names = "work factor scales offsets zeros levels middles previous values solved"
types = dict.fromkeys(names.split(), "*fp64") | {"groups": "*i64", "codes": "*u8"}
types |= dict.fromkeys(("stride", "columns", "rows"), "i32")
for uniform in (True, False):
    constants = {"LEVELS": 4, "UNIFORM": uniform, "MOVES": not uniform, "COLUMNS": 128}
    constants["ROWS"] = feedback_triton.ROWS
    source = ASTSource(feedback_triton._round, types | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 1, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn.f64" not in ptx
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


GPU_SPECS = [
    GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.UNIFORM, 5, ZeroPoint.FLOAT, group_size=48),
    GridSpec(GridKind.MIN_MAX, 256, ZeroPoint.INTEGER),
    GridSpec(GridKind.LLOYD_MAX, 16),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.kind.value)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (77, 37), (301, 128)])
def test_gpu_equals_torch(rows: int, columns: int, spec: GridSpec, moves: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    work = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    factor = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns
    factor.diagonal().abs_().add_(1)
    grid, order = fit_grid(work.T, spec), torch.randperm(columns, generator=generator)
    previous = work.roll(1, 0) if moves else None
    slow = round_block(work, factor, GridTable.of(grid, rows), order, previous=previous, backend="torch")
    table = GridTable.of(fit_grid(work.T.cuda(), spec), rows)
    moved = None if previous is None else previous.cuda()
    fast = round_block(work.cuda(), factor.cuda(), table, order.cuda(), previous=moved, backend="triton")
    if torch.equal(GridTable.of(grid, rows).scales, table.scales.cpu()):  # fitted alike on both devices
        assert torch.equal(slow.codes, fast.codes.cpu())
        torch.testing.assert_close(slow.solved, fast.solved.cpu(), rtol=1e-11, atol=1e-11)
    same = round_block(work.cuda(), factor.cuda(), table, order.cuda(), previous=moved, backend="torch")
    assert torch.equal(same.codes, fast.codes)
    torch.testing.assert_close(same.solved, fast.solved, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.kind.value)
def test_gpu_rounds_and_refines_whole_matrices(spec: GridSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, 300, generator=generator, dtype=torch.float64)
    hessian = damped(inputs.T @ inputs / 900, 0.01).cuda()
    target = torch.randn(130, 300, generator=generator, dtype=torch.float64).cuda()
    upper, results = feedback_factor(hessian, 0).upper, []
    for backend in ("torch", "triton"):
        coder = ScalarCoder([target], spec, backend)
        rounded = round_ldlq(target, upper, coder)
        refined = refine_codes(target, rounded, hessian, coder, 2)
        assert proxy_loss(refined - target, hessian) <= proxy_loss(rounded - target, hessian)
        results.append((rounded, refined))
    for slow, fast in zip(*results, strict=True):
        assert (slow != fast).double().mean() < 1e-3
