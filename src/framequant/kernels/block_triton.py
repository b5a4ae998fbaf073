"""The end of a product whose output frame is local to blocks of rows: rotate, undo units, add the bias, store.

A program that has all columns of whole blocks of rows writes final outputs, so no launch follows it. Rows come in
float32, in units of the token and of a power of two above all scales, and are multiplied by a matrix of +1 and -1 as
the sum of two halves, which keeps 22 bits.

Also what several column groups of one program need: with few rows there are not enough programs to keep an
accelerator busy, so each warp takes columns of its own (``GROUPS``), and the sums of all warps are added up here.

Only ``framequant.kernels`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.transform_triton import two_halves_dot
from framequant.kernels.triton_support import let_next_start, over, wait_for_previous


@triton.jit
def block_matrix(matrix_ptr, BLOCK: tl.constexpr):
    """The matrix of a block, halves (BLOCK, BLOCK)."""
    i = tl.arange(0, BLOCK)
    return tl.load(matrix_ptr + i[:, None] * BLOCK + i[None, :])


@triton.jit
def block_constants(
    r,
    rows,
    matrix_ptr,
    top_ptr,
    places_ptr,
    signs_ptr,
    bias_ptr,
    norm,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """What rows need at their end, none of it from another kernel: to be loaded before the wait for one.

    Returns:
        The matrix, one over the power of two above all scales, and of the rows: places, signs times ``norm`` and that
        power, bias.
    """
    there, top = r < rows, tl.load(top_ptr)
    places = tl.load(places_ptr + r, mask=there, other=0)
    signs = tl.load(signs_ptr + r, mask=there, other=0).to(tl.float32) * (norm * top)
    bias = signs
    if BIAS:
        bias = tl.load(bias_ptr + places, mask=there, other=0.0).to(tl.float32)
    return block_matrix(matrix_ptr, BLOCK), over(top), places, signs, bias


@triton.jit
def rotated(value, matrix, BR: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each BLOCK of the BR rows of float32 (BR, BN) by the symmetric matrix.

    Values below 2**-14 lose bits, values above 65504 are lost.
    """
    count: tl.constexpr = BR // BLOCK
    if count > 1:
        value = tl.reshape(tl.trans(tl.reshape(value, [count, BLOCK, BN]), 0, 2, 1), [count * BN, BLOCK])
        value = two_halves_dot(value, matrix, True)
        value = tl.reshape(tl.trans(tl.reshape(value, [count, BN, BLOCK]), 0, 2, 1), [BR, BN])
    else:
        high = value.to(tl.float16)
        low = (value - high.to(tl.float32)).to(tl.float16)
        value = tl.dot(matrix, low, tl.dot(matrix, high))
    return value


@triton.jit
def store_outputs(value, unit, places, signs, bias, r, token, rows, tokens, y_ptr, BIAS: tl.constexpr):
    """Write rotated rows (rows, tokens) to their places among the outputs (tokens, rows)."""
    y = value * unit[None, :] * signs[:, None]
    if BIAS:
        y += bias[:, None]
    at = y_ptr + (token.to(tl.int64) * rows)[None, :] + places[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (r < rows)[:, None])


@triton.jit
def panel_unit(top, HALF: tl.constexpr):
    """The power of two by which a rotated panel is divided: 1 where weights suit its dtype.

    Else it makes them as large as the nearest that do: larger ones, times a token's norm, may be no halves.
    """
    unit = top * 0.0 + 1.0
    if HALF:
        unit = tl.where(top < 0.0009765625, top * 1024.0, tl.where(top > 256.0, top * 0.00390625, unit))
    return unit


@triton.jit
def finish_tokens(
    y_ptr, unit_ptr, top_ptr, bias_ptr, tokens, rows, HALF: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr,
    STEP: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Undo the units of some tokens' outputs and add the bias, in place; most tokens need neither."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    first, panel = tl.program_id(0) * TOKENS, panel_unit(tl.load(top_ptr), HALF)
    mine = first + tl.arange(0, TOKENS)
    units = tl.load(unit_ptr + mine, mask=mine < tokens, other=1.0) * panel
    if BIAS | (tl.max((units != 1.0).to(tl.int32), 0) > 0):
        for i in tl.range(0, tl.minimum(TOKENS, tokens - first)):
            token = first + i
            unit, line = tl.load(unit_ptr + token) * panel, y_ptr + token.to(tl.int64) * rows
            for start in tl.range(0, rows, STEP):
                r = start + tl.arange(0, STEP)
                y = tl.load(line + r, mask=r < rows, other=0.0).to(tl.float32) * unit
                if BIAS:
                    y += tl.load(bias_ptr + r, mask=r < rows, other=0.0).to(tl.float32)
                tl.store(line + r, y.to(y_ptr.dtype.element_ty), mask=r < rows)
