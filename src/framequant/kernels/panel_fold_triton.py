"""A panel for cuBLAS where both frames are multiplied into the weights: two-bit codes, blocks of 32 rows.

A frame of redundancy r is r times as many columns for cuBLAS, and that is all a prompt can lose. So 18 coefficients of
a row become the 16 coordinates that their block of the frame makes of them, and cuBLAS multiplies what the Hadamard
transform alone makes of activations; and 32 rows become outputs, as in ``panel_triton``. Both are products of small
matrices on tensor cores whose operands stay in registers (``lanes_triton``):

1. transposed codes of a *group* of 18, (18, 32 rows), masked where they lie: subnormal halves, times powers of two;
   the frame's block (16, 18), over these powers, times them (``FoldPlan.lanes``). 16 of the 18 are a product of their
   own, the last two of four groups share one, in which the other groups' are multiplied by zeros.
2. Its registers, rounded to halves, are the left operand of the next: (16, 32) times the rotation of a block of 32
   rows, each with its scale and sign, which makes up for small codes.
3. The result is turned to rows in shared memory and written 16 bytes a lane (both in ``panel_rotation_triton``).

A warp makes half a *unit* at a time, four of eight groups, 36 bytes of codes of each row. Only
``framequant.kernels.block_prompt_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_plan import FOLD_LIFT
from framequant.kernels.block_triton import panel_unit
from framequant.kernels.lanes_triton import (
    byte_of_two,
    four,
    load_global_words,
    load_shared,
    mma_eight_halves,
    mma_halves,
    packed_pair,
    shared_memory,
    store_shared,
    warp_barrier,
)
from framequant.kernels.panel_rotation_triton import (
    PITCH,
    TURNED,
    keep_place,
    rotated,
    rotation_operands,
    store_turned,
    turn_group,
)
from framequant.kernels.triton_support import over, wait_for_previous

#: Bytes of a unit's codes of a row.
UNIT_BYTES = tl.constexpr(36)
#: What the first product is too small by, as masked codes are subnormal halves: 2**-24 (``block_plan.FOLD_LIFT``).
SMALL = tl.constexpr(FOLD_LIFT * 2.0**-24)


@triton.constexpr_function
def fold_bytes(units, warps):
    """Shared memory of a program: codes of the units of its warps, and outputs of half a unit of each."""
    return 32 * (units * UNIT_BYTES + PITCH) * warps


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
def _group(
    words, last, frame, ends, start, rotation, selector, mask, gain, GROUP: tl.constexpr, DTYPE: tl.constexpr
):
    """Outputs of a group: for each two of eight columns of rows, words of coordinates 0 … 7 and 8 ….

    ``gain``: what outputs are multiplied by if they are no halves.
    """
    operands = ()
    for j in tl.static_range(4):
        low, high = words[5 * j + GROUP], words[5 * j + GROUP + 1]
        acc = mma_halves(
            start, frame[0], frame[1], frame[2], frame[3],
            byte_of_two(low, high, selector, mask), byte_of_two(low, high, selector + 0x2222, mask),
        )  # fmt: skip
        acc = mma_eight_halves(acc, ends[0], ends[1], last[j])
        operands += (packed_pair(acc[0], acc[1], tl.float16),)
        operands += (packed_pair(acc[2], acc[3], tl.float16),)
    return rotated(operands, rotation, (), gain, tl.bfloat16 == DTYPE, DTYPE)


@triton.jit
def fold_panel(
    words_ptr, scale_ptr, top_ptr, panel_ptr, lanes_ptr, places_ptr, signs_ptr, memory_ptr, row_bytes, units, width,
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
        lanes_ptr: int32 (32, 16), as in ``FoldPlan``.
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
    HALF: tl.constexpr = panel_ptr.dtype.element_ty == tl.float16
    gain *= top * over(panel_unit(top, HALF)) * (1 / SMALL)
    unit_scale = over(top) * gain if HALF else over(top)  # of halves ``gain`` is 2**-3 to 2**15
    rotation = rotation_operands(scale_ptr, signs_ptr, unit_scale, base, row, quarter, ROW_SCALES)
    mine = ()
    for i in tl.static_range(4):
        mine += load_global_words(lanes_ptr + lane * 16, 16 * i, False)
    start = ()
    for i in tl.static_range(4):
        start += (mine[10 + i].to(tl.float32, bitcast=True),)
    odd = quarter % 2 == 1
    masks = (tl.where(odd, 0x00C00030, 0x000C0003), tl.where(odd, 0x000C0003, 0x00C00030))
    selectors = (quarter // 2 * 0x1111, (quarter + 1) // 2 * 0x1111)
    last_selector = (quarter % 2 * 4 + quarter // 2) * 0x1111
    keep_place(turned, lane, (tl.load(places_ptr + base + lane) - first) * (2 * width))
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
            ends = tl.where(quarter == group, mine[8], 0), tl.where(quarter == group, mine[9], 0)
            found = _group(
                words, last, four(mine, group % 2), ends, start, rotation,
                selectors[group % 2] + (2 * half + group // 2) * 0x1111, masks[group % 2], gain, group,
                panel_ptr.dtype.element_ty,
            )  # fmt: skip
            turn_group(turned, lane, found, group)
        warp_barrier(thread)
        column = (tl.minimum(unit + later, units - 1) * 2 + half) * TURNED
        store_turned(panel_ptr, turned, lane, column, width, True)
        warp_barrier(thread)
    if BEHIND:
        wait_for_previous(PDL)
