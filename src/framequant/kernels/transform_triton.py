"""Analysis and synthesis in one launch each: signs, Hadamard factors and the frame's block, on tensor cores.

A vector of ``F0 * F1 * F2`` coordinates is a tensor with three axes (the middle one may have length 1), and the
transform multiplies each axis by a small matrix: the last one already holds the block of the fusion frame. One
program makes ``ROWS`` indices of the first axis for one token, from the whole vector, so a single token keeps
several multiprocessors busy without any exchange between them. Sizes are padded to powers of two.

The vector is first divided by a power of two near its largest entry, so halves never overflow whatever the
input's dtype; products accumulate in float32, and where ``LOW`` asks for it an intermediate is the sum of two
halves. For the product with bytes, analysis writes 24-bit integers as three planes of signed bytes instead.

Only ``framequant.kernels.triton_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.launches import MOST_SPARE
from framequant.kernels.triton_support import let_next_start, wait_for_previous


@triton.constexpr_function
def mantissa_runs(bits):
    """How many codes of so many bits a product takes from the mantissa of a half: an even number."""
    return 10 // bits // 2 * 2


@triton.constexpr_function
def mantissa_place(run, bits):
    """The bit of a mantissa where the codes that meet a run of coefficients begin."""
    return run % mantissa_runs(bits) * bits


@triton.constexpr_function
def first_factor(bits):
    """What coefficients of a mantissa's first codes are multiplied by; those of its last ones stay as they are."""
    return 1 << mantissa_place(mantissa_runs(bits) - 1, bits)


@triton.jit
def two_halves_dot(t, matrix, LOW: tl.constexpr):
    """Multiply float32 ``t`` by a half matrix, ``t`` rounded to one half or to the sum of two."""
    high = t.to(tl.float16)
    result = tl.dot(high, matrix)
    if LOW:
        result = tl.dot((t - high.to(tl.float32)).to(tl.float16), matrix, result)
    return result


#: Zeros that are written behind sums of pairs of rows: counters of ``lane_tokens_triton``.
_COUNTERS = tl.constexpr(MOST_SPARE)

#: Value of a coefficient's last bit in units of the token; 2**22 leaves all digits within a signed byte.
LAST_BIT = 2.0**-22


@triton.jit
def store_planes(place, y, size, mask):
    """Write ``y``, in [-1, 1], as three balanced digits of eight bits; return the integers as float32."""
    shifted = y * 4194304.0 + 12582912.0  # in [2**23, 2**24), where a float32 is an integer
    v = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    for plane in tl.static_range(3):
        digit = ((v + 128) & 255) - 128
        tl.store(place + plane * size, digit.to(tl.int8), mask=mask)
        v = (v - digit) >> 8
    return tl.where(mask, shifted - 12582912.0, 0.0)


@triton.jit(do_not_specialize=["tokens"])
def transform(
    x_ptr, signs_ptr, m0_ptr, m1_ptr, m2_ptr, bias_ptr, out_ptr, unit_ptr, sum_ptr,
    tokens, x_stride, part_stride, words, norm,
    F0: tl.constexpr, F1: tl.constexpr, F2_IN: tl.constexpr, F2_OUT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2_IN: tl.constexpr, P2_OUT: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ANALYSIS: tl.constexpr, INTERLEAVE: tl.constexpr,
    PLANES: tl.constexpr, BIAS: tl.constexpr, LOW: tl.constexpr, PDL: tl.constexpr, PAIR_BITS: tl.constexpr = 0,
):  # fmt: skip
    """Transform ``tokens`` vectors; see the module's text.

    Analysis: (tokens, F0*F1*F2_IN) of any float dtype to halves (tokens, INTERLEAVE, words), coefficient k in
    row ``k % INTERLEAVE`` at ``k // INTERLEAVE``, each token divided by the power of two in ``unit``. With PAIR_BITS
    adjacent rows are one, with two halves of each in turn, each row multiplied by ``first_factor`` over the power of
    two of its place in a mantissa, and zeros behind ``sum``, to count with. PLANES:
    to signed bytes (tokens, 4, INTERLEAVE, words), of which three planes are written, in units of ``LAST_BIT``
    times ``unit``, a bound of the coefficients; ``sum`` (tokens, programs) gets each program's sum of what it wrote,
    over ``unit``.
    Synthesis: the sum of PARTS float32 partial results (tokens, F0*F1*F2_IN) to (tokens, F0*F1*F2_OUT), times ``unit``.
    """
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    i0 = tl.arange(0, P0)
    j = tl.arange(0, P1 * P2_IN)
    j1, j2 = j // P2_IN, j % P2_IN
    column = j1 * F2_IN + j2
    inside = (j1 < F1) & (j2 < F2_IN)
    source = i0[:, None] * (F1 * F2_IN) + column[None, :]
    inside = (i0 < F0)[:, None] & inside[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m0 = tl.load(m0_ptr + row[:, None] * P0 + i0[None, :])
    k2 = tl.arange(0, P2_IN)
    o2 = tl.arange(0, P2_OUT)
    m2 = tl.load(m2_ptr + k2[:, None] * P2_OUT + o2[None, :])
    if ANALYSIS:
        signs = tl.load(signs_ptr + source, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + token * x_stride + source, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + token * x_stride + source, mask=inside, other=0.0).to(
            tl.float32
        )
    bits = tl.max(tl.max(tl.abs(x), axis=1), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    x = x * (0x7F000000 - bits).to(tl.float32, bitcast=True)
    if ANALYSIS:
        x = x * signs
        if PLANES:  # no coefficient is above the norm
            length = tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0))
            power = tl.maximum(length.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23) + (1 << 23)
            norm *= (0x7F000000 - power).to(tl.float32, bitcast=True)
    high = x.to(tl.float16)
    t = tl.dot(m0, high)
    if LOW and not ANALYSIS:
        t = tl.dot(m0, (x - high.to(tl.float32)).to(tl.float16), t)
    if F1 > 1:
        k1 = tl.arange(0, P1)
        m1 = tl.load(m1_ptr + k1[:, None] * P1 + k1[None, :])
        t = tl.reshape(tl.trans(tl.reshape(t, [ROWS, P1, P2_IN]), 0, 2, 1), [ROWS * P2_IN, P1])
        t = two_halves_dot(t, m1, LOW)
        t = tl.reshape(tl.trans(tl.reshape(t, [ROWS, P2_IN, P1]), 0, 2, 1), [ROWS * P1, P2_IN])
    y = two_halves_dot(t, m2, LOW) * norm
    i = tl.arange(0, ROWS * P1)
    o1 = i % P1
    k = ((tl.program_id(1) * ROWS + i // P1) * F1 + o1)[:, None] * F2_OUT + o2[None, :]
    valid = ((tl.program_id(1) * ROWS + i // P1 < F0) & (o1 < F1))[:, None] & (o2 < F2_OUT)[None, :]
    unit = bits.to(tl.float32, bitcast=True)
    if ANALYSIS and PLANES:
        unit = tl.where(length < float("inf"), unit * power.to(tl.float32, bitcast=True), float("nan"))
        size = INTERLEAVE * words
        place = out_ptr + token * (4 * size) + (k % INTERLEAVE) * words + k // INTERLEAVE
        total = tl.sum(tl.sum(store_planes(place, y, size, valid), axis=1), axis=0)
        tl.store(sum_ptr + token * tl.num_programs(1) + tl.program_id(1), total * 2.384185791015625e-07)
        if tl.program_id(1) == 0:
            tl.store(unit_ptr + token, unit)
    elif ANALYSIS:
        halves, run, at = y.to(tl.float16), k % INTERLEAVE, k // INTERLEAVE
        if PAIR_BITS > 0:
            place = run // 2 * (2 * words) + at // 2 * 4 + run % 2 * 2 + at % 2
            below = run % mantissa_runs(PAIR_BITS) * PAIR_BITS
            power = ((127 - below) << 23).to(tl.float32, bitcast=True) * first_factor(PAIR_BITS)
            written = (y * power).to(tl.float16)
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(sum_ptr + tokens * tl.num_programs(1) + tl.arange(0, _COUNTERS), 0.0)
        else:
            place, written = run * words + at, halves
        tl.store(out_ptr + token * (INTERLEAVE * words) + place, written, mask=valid)
        total = tl.sum(tl.sum(tl.where(valid, halves.to(tl.float32), 0.0), axis=1), axis=0)
        tl.store(sum_ptr + token * tl.num_programs(1) + tl.program_id(1), total)
        if tl.program_id(1) == 0:
            tl.store(unit_ptr + token, unit)
    else:
        unit *= tl.load(unit_ptr + token)
        y = y * unit * tl.load(signs_ptr + k, mask=valid, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + k, mask=valid, other=0.0).to(tl.float32)
        place = out_ptr + token * (F0 * F1 * F2_OUT) + k
        tl.store(place, y.to(out_ptr.dtype.element_ty), mask=valid)
