"""Analysis and synthesis of many tokens: one program makes all of a token, which is read once and written once.

With hundreds of tokens every multiprocessor has programs enough, so nothing is split; what counts is bytes, and
after them the exchanges between threads. So the vector is read as halves, and halves alone are moved from one axis
to the next (``transform_triton`` moves float32 and multiplies twice, for programs that wait for latency anyway);
products accumulate in float32. Each intermediate is rounded to a half, as float16 rounds the coefficients.

Only ``prompt_ops``, ``block_prompt_ops`` and ``prompt_walsh_triton`` import this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import let_next_start, over, wait_for_previous

#: Norms of a token between which its coefficients are halves as they are: none above 32768, most far above 2**-14.
LEAST_NORM: tl.constexpr = tl.constexpr(0.25)
LARGEST_NORM: tl.constexpr = tl.constexpr(32768.0)


@triton.jit
def prompt_transform(
    x_ptr, signs_ptr, m0_ptr, m1_ptr, m2_ptr, bias_ptr, top_ptr, out_ptr, unit_ptr, x_stride, out_stride, norm,
    F0: tl.constexpr, F1: tl.constexpr, F2_IN: tl.constexpr, F2_OUT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2_IN: tl.constexpr, P2_OUT: tl.constexpr,
    ANALYSIS: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr = False, PDL: tl.constexpr = False,
):  # fmt: skip
    """Transform one token; sizes and matrices as in ``TransformPlan``.

    Analysis: (tokens, F0*F1*F2_IN) of any float dtype to halves (tokens, out_stride), of which F0*F1*F2_OUT are
    written, divided by the power of two in ``unit``: below the largest entry's modulus, so the norm of what is
    transformed is below ``2 * sqrt(dim)``. PLAIN: of any 16-bit dtype, and not divided (``unit`` is 1) unless they are
    halves and the token's norm does not suit them.
    Synthesis: halves (tokens, F0*F1*F2_IN), at most 32768, to (tokens, F0*F1*F2_OUT), times ``norm * unit * top``.
    With PDL the next kernel may start when those before this one have finished; it must not write what this one reads.
    """
    wait_for_previous(PDL)
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    i0 = tl.arange(0, P0)
    j = tl.arange(0, P1 * P2_IN)
    j1, j2 = j // P2_IN, j % P2_IN
    source = i0[:, None] * (F1 * F2_IN) + (j1 * F2_IN + j2)[None, :]
    inside = (i0 < F0)[:, None] & ((j1 < F1) & (j2 < F2_IN))[None, :]
    x = tl.load(x_ptr + token * x_stride + source, mask=inside, other=0.0)
    if ANALYSIS:
        x = x.to(tl.float32)
        bits = tl.max(tl.max(tl.abs(x), axis=1), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        signs = tl.load(signs_ptr + source, mask=inside, other=0).to(tl.float32)
        x = (x * signs * (0x7F000000 - bits).to(tl.float32, bitcast=True)).to(tl.float16)
        unit = bits.to(tl.float32, bitcast=True)
        if PLAIN:  # what is left to be divided by, and what is multiplied back
            left = unit * 0.0 + 1.0
            if out_ptr.dtype.element_ty == tl.float16:
                h = x.to(tl.float32)
                length = tl.sqrt(tl.sum(tl.sum(h * h, axis=1), axis=0)) * unit
                left = tl.where((length >= LEAST_NORM) & (length <= LARGEST_NORM), left, unit)
            norm *= unit * over(left)
            unit = left
        tl.store(unit_ptr + token, unit)
    else:
        unit = tl.load(unit_ptr + token) * tl.load(top_ptr)
    m0 = tl.load(m0_ptr + i0[:, None] * P0 + i0[None, :], mask=(i0 < F0)[:, None], other=0.0)
    t = tl.dot(m0, x)
    if not ANALYSIS:
        t *= 1.0 / P0  # a sum of so many entries is no larger than one of them
        norm *= P0
    h = t.to(tl.float16)
    if F1 > 1:
        k1 = tl.arange(0, P1)
        m1 = tl.load(m1_ptr + k1[:, None] * P1 + k1[None, :])
        h = tl.reshape(tl.trans(tl.reshape(h, [P0, P1, P2_IN]), 0, 2, 1), [P0 * P2_IN, P1])
        t = tl.dot(h, m1)
        if not ANALYSIS:
            t *= 1.0 / P1
            norm *= P1
        h = t.to(tl.float16)
        h = tl.reshape(tl.trans(tl.reshape(h, [P0, P2_IN, P1]), 0, 2, 1), [P0 * P1, P2_IN])
    k2, o2 = tl.arange(0, P2_IN), tl.arange(0, P2_OUT)
    m2 = tl.load(m2_ptr + k2[:, None] * P2_OUT + o2[None, :])
    y = tl.dot(h, m2) * norm
    i = tl.arange(0, P0 * P1)
    k = (i // P1 * F1 + i % P1)[:, None] * F2_OUT + o2[None, :]
    valid = ((i // P1 < F0) & (i % P1 < F1))[:, None] & (o2 < F2_OUT)[None, :]
    if not ANALYSIS:
        y = y * unit * tl.load(signs_ptr + k, mask=valid, other=0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + k, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + k, y.to(out_ptr.dtype.element_ty), mask=valid)
