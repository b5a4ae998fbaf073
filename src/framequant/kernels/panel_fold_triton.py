"""A panel for cuBLAS where both frames are multiplied into the weights: two-bit codes, blocks of 32 rows.

A frame of redundancy r is r times as many columns for cuBLAS, and that is all a prompt can lose. So 18 coefficients of
a row become the 16 coordinates that their block of the frame makes of them, and cuBLAS multiplies what the Hadamard
transform alone makes of activations; and 32 rows become outputs, as in ``panel_triton``. Both are products of small
matrices on tensor cores whose operands stay in registers (``lanes_triton``):

1. transposed codes of a *group* of 18, (18, 32 rows), masked where they lie: subnormal halves, times powers of two;
   the frame's block (16, 18), over these powers, times them. 16 of the 18 are a product of their own, the last two of
   four groups share one, in which the other groups' are multiplied by zeros.
2. Its registers, rounded to halves, are the left operand of the next: (16, 32) times the rotation of a block of 32
   rows, each with its scale and sign.
3. The result is turned to rows in shared memory and written 16 bytes a lane.

A warp makes half a *unit* at a time, four of eight groups, 36 bytes of codes of each row. Only
``framequant.kernels.block_prompt_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import panel_unit
from framequant.kernels.lanes_triton import (
    byte_of_two,
    first_mma_halves,
    four,
    load_shared,
    load_shared_words,
    mma_eight_halves,
    mma_halves,
    packed_pair,
    shared_memory,
    store_shared,
    store_shared_transposed,
    store_words,
    warp_barrier,
)
from framequant.kernels.triton_support import over, wait_for_previous

#: Bytes of a unit's codes of a row.
UNIT_BYTES = tl.constexpr(36)
#: Bytes of a row of half a unit's outputs in shared memory, and 16 for its place: so rows begin in other banks.
PITCH = tl.constexpr(2 * 16 * 4 + 16)
#: Masked codes are subnormal halves: 2**-24 times a power of four; the block's entries are 2**10 times over that power.
LIFT = tl.constexpr(1024.0)
#: The signs of both halves of a word.
BOTH_SIGNS = tl.constexpr(0x80008000 - (1 << 32))


@triton.constexpr_function
def fold_bytes(units, warps):
    """Shared memory of a program: codes of the units of its warps, and outputs of half a unit of each."""
    return 32 * (units * UNIT_BYTES + PITCH) * warps


@triton.jit
def _frame_pair(frame_ptr, coefficient, coordinate, odd):
    """Entries of two coefficients from an even one on, as they meet codes in an even or odd half of a byte."""
    lift = tl.where(odd, LIFT / 16, LIFT)
    first = tl.load(frame_ptr + coefficient * 16 + coordinate)
    return packed_pair(
        first * lift, tl.load(frame_ptr + coefficient * 16 + 16 + coordinate) * (lift * 0.25), tl.float16
    )


@triton.jit
def _frame_operands(frame_ptr, row, quarter, odd):
    """The block's transpose as left operand of 16 coefficients, whose codes begin in an even or odd half of a byte."""
    found = ()
    for k in tl.static_range(2):
        for m in tl.static_range(2):
            found += (_frame_pair(frame_ptr, 8 * k + 2 * quarter, row + 8 * m, odd),)
    return found


@triton.jit
def _parity(number):
    """Whether three bits have an odd sum, 0 or 1."""
    return (number ^ (number >> 1) ^ (number >> 2)) & 1


@triton.constexpr_function
def _fixed_sign(n, k):
    """The signs that Sylvester's matrix has where the eight columns n and the eight rows k meet, beside its own."""
    return 0x80008000 - (1 << 32) if bin(n & k).count("1") % 2 else 0


@triton.jit
def _rotation_operands(scale_ptr, signs_ptr, over_top, base, row, quarter, ROW_SCALES: tl.constexpr):
    """Sylvester's matrix of 32 with scales of its rows and signs of its columns, as right operands.

    Of each two times 16 rows, and of them 8, for the four times eight columns: 16 words.
    """
    scaled = ()
    for k in tl.static_range(4):
        pair = ()
        for e in tl.static_range(2):
            at = (base + 8 * k + 2 * quarter + e) if ROW_SCALES else quarter * 0
            pair += (tl.load(scale_ptr + at).to(tl.float32) * over_top,)
        scaled += (packed_pair(pair[0], pair[1], tl.float16),)
    flips = (_parity(row & (2 * quarter)) << 15) | (_parity(row & (2 * quarter + 1)) << 31)
    found = ()
    for n in tl.static_range(4):
        negative = tl.load(signs_ptr + base + 8 * n + row).to(tl.int32) < 0
        sign = flips ^ tl.where(negative, BOTH_SIGNS, 0)
        for k in tl.static_range(4):
            found += (scaled[k] ^ sign ^ _fixed_sign(n, k),)
    return found


@triton.jit
def _last_codes(words, quarter, selector, mask):
    """Of the quarter-th of four groups the last two codes, of four rows of five words each."""
    found = ()
    for j in tl.static_range(4):
        low = tl.where(quarter < 2, words[5 * j + 1], words[5 * j + 3])
        high = tl.where(quarter < 2, words[5 * j + 2], words[5 * j + 4])
        found += (byte_of_two(low, high, selector, mask),)
    return found


@triton.jit
def _group(words, last, frame, ends, start, rotation, selector, mask, lift, gain, GROUP: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """Outputs of a group: for each two of eight columns of rows, words of coordinates 0 … 7 and 8 ….

    ``lift``: what sums are multiplied by before they are halves; ``gain``: and outputs, if these are not.
    """
    operands = ()
    for j in tl.static_range(4):
        low, high = words[5 * j + GROUP], words[5 * j + GROUP + 1]
        acc = mma_halves(
            start, frame[0], frame[1], frame[2], frame[3],
            byte_of_two(low, high, selector, mask), byte_of_two(low, high, selector + 0x2222, mask),
        )  # fmt: skip
        acc = mma_eight_halves(acc, ends[0], ends[1], last[j])
        operands += (packed_pair(acc[0] * lift, acc[1] * lift, tl.float16),)
        operands += (packed_pair(acc[2] * lift, acc[3] * lift, tl.float16),)
    found = ()
    for n in tl.static_range(4):
        acc = first_mma_halves(
            operands[0], operands[1], operands[2], operands[3], rotation[4 * n], rotation[4 * n + 1]
        )
        acc = mma_halves(
            acc, operands[4], operands[5], operands[6], operands[7], rotation[4 * n + 2], rotation[4 * n + 3]
        )
        if tl.bfloat16 == DTYPE:
            acc = (acc[0] * gain, acc[1] * gain, acc[2] * gain, acc[3] * gain)
        found += (packed_pair(acc[0], acc[1], DTYPE), packed_pair(acc[2], acc[3], DTYPE))
    return found


@triton.jit
def fold_panel(
    words_ptr, scale_ptr, top_ptr, panel_ptr, frame_ptr, places_ptr, signs_ptr, memory_ptr, row_bytes, units, width,
    gain, first, ROW_SCALES: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr = False,
    BEHIND: tl.constexpr = False,
):  # fmt: skip
    """Decode a block of 32 rows by UNITS units of each warp to rows of ``panel``, at ``places`` less ``first``.

    The kernel before this one is waited for before the first store. Or, BEHIND an analysis that has nothing to do with
    the panel, and that has waited for all kernels before, at the end: for the next kernel, which needs both.

    Args:
        words_ptr: two-bit codes, rows of ``row_bytes``, a multiple of 4.
        scale_ptr: scales, (rows,) or one.
        top_ptr: a power of two above all scales, float32.
        panel_ptr: 16-bit floats (rows, width).
        frame_ptr: float32 (20, 16), as in ``FoldPlan``.
        places_ptr, signs_ptr: of rows, as in ``BlockPlan``.
        units: of a row; ``width`` is 128 times as many.
        gain: a power of two, of rotated rows (``block_plan.fold_gain``).
    """
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    row, quarter = lane // 4, lane % 4
    shared = shared_memory(fold_bytes(UNITS, WARPS), memory_ptr)
    codes = shared + warp * (32 * UNIT_BYTES * UNITS)
    turned = shared + 32 * UNIT_BYTES * UNITS * WARPS + warp * (32 * PITCH)
    base = tl.program_id(1) * 32
    unit = (tl.program_id(0) * WARPS + warp) * UNITS
    bytes_ptr = words_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    held = ()  # until shared memory takes them; by ``cp.async`` they would come later (1 % of a prompt of 4096²)
    for u in tl.static_range(UNITS):
        at = tl.minimum(unit + u, units - 1) * UNIT_BYTES  # warps beyond the last unit make it again
        for turn in tl.static_range(9):
            piece = turn * 32 + lane
            source = bytes_ptr + ((base + piece // 9).to(tl.int64) * row_bytes + at + piece % 9 * 4)
            held += (tl.load(source.to(tl.pointer_type(tl.float32), bitcast=True)),)
    top = tl.load(top_ptr)
    rotation = _rotation_operands(scale_ptr, signs_ptr, over(top), base, row, quarter, ROW_SCALES)
    gain *= top * over(panel_unit(top, panel_ptr.dtype.element_ty == tl.float16))
    odd = quarter % 2 == 1
    frames = _frame_operands(frame_ptr, row, quarter, odd) + _frame_operands(
        frame_ptr, row, quarter, quarter % 2 == 0
    )
    ends = (
        _frame_pair(frame_ptr, row * 0 + 16, row, odd),
        _frame_pair(frame_ptr, row * 0 + 16, row + 8, odd),
    )
    start = ()  # what codes of -1.5 make, in units of what masked codes make of lifted entries
    for i in tl.static_range(4):  # each from a place of its own, or they would be made anew for each product
        start += (tl.load(frame_ptr + (288 + 16 * (i % 2) + 8 * (i // 2)) + row) * 0.00006103515625,)
    masks = (tl.where(odd, 0x00C00030, 0x000C0003), tl.where(odd, 0x000C0003, 0x00C00030))
    selectors = (quarter // 2 * 0x1111, (quarter + 1) // 2 * 0x1111)
    last_selector = (quarter % 2 * 4 + quarter // 2) * 0x1111
    lift = quarter * 0.0 + 16384.0  # a tensor, as all that goes through PTX
    if panel_ptr.dtype.element_ty == tl.float16:
        lift *= gain  # at most 2**6, at least 2**-12
    column = turned + (lane // 16 * 8 + lane % 8) * PITCH + lane // 8 % 2 * 16
    place = (tl.load(places_ptr + base + lane) - first) * (2 * width)
    store_shared(turned + lane * PITCH, place.to(tl.float32, bitcast=True), PITCH - 16)
    for u in tl.static_range(UNITS):
        for turn in tl.static_range(9):
            store_shared(codes + (turn * 32 + lane) * 4, held[9 * u + turn], u * (32 * UNIT_BYTES))
    warp_barrier(thread)
    if not BEHIND:
        wait_for_previous(PDL)
    for step in tl.range(0, 2 * UNITS):
        half, later = step % 2, step // 2
        words = ()
        for j in tl.static_range(4):
            line = codes + later * (32 * UNIT_BYTES) + half * 16 + (8 * j + row) * UNIT_BYTES
            for i in tl.static_range(5):
                words += (load_shared(line, i * 4).to(tl.int32, bitcast=True),)
        last = _last_codes(words, quarter, last_selector + half * 0x2222, masks[0])
        for group in tl.static_range(4):
            mine = quarter == group
            found = _group(
                words, last, four(frames, group % 2), (tl.where(mine, ends[0], 0), tl.where(mine, ends[1], 0)), start,
                rotation, selectors[group % 2] + (2 * half + group // 2) * 0x1111, masks[group % 2], lift, gain, group,
                panel_ptr.dtype.element_ty,
            )  # fmt: skip
            for n in tl.static_range(2):
                store_shared_transposed(column, four(found, n), n * 16 * PITCH + group * 32)
        warp_barrier(thread)
        to = panel_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + lane % 8 * 16
        to += tl.minimum(unit + later, units - 1) * 256 + half * 128
        for turn in tl.static_range(8):
            found = load_shared_words(turned + lane // 8 * PITCH + lane % 8 * 16, turn * 4 * PITCH)
            begin = load_shared(turned + lane // 8 * PITCH, turn * 4 * PITCH + PITCH - 16)
            store_words(to + begin.to(tl.int32, bitcast=True), found)
        warp_barrier(thread)
    if BEHIND:
        wait_for_previous(PDL)
