"""The second half of a panel for cuBLAS that has a rotation of blocks of 32 rows in it, in registers of a warp.

Weights of 32 rows, of one column each way (16 columns, 32 rows), are left operands of tensor cores; the right ones are
Sylvester's matrix of 32 with scales of its rows and signs of its columns. The result, (16 columns, 32 outputs), is
turned to rows in shared memory, four groups of 16 columns side by side, and written 16 bytes a lane.

Only ``panel_fold_triton`` and ``panel_turn_triton`` import this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lanes_triton import (
    BOTH_SIGNS,
    first_mma_halves,
    four,
    load_shared,
    load_shared_words,
    mma_halves,
    packed_pair,
    store_shared,
    store_shared_transposed,
    store_words,
    store_words_where,
)

#: Columns that are turned to rows at a time: half a unit.
TURNED = tl.constexpr(64)
#: Bytes of a row of them in shared memory, and 16 for its place: so rows begin in other banks.
PITCH = tl.constexpr(2 * TURNED.value + 16)


@triton.jit
def _parity(number):
    """Whether three bits have an odd sum, 0 or 1."""
    return (number ^ (number >> 1) ^ (number >> 2)) & 1


@triton.constexpr_function
def _fixed_sign(n, k):
    """The signs that Sylvester's matrix has where the eight columns n and the eight rows k meet, beside its own."""
    return BOTH_SIGNS.value if bin(n & k).count("1") % 2 else 0


@triton.jit
def rotation_operands(scale_ptr, signs_ptr, factor, base, row, quarter, ROW_SCALES: tl.constexpr):
    """Sylvester's matrix of 32 with scales of its rows, times ``factor``, and signs of its columns, as right operands.

    Of each two times 16 rows, and of them 8, for the four times eight columns: 16 words.
    """
    scaled = ()
    for k in tl.static_range(4):
        pair = ()
        for e in tl.static_range(2):
            at = (base + 8 * k + 2 * quarter + e) if ROW_SCALES else quarter * 0
            pair += (tl.load(scale_ptr + at).to(tl.float32) * factor,)
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
def rotated(operands, rotation, start, gain, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    """Outputs of 16 columns: for each two of eight outputs, words of columns 0 … 7 and 8 …; SCALED: times ``gain``.

    ``operands``: for each four of eight rows, pairs of two rows of columns 0 … 7 and 8 …; ``rotation``: of
    ``rotation_operands``; ``start``: what sums begin with, four float32 for each eight outputs, or nothing.
    """
    found = ()
    for n in tl.static_range(4):
        if len(start) > 0:
            acc = mma_halves(
                four(start, n), operands[0], operands[1], operands[2], operands[3], rotation[4 * n],
                rotation[4 * n + 1],
            )  # fmt: skip
        else:
            acc = first_mma_halves(
                operands[0], operands[1], operands[2], operands[3], rotation[4 * n], rotation[4 * n + 1]
            )
        acc = mma_halves(
            acc, operands[4], operands[5], operands[6], operands[7], rotation[4 * n + 2], rotation[4 * n + 3]
        )
        if SCALED:
            acc = (acc[0] * gain, acc[1] * gain, acc[2] * gain, acc[3] * gain)
        found += (packed_pair(acc[0], acc[1], DTYPE), packed_pair(acc[2], acc[3], DTYPE))
    return found


@triton.jit
def sums_times(word, rotation):
    """For each eight outputs four float32: sums of the rotation's rows times the half that is twice in a word."""
    found = ()
    for n in tl.static_range(4):
        acc = first_mma_halves(word, word, word, word, rotation[4 * n], rotation[4 * n + 1])
        found += mma_halves(acc, word, word, word, word, rotation[4 * n + 2], rotation[4 * n + 3])
    return found


@triton.jit
def keep_place(turned, lane, place):
    """Note in shared memory at which byte of the panel the row of each lane begins; a barrier must follow."""
    store_shared(turned + lane * PITCH, place.to(tl.float32, bitcast=True), PITCH - 16)


@triton.jit
def turn_group(turned, lane, found, GROUP: tl.constexpr):
    """Write what ``rotated`` returns as the GROUP-th 16 columns of 32 rows in shared memory; a barrier must follow."""
    column = turned + (lane // 16 * 8 + lane % 8) * PITCH + lane // 8 % 2 * 16
    for n in tl.static_range(2):
        store_shared_transposed(column, four(found, n), n * 16 * PITCH + GROUP * 32)


@triton.jit
def store_turned(panel_ptr, turned, lane, column, width, WHOLE: tl.constexpr):
    """Write 32 rows of TURNED columns, those below ``width``, a multiple of 8, from ``column`` on; WHOLE: all are."""
    to = panel_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + lane % 8 * 16
    to += column * 2
    for i in tl.static_range(8):
        found = load_shared_words(turned + lane // 8 * PITCH + lane % 8 * 16, i * 4 * PITCH)
        begin = load_shared(turned + lane // 8 * PITCH, i * 4 * PITCH + PITCH - 16).to(tl.int32, bitcast=True)
        if WHOLE:
            store_words(to + begin, found)
        else:
            store_words_where(to + begin, found, (column + lane % 8 * 8 < width).to(tl.int32))
