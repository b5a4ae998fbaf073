"""Analysis and synthesis of few tokens: one program for each index of the first axis, in float32 registers.

A program reads the whole vector and takes one row of the first factor, which needs no exchange between programs
and leaves a small matrix; the other axes follow. With one token this keeps as many multiprocessors busy as the
first axis is long; with many tokens the vector would be read too often, and ``transform_triton`` serves.

Only the matrices of the last axes meet halves: there the intermediate is the sum of two, divided by a power of two
that bounds it. Only ``framequant.kernels.triton_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.transform_triton import store_planes, two_halves_dot
from framequant.kernels.triton_support import COMPILED, let_next_start, wait_for_previous


@triton.jit
def _squares_largest(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit
def bound(squares, largest, SIZE: tl.constexpr):
    """Exponent bits of a power of two above the norm; of a cruder bound where the squares leave float32's range."""
    length = tl.sqrt(squares)
    safe = (squares > 1e-30) & (squares < 1e30)
    length = tl.where(safe, length, tl.minimum(largest, 1.7e38 / SIZE) * SIZE)
    bits = (length.to(tl.int32, bitcast=True) & 0x7F800000) + (1 << 23)
    return tl.minimum(tl.maximum(bits, 1 << 24), 252 << 23)


@triton.jit(do_not_specialize=["tokens"])
def vector_transform(
    x_ptr, signs_ptr, m0_ptr, m1_ptr, m2_ptr, bias_ptr, out_ptr, unit_ptr, sum_ptr,
    tokens, x_stride, part_stride, words, norm,
    F0: tl.constexpr, F1: tl.constexpr, F2_IN: tl.constexpr, F2_OUT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2_IN: tl.constexpr, P2_OUT: tl.constexpr,
    PARTS: tl.constexpr, ANALYSIS: tl.constexpr, INTERLEAVE: tl.constexpr,
    PLANES: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr, TAIL: tl.constexpr = 16,
    PAIR_BITS: tl.constexpr = 0,
):  # fmt: skip
    """Transform ``tokens`` vectors: the arguments and results of ``transform_triton.transform``.

    PLANES with PAIR_BITS: coefficients of odd numbers are divided by ``2**PAIR_BITS`` (``lane_product_triton``).
    ``sum`` is (tokens, F0). What lies behind the last coefficient in ``out``, at most TAIL, is set to 0. Halves, too,
    are in units that bound the norm, times 1024.
    """
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    i0 = tl.arange(0, P0)
    j = tl.arange(0, P1 * P2_IN)
    j1, j2 = j // P2_IN, j % P2_IN
    source = i0[:, None] * (F1 * F2_IN) + (j1 * F2_IN + j2)[None, :]
    inside = (i0 < F0)[:, None] & ((j1 < F1) & (j2 < F2_IN))[None, :]
    o1, o2 = tl.arange(0, P1), tl.arange(0, P2_OUT)
    k = (row * F1 + o1)[:, None] * F2_OUT + o2[None, :]
    valid = (o1 < F1)[:, None] & (o2 < F2_OUT)[None, :]
    k2 = tl.arange(0, P2_IN)
    m0 = tl.load(m0_ptr + row * P0 + i0).to(tl.float32)
    m2 = tl.load(m2_ptr + k2[:, None] * P2_OUT + o2[None, :])
    if F1 > 1:
        m1 = tl.load(m1_ptr + o1[None, :] * P1 + o1[:, None])
    if ANALYSIS:
        signs = tl.load(signs_ptr + source, mask=inside, other=0).to(tl.float32)
    else:
        signs = tl.load(signs_ptr + k, mask=valid, other=0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + k, mask=valid, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    if not ANALYSIS:
        input_unit = tl.load(unit_ptr + token)
    x_at = x_ptr + token * x_stride + source
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_at + part * part_stride, mask=inside, other=0.0).to(tl.float32)
    if ANALYSIS:
        x *= signs
    t = tl.sum(x * m0[:, None], axis=0)
    power = 1.0
    if ANALYSIS or F1 > 1:
        if COMPILED:  # one exchange between warps instead of two
            squares, largest = tl.reduce((x * x, tl.abs(x)), None, _squares_largest)
        else:
            squares, largest = tl.sum(x * x), tl.max(tl.abs(x))
        bits = bound(squares, largest, F0 * F1 * F2_IN)
        power = bits.to(tl.float32, bitcast=True)
        t *= (0x7F000000 - bits).to(tl.float32, bitcast=True)
        power = tl.where((largest < float("inf")) & (squares == squares), power, float("nan"))
    if F1 > 1:
        t = tl.reshape(t, [P1, P2_IN]) * 64.0
        high = t.to(tl.float16)
        y = tl.dot(m1, high)
        y = tl.dot(m1, (t - high.to(tl.float32)).to(tl.float16), y)
        y = two_halves_dot(y, m2, True) * (norm * 0.015625)
    else:
        y = tl.sum(t[:, None] * m2.to(tl.float32), axis=0)[None, :] * norm
    if ANALYSIS:
        size = INTERLEAVE * words
        place = (k % INTERLEAVE) * words + k // INTERLEAVE
        tail = F0 * F1 * F2_OUT + tl.arange(0, TAIL)
        tail_place = (tail % INTERLEAVE) * words + tail // INTERLEAVE
        last = (tail < size) & (row == 0)
        if PLANES:
            small = 1.0
            if PAIR_BITS > 0:  # ``lane_product``: the second of each two codes is 2**PAIR_BITS times as large
                small = tl.where(k % 2 == 1, 1.0 / (1 << PAIR_BITS), 1.0)
            total = tl.sum(store_planes(out_ptr + token * (4 * size) + place, y * small, size, valid) / small)
            for plane in tl.static_range(3):
                tl.store(
                    out_ptr + token * (4 * size) + plane * size + tail_place,
                    tl.zeros_like(tail).to(tl.int8),
                    mask=last,
                )
            tl.store(sum_ptr + token * F0 + row, total * 2.384185791015625e-07)
        else:
            power *= 0.0009765625
            halves = (y * 1024.0).to(tl.float16)
            tl.store(out_ptr + token * size + place, halves, mask=valid)
            tl.store(sum_ptr + token * F0 + row, tl.sum(tl.where(valid, halves.to(tl.float32), 0.0)))
            tl.store(out_ptr + token * size + tail_place, tl.zeros_like(tail).to(tl.float16), mask=last)
        if row == 0:
            tl.store(unit_ptr + token, power)
    else:
        y *= signs * (power * input_unit)
        if BIAS:
            y += bias
        tl.store(out_ptr + token * (F0 * F1 * F2_OUT) + k, y.to(out_ptr.dtype.element_ty), mask=valid)
