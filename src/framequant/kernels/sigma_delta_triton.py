"""The Sigma-Delta recursion on a GPU: a thread for each vector, all N steps in one launch.

The N steps of a vector depend on each other, the vectors do not: a matrix has thousands. Fused multiply-adds are
off, so states are those of the CPU, bit for bit.

Only ``framequant.kernels.sigma_delta`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32


@triton.jit
def _quantize(
    coefficients, inverse, codes, overloads, peaks, energies, vectors, size,
    LEVELS: tl.constexpr, ORDER: tl.constexpr, LIMIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Quantize ``LANES`` vectors."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = lane < vectors
    scale = tl.load(inverse + lane, mask=valid, other=0.0)
    line = lane.to(tl.int64) * size
    first = tl.zeros([LANES], tl.float64)
    second = tl.zeros([LANES], tl.float64)
    third = tl.zeros([LANES], tl.float64)
    peak = tl.zeros([LANES], tl.float64)
    energy = tl.zeros([LANES], tl.float64)
    count = tl.zeros([LANES], tl.int32)
    for n in range(0, size):
        value = tl.load(coefficients + line + n, mask=valid, other=0.0) * scale
        if ORDER == 1:
            value = value + first
        elif ORDER == 2:
            value = value + (2.0 * first - second)
        elif ORDER == 3:
            value = value + (3.0 * (first - second) + third)
        code = tl.floor(value + LEVELS / 2)
        code = tl.where(code < 0.0, 0.0, code)
        code = tl.where(code > LEVELS - 1, LEVELS - 1.0, code)
        tl.store(codes + line + n, code.to(tl.int32).to(tl.uint8), mask=valid)
        third = second
        second = first
        first = value - (code - (LEVELS / 2 - 0.5))
        size_now = tl.abs(first)
        peak = tl.where(size_now > peak, size_now, peak)
        energy = energy + first * first
        count += (size_now > LIMIT).to(tl.int32)
    tl.store(overloads + lane, count, mask=valid)
    tl.store(peaks + lane, peak, mask=valid)
    tl.store(energies + lane, energy, mask=valid)


def quantize_sequences(
    coefficients: Tensor, inverse: Tensor, levels: int, order: int, limit: float, out: tuple[Tensor, ...]
) -> None:
    """Write codes, overloads, peaks and energies; see ``framequant.kernels.sigma_delta.quantize_sequences``."""
    vectors, size = coefficients.shape
    with torch.cuda.device_of(coefficients):
        _quantize[(triton.cdiv(vectors, LANES),)](
            coefficients, inverse, *out, vectors, size,
            LEVELS=levels, ORDER=order, LIMIT=limit, LANES=LANES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
