"""Walsh and Hadamard's transform of many tokens of 4096 numbers of 16 bits: a warp has a token in its registers.

A prompt's analysis without a frame reads every number once and writes it once, and nothing else may take longer. So all
16 loads of a warp are on their way at once, and nothing goes through shared memory or from lane to lane: the transform
is one of bits of a number's place, in any order, so each bit is transformed where it lies anyway. Of number
``256 j + 8 lane + e`` a word holds e's bit 0 in its halves, and 64 words the other bits of e and those of j.

1. Words are right operands of ``mma.m16n8k16``, times Sylvester's matrix of 16: bits 0, 3, 4 (the pair of a word, the
   quarter of a lane) and 9. The result has these in the lane's row and the former row, bits 5 … 7, in the quarter and
   the pair. Bits 10 and 11 are butterflies of its float32 registers.
2. Rounded to halves, they are right operands of the same: bits 5 … 7 and 8, which come back to where they were. Bits 1
   and 2 are butterflies.

So a lane writes the places that it read, 16 bytes each, and intermediates are rounded once. Powers of two that keep
halves in range are the left operands' entries. Only ``framequant.kernels.block_prompt_ops`` imports this module.
Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_analysis_triton import hadamard_operand, hadamard_registers
from framequant.kernels.lanes_triton import (
    BOTH_SIGNS,
    first_mma_halves,
    lane_largest,
    lane_sum,
    larger_pair,
    load_global_words,
    mma_eight_halves,
    packed_pair,
    shared_memory,
    store_words,
)
from framequant.kernels.prompt_transform_triton import LARGEST_NORM, LEAST_NORM
from framequant.kernels.triton_support import COMPILED, let_next_start, over, wait_for_previous

#: Numbers of a token.
SIZE: tl.constexpr = tl.constexpr(4096)
#: One as a half, twice.
ONES = tl.constexpr(0x3C003C00)


@triton.jit
def _load_signs(words_ptr, lane):
    """For each word of 16 bytes in bits j and 16 + j: whether its two numbers of the j-th 16 bytes change signs."""
    at = words_ptr + lane * 8
    first, second = load_global_words(at, 0, False), load_global_words(at, 16, False)
    return (
        first[0] | (first[1] << 16),
        first[2] | (first[3] << 16),
        second[0] | (second[1] << 16),
        second[2] | (second[3] << 16),
    )


@triton.jit
def _squares(words, lane):
    """The sum of squares of a token's halves: of the diagonals of columns times themselves.

    A left operand of two words as they were loaded needs no copy, but has a row that is not used.
    """
    zero = lane * 0.0
    sums = (zero, zero, zero, zero, zero, zero, zero, zero) * 2
    for i in tl.static_range(32):
        pair = words[2 * i], words[2 * i + 1]
        rest = ()
        for k in tl.static_range(8, 16):
            rest += (sums[k],)
        upper = mma_eight_halves((sums[0], sums[1], sums[2], sums[3]), pair[0], pair[1], pair[0])
        lower = mma_eight_halves((sums[4], sums[5], sums[6], sums[7]), pair[0], pair[1], pair[1])
        sums = rest + upper + lower
    even, odd = (sums[0] + sums[6]) + (sums[8] + sums[14]), (sums[1] + sums[7]) + (sums[9] + sums[15])
    row, column = lane // 4, lane % 4 * 2
    return lane_sum(tl.where(row == column, even, tl.where(row == column + 1, odd, 0.0)))


@triton.jit
def _half_scales(squares, norm):
    """A power of two for halves between the products, one for results, and the token's unit, of float16.

    The first makes a norm 2048 … 4096, and 8 times that of sums of 64, or is the largest or least that is a half.
    Results have the token's own norm if halves suit it, else one of 32 … 64.
    """
    # the root's exponent is half of the exponent; no norm but 0 is less than 2**-24
    half = (squares.to(tl.int32, bitcast=True) + 0x3F800000) >> 1
    power = tl.maximum(half & 0x7F800000, 103 << 23).to(tl.float32, bitcast=True)
    between = tl.minimum(tl.maximum(over(power) * 2048.0, 0.00048828125), 32768.0)
    suits = (squares >= LEAST_NORM * LEAST_NORM) & (squares <= LARGEST_NORM * LARGEST_NORM)
    unit = tl.where(suits, 1.0, power * 0.03125)
    return between, over(between) * over(unit) * norm, unit


@triton.jit
def _wide_scales(words, lane, norm):
    """The same of bfloat16, by the largest number, as squares leave float32's range. The unit is 1."""
    most = (lane * 0, lane * 0, lane * 0, lane * 0)
    for i in tl.static_range(16):
        new = ()
        for k in tl.static_range(4):
            new += (larger_pair(most[k], words[4 * i + k]),)
        most = new
    pair = larger_pair(larger_pair(most[0], most[1]), larger_pair(most[2], most[3]))
    largest = tl.maximum(pair & 0xFFFF, (pair >> 16) & 0xFFFF) << 16
    bits = lane_largest(largest.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23).to(tl.float32, bitcast=True)
    return over(power), power * norm, power * 0.0 + 1.0


@triton.jit
def _first_axes(words, signs, operand, between, DTYPE: tl.constexpr):
    """Bits 0, 3, 4, 9, 10 and 11: halves, times ``between``, in the order of bits 2, 1, 8, 11, 10 and 9."""
    power = packed_pair(between, between, DTYPE)
    plus, minus = operand[0] ^ ONES ^ power, operand[3] ^ ONES ^ power
    found = ()
    for group in tl.static_range(8):
        values = ()
        for k in tl.static_range(4):
            pair = ()
            for e in tl.static_range(2):
                flips = (signs[group // 2] << (15 - group % 2 - 2 * e - 4 * k)) & BOTH_SIGNS
                pair += (words[16 * k + 8 * e + group % 2 * 4 + group // 2] ^ flips,)
            values += first_mma_halves(plus, plus, plus, minus, pair[0], pair[1], DTYPE)
        values = hadamard_registers(values, 16, 4)
        for i in tl.static_range(8):
            found += (packed_pair(values[2 * i], values[2 * i + 1], tl.float16),)
    return found


@triton.jit
def _last_axes(words, plus, minus, scale, AT: tl.constexpr, DTYPE: tl.constexpr):
    """The other bits, of 8 from ``_first_axes``: the AT-th and every eighth from it, in the order of bits 8, 2 and 1.

    Results are of float16 if operands have their scale.
    """
    values = ()
    for w in tl.static_range(4):
        values += first_mma_halves(plus, plus, plus, minus, words[16 * w + AT], words[16 * w + 8 + AT])
    values = hadamard_registers(values, 16, 4)
    found = ()
    for low in tl.static_range(2):
        for w in tl.static_range(4):
            first, second = values[4 * w + 2 * low], values[4 * w + 2 * low + 1]
            if tl.bfloat16 == DTYPE:
                first, second = first * scale, second * scale
            found += (packed_pair(first, second, DTYPE),)
    return found


@triton.jit
def walsh_tokens(
    x_ptr, words_ptr, out_ptr, unit_ptr, tokens, x_stride, norm, WARPS: tl.constexpr, PDL: tl.constexpr,
    SPARE: tl.constexpr = 0,
):  # fmt: skip
    """Transform tokens of SIZE numbers, one a warp, as ``prompt_transform`` with PLAIN does; there units differ.

    The next kernel may start when those before this one have finished. It must not write what this one reads.

    Args:
        x_ptr: float16 or bfloat16, rows of ``x_stride``; every row is aligned to 16 bytes.
        words_ptr: ``transform_plan.sign_words`` of 256.
        out_ptr: (tokens, SIZE) of the same dtype.
        unit_ptr: float32 (tokens,).
        norm: a power of two, from 2**-7 to 1.
        SPARE: bytes of shared memory that nothing uses (``launches.WALSH_SPARE``).
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    token = tl.program_id(0) * WARPS + thread // 32
    token = tl.minimum(token, tokens - 1).to(tl.int64)  # warps beyond the last one make it again
    signs = _load_signs(words_ptr, lane)
    operand = hadamard_operand(lane, tl.float16)
    if COMPILED and SPARE > 0:
        shared_memory(SPARE, None)
    wait_for_previous(PDL)
    let_next_start(PDL)
    at = x_ptr + (token * x_stride + lane * 8)
    words = ()
    for j in tl.static_range(16):
        words += load_global_words(at, j * 512, True)
    if tl.bfloat16 == DTYPE:
        between, scale, unit = _wide_scales(words, lane, norm)
        power = lane * 0 + ONES
    else:
        between, scale, unit = _half_scales(_squares(words, lane), norm)
        power = packed_pair(scale, scale, DTYPE)
    words = _first_axes(words, signs, operand, between, DTYPE)
    plus, minus = operand[0] ^ ONES ^ power, operand[3] ^ ONES ^ power
    to = out_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (token * (2 * SIZE) + lane * 16)
    for k in tl.static_range(8):
        found = _last_axes(words, plus, minus, scale, k, DTYPE)
        store_words(to, (found[0], found[1], found[2], found[3]), k * 1024)
        store_words(to, (found[4], found[5], found[6], found[7]), k * 1024 + 512)
    tl.store(unit_ptr + token, unit, mask=lane == 0)
