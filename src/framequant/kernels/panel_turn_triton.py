"""A panel for cuBLAS of a trellis code whose outputs are rotated in blocks of 32 rows: levels never leave registers.

A lane makes those of a tile's weights that it has in the left operand of a tensor core's product: of 32 rows, two tiles
one below the other, eight rows each of two columns. Every weight is a window of its tile's ring of bits, at a place
that the pattern of rates, the row and the column tell (``trellis_triton``); so places are made once for all tiles, and
a weight of any rate is two words from shared memory, a funnel shift, a mask, a multiplication and a sum of bytes. That
is added to the bits of a half, a power of two, in units of its last place, so it is no integer any more; what is to be
taken off sums is the same for all weights, and products with the rotation begin with it. From there on a panel is made
as in ``panel_rotation_triton``.

A *unit* is what a warp makes at a time: eight tiles side by side, and eight below them. Only
``framequant.kernels.block_prompt_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import panel_unit
from framequant.kernels.lanes_triton import (
    BOTH_SIGNS,
    load_global_words,
    load_shared,
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
    sums_times,
    turn_group,
)
from framequant.kernels.trellis_triton import (
    byte_places,
    centre,
    funnel,
    level_pair,
    offset,
    per_state,
    tile_words,
)
from framequant.kernels.triton_support import over, wait_for_previous

#: Tiles of a unit side by side.
TILES = tl.constexpr(8)


@triton.constexpr_function
def ring_words(pattern):
    """Words of a tile in shared memory: the first one follows the last, so that a window is in two adjacent words."""
    return tile_words(pattern) + 1


@triton.constexpr_function
def column_words(pattern):
    """Words from a tile in shared memory to the one beside it; four such begin 16 banks further on."""
    return (2 * ring_words(pattern) + 3) // 8 * 8 + 4


@triton.constexpr_function
def turn_bytes(units, warps, pattern):
    """Shared memory of a program: words of the units of its warps, and outputs of half a unit of each."""
    return warps * (units * TILES * column_words(pattern) * 4 + 32 * PITCH)


@triton.constexpr_function
def _turns(pattern):
    """Loads of 16 bytes by which the lanes of a warp bring a unit's words: two lanes bring a row of them."""
    return (4 * tile_words(pattern) + 31) // 32


@triton.jit
def _piece(lane, TURN: tl.constexpr, PATTERN: tl.constexpr):
    """Row of words, of both tiles that are one below the other, and half of it that a lane brings."""
    piece = tl.minimum(TURN * 32 + lane, 4 * tile_words(PATTERN) - 1)
    return piece // 2, piece % 2


@triton.jit
def _held_words(words_ptr, down, tile, stride, lane, PATTERN: tl.constexpr):
    """Words of a unit whose first row of words is ``down``."""
    found = ()
    for i in tl.static_range(_turns(PATTERN)):
        line, half = _piece(lane, i, PATTERN)
        found += load_global_words(
            words_ptr + ((down + line).to(tl.int64) * stride + (tile + half * 4)), 0, True
        )
    return found


@triton.jit
def _keep_words(codes, held, lane, PATTERN: tl.constexpr):
    """Write them to shared memory, tile by tile, its words one after the other; a barrier must follow."""
    height: tl.constexpr = tile_words(PATTERN)
    beside: tl.constexpr = column_words(PATTERN) * 4
    for i in tl.static_range(_turns(PATTERN)):
        line, half = _piece(lane, i, PATTERN)
        at = (
            codes + half * (4 * beside) + (line + line // height) * 4
        )  # the tile below is behind the other's ring
        again = at + tl.where(line % height == 0, height * 4, 0)
        for k in tl.static_range(4):
            value = held[4 * i + k].to(tl.float32, bitcast=True)
            store_shared(at, value, k * beside)
            store_shared(again, value, k * beside)


@triton.jit
def _state_places(row, quarter, PATTERN: tl.constexpr):
    """Where the states of a lane's eight weights of a tile lie: bytes to their first word, and bits above that.

    Of row ``8 j + 2 quarter + e`` and column ``row + 8 h`` they are the ``(4 j + 2 e + h)``-th.
    """
    height: tl.constexpr = tile_words(PATTERN)
    after = row * 0  # bits of the steps after a column, up to the eighth
    for step in tl.static_range(8):
        after += tl.where(row == step, offset(PATTERN, 8, step), 0)
    words, shifts = (), ()
    for j in tl.static_range(2):
        for e in tl.static_range(2):
            for h in tl.static_range(2):
                above = after + (1 - h) * height  # in the row: one has 2 * height bits
                if height % 16 == 0:  # rows are whole words, and a compiler is to see that
                    words += (((15 - 8 * j - e) - 2 * quarter) * (height // 16) * 4 + above // 32 * 4,)
                    shifts += (above % 32,)
                else:
                    place = (15 - 8 * j - e - 2 * quarter) * (2 * height) + above
                    words += (place // 32 * 4,)
                    shifts += (place % 32,)
    return words, shifts


@triton.jit
def _word(address, OFFSET: tl.constexpr):
    return load_shared(address, OFFSET).to(tl.int32, bitcast=True)


@triton.jit
def _windows(tile, words, shifts, OFFSET: tl.constexpr, PATTERN: tl.constexpr):
    """Windows of a lane's eight weights of a tile, OFFSET bytes on: of each eight rows, of both columns, two rows'."""
    found = ()
    for j in tl.static_range(2):
        line = ()
        if tile_words(PATTERN) == 16:  # a row is a word: those of two rows, and the one after them
            for i in tl.static_range(3):
                line += (_word(tile + words[4 * j + 2], OFFSET + 4 * i),)
        for h in tl.static_range(2):
            for e in tl.static_range(2):
                if tile_words(PATTERN) == 16:
                    found += (funnel(line[1 - e], line[2 - e], shifts[4 * j + 2 * e + h]),)
                else:
                    at = tile + words[4 * j + 2 * e + h]
                    found += (funnel(_word(at, OFFSET), _word(at, OFFSET + 4), shifts[4 * j + 2 * e + h]),)
    return found


@triton.jit
def turn_panel(
    words_ptr, scale_ptr, top_ptr, panel_ptr, places_ptr, signs_ptr, memory_ptr, stride, units, width, fraction,
    power, first, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, PATTERN: tl.constexpr,
    ROW_SCALES: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr = False,
    BEHIND: tl.constexpr = False,
):  # fmt: skip
    """Decode a block of 32 rows by UNITS units of each warp to rows of ``panel``, at ``places`` less ``first``.

    PDL and BEHIND as in ``panel_fold_triton.fold_panel``.

    Args:
        words_ptr: int32 (words of a tile * tiles down, stride), rows aligned to 32 bytes (``words.to_words``).
        scale_ptr: scales, (rows,) or one.
        top_ptr: a power of two above all scales, float32.
        panel_ptr: 16-bit floats (rows, width).
        places_ptr, signs_ptr: of rows, as in ``BlockPlan``.
        units: of a row: its columns over 128, rounded up; ``width`` is a multiple of 8.
        fraction, power: of two, of rotated rows, in levels of at most 1/2, as in ``block_plan.fold_gain``.
        BITS, MULTIPLIER, ADDEND, PATTERN: of the trellis (``WordLayout``).
    """
    height: tl.constexpr = tile_words(PATTERN)
    beside: tl.constexpr = column_words(PATTERN) * 4
    below: tl.constexpr = ring_words(PATTERN) * 4
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    row, quarter = lane // 4, lane % 4
    shared = shared_memory(turn_bytes(UNITS, WARPS, PATTERN), memory_ptr)
    codes = shared + warp * (UNITS * TILES * beside)
    turned = shared + WARPS * UNITS * TILES * beside + warp * (32 * PITCH)
    block = tl.program_id(1)
    unit = (tl.program_id(0) * WARPS + warp) * UNITS
    held = ()
    for u in tl.static_range(UNITS):
        tile = tl.minimum(unit + u, units - 1) * TILES  # warps beyond the last unit make it again
        held += _held_words(words_ptr, block * (2 * height), tile, stride, lane, PATTERN)
    top = tl.load(top_ptr)
    HALF: tl.constexpr = panel_ptr.dtype.element_ty == tl.float16
    rotation = rotation_operands(
        scale_ptr, signs_ptr, over(top) * fraction, block * 32, row, quarter, ROW_SCALES
    )
    power *= top * over(panel_unit(top, HALF))
    one = row * 0 + 0x3C00
    if HALF:  # at most 2**10, at least 2**-10
        one += ((power.to(tl.int32, bitcast=True) >> 23) - 127) << 10
    start = sums_times((one + centre(PATTERN)) * 0x10001 ^ BOTH_SIGNS, rotation)
    words, shifts = _state_places(row, quarter, PATTERN)
    each: tl.constexpr = per_state(PATTERN)
    places = tl.where(row % each == 0, byte_places(each, 0), byte_places(each, each - 1))
    keep_place(turned, lane, (tl.load(places_ptr + block * 32 + lane) - first) * (2 * width))
    count: tl.constexpr = 4 * _turns(PATTERN)
    for u in tl.static_range(UNITS):
        _keep_words(codes + u * (TILES * beside), held[u * count : (u + 1) * count], lane, PATTERN)
    warp_barrier(thread)
    if not BEHIND:
        wait_for_previous(PDL)
    for step in tl.range(0, 2 * UNITS):
        for group in tl.static_range(4):
            windows = ()
            for down in tl.static_range(2):
                at = codes + step * (4 * beside)
                windows += _windows(at, words, shifts, group * beside + down * below, PATTERN)
            operands = ()
            for i in tl.static_range(8):
                operands += (
                    level_pair(windows[2 * i], windows[2 * i + 1], places, one, BITS, MULTIPLIER, ADDEND),
                )
            found = rotated(operands, rotation, start, power, not HALF, panel_ptr.dtype.element_ty)
            turn_group(turned, lane, found, group)
        warp_barrier(thread)
        column = (tl.minimum(unit + step // 2, units - 1) * 2 + step % 2) * TURNED
        store_turned(panel_ptr, turned, lane, column, width, False)
        warp_barrier(thread)
    if BEHIND:
        wait_for_previous(PDL)
