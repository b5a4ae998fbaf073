"""A panel of D̃ for cuBLAS from words of several digits (``packed_words.py``): a thread makes the codes of one word.

A unit has three or five times sixteen codes, which no vectors of a thread hold side by side. So which bits a word has
depends on the thread here; they are taken out by shifts of runtime amounts, and codes are stored one by one: some
times as many instructions for a weight as ``panel_triton.py`` has. Levels are scaled as there.

Only ``framequant.kernels.prompt_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.packed_triton import num_digits
from framequant.kernels.triton_support import over


@triton.jit
def _words(place, number, there, stride, BITS: tl.constexpr):
    """The words of rows that begin at ``place``, by their number in the row, as integers."""
    whole: tl.constexpr = 16 // BITS
    unit, index = number // 16, number % 16
    apart = index >= BITS * whole
    plane = tl.where(apart, 0, index // whole)
    shift = tl.where(apart, index, index % whole * BITS)
    mask = tl.where(apart, 1, (1 << BITS) - 1)
    found = (tl.load(place + (plane * stride + unit), mask=there, other=0).to(tl.int32) >> shift) & mask
    if BITS * whole < 16:
        for i in tl.static_range(1, BITS):
            bit = tl.load(place + (i * stride + unit), mask=there & apart, other=0).to(tl.int32) >> shift
            found |= tl.where(apart, bit & 1, 0) << i
    return found


@triton.jit
def decode_packed_panel(
    words_ptr, scale_ptr, top_ptr, panel_ptr, rows, stride, width,
    BITS: tl.constexpr, LEVELS: tl.constexpr, ROW_SCALES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Decode BR rows by BK words.

    Args:
        words_ptr: int16 (rows, BITS, stride).
        scale_ptr: scales, (rows,) or one.
        top_ptr: a power of two above all scales, float32.
        panel_ptr: halves (rows, width).
        width: coefficients of a row and what fills it up to a multiple of 16; the filling is finite.
    """
    count: tl.constexpr = num_digits(LEVELS, BITS)
    number = (tl.program_id(0) * BK + tl.arange(0, BK))[None, :]
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    there = (r < rows)[:, None] & (number < 16 * stride)
    place = words_ptr + (r.to(tl.int64) * (BITS * stride))[:, None]
    word = _words(place, number, there, stride, BITS).to(tl.uint32)
    over_top = over(tl.load(top_ptr))
    if ROW_SCALES:
        ratio = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32) * over_top
    else:
        ratio = tl.load(scale_ptr + r * 0).to(tl.float32) * over_top
    ratio *= 0.125
    panel_at = panel_ptr + (r.to(tl.int64) * width)[:, None]
    for i in tl.static_range(count):
        code = word % LEVELS
        word = word // LEVELS
        value = (code.to(tl.float32) - (LEVELS - 1) / 2) * ratio[:, None]
        column = number * count + i
        tl.store(panel_at + column, value.to(tl.float16), mask=(r < rows)[:, None] & (column < width))
