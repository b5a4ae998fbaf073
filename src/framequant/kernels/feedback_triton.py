"""The inner loop of LDLQ on a GPU: one warp rounds a few rows, whose block of columns stays in its registers.

A column is read out of the block by a masked sum, which is exact, rounded, and its error taken off the
columns after it by an outer product. Fused multiply-adds are off, so sums are those of the CPU, bit for bit.

Only ``framequant.kernels.feedback`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
#: 1.5 · 2⁵²: added and taken off again, it leaves a number below 2⁵¹ rounded to an integer, ties to even.
ROUNDER = tl.constexpr(6755399441055744.0)


@triton.jit
def _round(
    work, factor, stride, scales, offsets, zeros, levels, middles, groups, previous, codes, values, solved,
    columns, rows, LEVELS: tl.constexpr, UNIFORM: tl.constexpr, MOVES: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Round ``ROWS`` rows of a block of at most ``COLUMNS`` columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = row < rows
    inside = (column < columns)[:, None] & valid[None, :]
    block = tl.load(work + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    lowest = tl.load(levels)
    for j in range(0, columns):
        x = tl.sum(tl.where((column == j)[:, None], block, 0.0), axis=0)
        line = tl.load(groups + j) * rows
        scale = tl.load(scales + line + row, mask=valid, other=1.0)
        zero = tl.load(zeros + line + row, mask=valid, other=0.0)
        unit = x / scale + tl.load(offsets + line + row, mask=valid, other=0.0)
        if UNIFORM:
            unit = tl.where(unit < 0.0, 0.0, unit)
            unit = tl.where(unit > LEVELS - 1, LEVELS - 1.0, unit)
            unit = (unit + ROUNDER) - ROUNDER
            code = tl.where(unit == unit, unit, 0.0).to(tl.int32)
            value = (unit + lowest - zero) * scale
        else:
            code = tl.zeros([ROWS], tl.int32)
            for i in tl.static_range(LEVELS - 1):
                code += (unit > tl.load(middles + i)).to(tl.int32)
            value = (tl.load(levels + code) - zero) * scale
            value = tl.where(unit == unit, value, unit)
        here = j * rows + row
        if MOVES:
            error = tl.load(previous + here, mask=valid, other=0.0) - value
        else:
            error = x - value
        error = error / tl.load(factor + j * (stride + 1))
        tl.store(codes + here, code.to(tl.uint8), mask=valid)
        tl.store(values + here, value, mask=valid)
        tl.store(solved + here, error, mask=valid)
        later = tl.load(factor + j * stride + column, mask=(column > j) & (column < columns), other=0.0)
        block -= later[:, None] * error[None, :]


def round_block(
    work: Tensor, factor: Tensor, table, groups: Tensor, previous: Tensor | None,
    codes: Tensor, values: Tensor, solved: Tensor,
) -> None:  # fmt: skip
    """Write codes, values and solved errors; see ``framequant.kernels.feedback.round_block``."""
    columns, rows = work.shape
    factor = factor.contiguous()
    uniform = table.middles is None
    with torch.cuda.device_of(work):
        _round[(triton.cdiv(rows, ROWS),)](
            work, factor, factor.stride(0), table.scales, table.offsets, table.zero_points, table.levels,
            table.levels if uniform else table.middles, groups, work if previous is None else previous,
            codes, values, solved, columns, rows, LEVELS=len(table.levels), UNIFORM=uniform,
            MOVES=previous is not None, COLUMNS=triton.next_power_of_2(columns), ROWS=ROWS, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
