"""A panel of D̃ for cuBLAS: some rows decoded to halves, in the order of their columns.

A prompt has so many tokens that multiplying takes longer than writing the decoded weights, and no loop of ours
multiplies as fast as cuBLAS: so rows are decoded into a bounded buffer that mostly stays in the L2 cache, and
multiplied from there. Bound by the two bytes written for a weight, so codes are read once and stores are vectors:
a thread holds a word, or half of the row of a trellis tile, all codes of which it makes itself.

Levels are scaled to at most 1/2 and a row by its scale over a power of two above all scales, so no product of a panel
with coefficients of ``prompt_transform_triton`` leaves the range of halves. Two-bit codes stay exact (scales have
eight bits).

Where the output frame is local to blocks of rows, a panel's rows are rotated as well and stand where the outputs are,
in the outputs' dtype and unit (``block_triton``): what cuBLAS then writes are outputs.

Only ``framequant.kernels.prompt_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import block_matrix, panel_unit
from framequant.kernels.packed_triton import is_plain, num_planes, packed_fields, unit_codes
from framequant.kernels.trellis_triton import (
    byte_places,
    byte_sum,
    centre,
    is_aligned,
    loaded_words,
    moved,
    moved_words,
    offset,
    per_state,
    run_place,
    tile_words,
    window,
    word_around,
)
from framequant.kernels.triton_support import COMPILED, over

#: Weights of a trellis that one thread makes: half a row of a tile.
RUN = tl.constexpr(8)

#: Value of a unit of a trellis level in a panel: levels are -510 ... 510 at most.
TRELLIS_UNIT = 2.0**-10


@triton.constexpr_function
def _sum_text(places):
    """PTX of ``_trellis_level``: onto the float32 2**23, whose last bit is 1."""
    return f"dp4a.u32.u32 $0, $1, {places}, 0x4b000000;"


@triton.jit
def _trellis_level(h, PLACES: tl.constexpr, CENTRE: tl.constexpr):
    """The sum of those bytes of uint32 that PLACES has a 1 for, less CENTRE, as float32."""
    if COMPILED:
        text: tl.constexpr = _sum_text(PLACES)
        bits = tl.inline_asm_elementwise(text, "=r,r", [h], dtype=tl.int32, is_pure=True, pack=1)
        level = bits.to(tl.float32, bitcast=True) - (8388608.0 + CENTRE)
    else:
        level = byte_sum(h.to(tl.uint64), PLACES).to(tl.float32) - CENTRE
    return level


@triton.jit
def _trellis_values(
    words, ratio, INDEX: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    PATTERN: tl.constexpr,
):  # fmt: skip
    """The INDEX-th levels of runs in place times their row's ratio, halves."""
    state = window(words, offset(PATTERN, RUN, INDEX), BITS).to(tl.uint32, bitcast=True) & ((1 << BITS) - 1)
    places: tl.constexpr = byte_places(per_state(PATTERN), INDEX % per_state(PATTERN))
    level = _trellis_level(state * MULTIPLIER + ADDEND, places, centre(PATTERN))
    return (level * (ratio * 0.0009765625)).to(tl.float16)


@triton.jit
def _values(w, ratio, INDEX: tl.constexpr, BITS: tl.constexpr):
    """The INDEX-th levels of words, or units, of scalar codes times their row's ratio, halves."""
    if is_plain(BITS):
        code = (w[0].to(tl.uint32) >> (BITS * INDEX)) & ((1 << BITS) - 1)
    else:
        code = packed_fields(w, INDEX, BITS).to(tl.uint32)
    one_and_code = ((code << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + code / 2**BITS
    return (one_and_code * ratio - (1.0 + ((1 << BITS) - 1) / (2 << BITS)) * ratio).to(tl.float16)


@triton.jit
def _runs(
    words_ptr, r, k, there, stride, BITS: tl.constexpr, PATTERN: tl.constexpr
):  # fmt: skip
    """The words of the ``k``-th half rows of rows ``r`` of a trellis, in place."""
    word, shift = run_place((r % 16 * 2)[:, None] + (k % 2)[None, :], PATTERN, RUN)
    tile_at = (
        words_ptr + ((r // 16).to(tl.int64) * (tile_words(PATTERN) * stride))[:, None] + (k // 2)[None, :]
    )
    loaded = ()
    for i in tl.static_range(loaded_words(PATTERN, RUN, BITS)):
        loaded += (tl.load(tile_at + word_around(word, i, PATTERN) * stride, mask=there, other=0),)
    return moved(loaded, shift, moved_words(PATTERN, RUN, BITS), is_aligned(PATTERN, RUN))


@triton.jit
def _halved(values, COUNT: tl.constexpr):
    """Interleave the i-th tensor with the one half the list further on: half as many, twice as wide."""
    found = ()
    for i in tl.static_range(COUNT // 2):
        found += (tl.interleave(values[i], values[i + COUNT // 2]),)
    return found


@triton.jit
def decode_panel(
    words_ptr, scale_ptr, top_ptr, panel_ptr, rows, stride, width,
    TRELLIS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    PATTERN: tl.constexpr, ROW_SCALES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    places_ptr=None, signs_ptr=None, matrix_ptr=None, gain=1.0, first=0, BLOCK: tl.constexpr = 0,
):  # fmt: skip
    """Decode BR * STEPS rows by BK words, units, or half rows of trellis tiles; see the module's text.

    With BLOCK, which is BR, each block is multiplied by ``matrix`` and ``gain``, and its rows by ``signs``, and stored
    at their ``places`` less ``first``.

    Args:
        words_ptr: int16 (rows, planes, stride), or int32 (words of a tile * tiles down, stride) of a trellis.
        scale_ptr: scales, (rows,) or one.
        top_ptr: a power of two above all scales, float32.
        panel_ptr: halves (rows, width); with BLOCK of any 16-bit dtype.
        width: coefficients of a row and what fills it up to a multiple of 16; the filling is finite.
    """
    codes: tl.constexpr = RUN if TRELLIS else unit_codes(1 << BITS, BITS)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    column = tl.program_id(0) * (BK * codes) + tl.arange(0, BK * codes)
    word = k // 2 if TRELLIS else k
    top = tl.load(top_ptr)
    over_top = over(top)
    if BLOCK > 0:
        matrix = block_matrix(matrix_ptr, BLOCK)
        gain *= top * over(panel_unit(top, panel_ptr.dtype.element_ty == tl.float16))
    for step in tl.static_range(STEPS):
        r = (tl.program_id(1) * STEPS + step) * BR + tl.arange(0, BR)
        there = (r < rows)[:, None] & (word < stride)[None, :]
        if TRELLIS:
            w = _runs(words_ptr, r, k, there, stride, BITS, PATTERN)
        else:
            w = ()
            for i in tl.static_range(num_planes(BITS)):
                place = (r.to(tl.int64) * num_planes(BITS) + i) * stride
                w += (tl.load(words_ptr + place[:, None] + k[None, :], mask=there, other=0),)
        if ROW_SCALES:
            ratio = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32) * over_top
        else:
            ratio = tl.load(scale_ptr + r * 0).to(tl.float32) * over_top
        values = ()
        for i in tl.static_range(codes):
            if TRELLIS:
                values += (_trellis_values(w, ratio[:, None], i, BITS, MULTIPLIER, ADDEND, PATTERN),)
            else:
                values += (_values(w, ratio[:, None], i, BITS),)
        if codes > 8:
            values = _halved(values, codes)
        if codes > 4:
            values = _halved(values, 8)
        tile = _halved(_halved(values, 4), 2)[0]
        if BLOCK > 0:
            signs = tl.load(signs_ptr + r, mask=r < rows, other=0).to(tl.float32) * gain
            tile = (tl.dot(matrix, tile) * signs[:, None]).to(panel_ptr.dtype.element_ty)
            to = tl.load(places_ptr + r, mask=r < rows, other=0) - first
        else:
            to = r
        place = panel_ptr + (to.to(tl.int64) * width)[:, None] + column[None, :]
        tl.store(place, tile, mask=(r < rows)[:, None] & (column < width)[None, :])
