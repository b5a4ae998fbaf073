"""The product with scalar codes on integer tensor cores, ``u = D̃ z``: exact sums of bytes.

A stored byte holds ``8 / BITS`` codes. One shift and one mask turn four bytes into four codes, ready for the tensor
cores; nothing else is done for a weight. Coefficients come as 24-bit integers relative to a bound of the token's
largest one, dealt out to three planes of signed bytes (weights 1, 2**8, 2**16), and a token takes four columns of
the product, the last of them empty. ``z[column, i, byte]`` are the i-th codes' coefficients of adjacent bytes, so
the loop over ``i`` moves no data between threads. Sums of integers are exact: the result does not depend on splits,
up to the last bit of the float32 sum over them. The level of code c is ``c - zero``; ``zero`` times the sum of
all coefficients is taken off at the end.

Where the output frame is local to blocks of rows, a program has all columns, shared out to its warps, and writes
outputs (``block_triton``). Only ``triton_ops`` and ``block_ops`` import this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import block_constants, rotated, store_outputs
from framequant.kernels.triton_support import COMPILED, let_next_start, wait_for_previous


@triton.constexpr_function
def _codes_text(shift, bits):
    """PTX for four bytes at once."""
    mask = ((1 << bits) - 1) * 0x01010101
    if shift == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, {mask}; }}"


@triton.jit
def byte_codes(bytes_, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Return the INDEX-th codes of the bytes, as signed bytes."""
    if COMPILED:
        text: tl.constexpr = _codes_text(BITS * INDEX, BITS)
        return tl.inline_asm_elementwise(text, "=r,r", [bytes_], dtype=tl.int8, is_pure=True, pack=4)
    return ((bytes_.to(tl.int32) >> (BITS * INDEX)) & ((1 << BITS) - 1)).to(tl.int8)


@triton.jit(do_not_specialize=["tokens"])
def byte_product(
    bytes_ptr, z_ptr, sum_ptr, scale_ptr, u_ptr,
    rows, count, stride, span, tokens, factor, zero,
    PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr, BITS: tl.constexpr, ROW_SCALES: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
    LOOP: tl.constexpr, PDL: tl.constexpr,
    unit_ptr=None, top_ptr=None, places_ptr=None, signs_ptr=None, matrix_ptr=None, bias_ptr=None, shrink=1.0,
    norm=1.0, BLOCK: tl.constexpr = 0, GROUPS: tl.constexpr = 1, BIAS: tl.constexpr = False,
):  # fmt: skip
    """One block of rows, one span of bytes, BN / 4 tokens; see the module's text.

    The first HELD steps' bytes are in registers before the wait for the kernels before this one (HELD * GROUPS * BK is
    at most ``span``, and equal to it without LOOP). BLOCK, GROUPS and what belongs to them are as in
    ``product_triton.product``.

    Args:
        bytes_ptr: int8 (rows, stride); ``count`` bytes of a row are codes.
        z_ptr: int8 (tokens, 4, 8 / BITS, count), the fourth plane never read.
        sum_ptr: float32 (tokens, parts): sums of a token's coefficients, in units of the token.
        scale_ptr: scales, (rows,) or one.
        u_ptr: float32 (splits, tokens, rows), in units of the token.
        span: bytes of a row that one program takes; best a multiple of BK.
        factor: value of the last bit of a coefficient, in units of the token.
        zero: the code whose level is 0, any float.
    """
    let_next_start(PDL)
    block, part, columns = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    codes: tl.constexpr = 8 // BITS
    STEP: tl.constexpr = GROUPS * BK
    r = block * BR + tl.arange(0, BR)
    start = part * span
    stop = tl.minimum(start + span, count)
    k = start + tl.arange(0, BK)
    column = columns * BN + tl.arange(0, BN)
    token = columns * (BN // 4) + tl.arange(0, BN // 4)
    row_at = bytes_ptr + tl.minimum(r, rows - 1).to(tl.int64) * stride
    row_at, byte, coefficient, column = row_at[:, None], k[None, :], k[:, None], column[None, :]
    every = (r >= 0)[:, None]
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)[:, None, None] * BK
        row_at, every, column = row_at[None], every[None], column[None]
        byte, coefficient = byte[None] + group, coefficient[None] + group
    b_at = row_at + byte
    z_at = z_ptr + column.to(tl.int64) * (codes * count) + coefficient
    used = (column < 4 * tokens) & (column % 4 < 3)
    if BLOCK > 0:
        matrix, over_top, places, signs, bias = block_constants(
            r, rows, matrix_ptr, top_ptr, places_ptr, signs_ptr, bias_ptr, norm, BLOCK, BIAS
        )
    if ROW_SCALES:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr + r * 0).to(tl.float32)
    held = ()
    for step in tl.static_range(HELD):
        there = (byte + step * STEP < stride) & every
        held += (tl.load(b_at + step * STEP, mask=there, other=0),)
    wait_for_previous(PDL)
    held_z = ()
    for step in tl.static_range(HELD):
        for i in tl.static_range(codes):
            inside = used & (coefficient + step * STEP < stop)
            held_z += (tl.load(z_at + (i * count + step * STEP), mask=inside, other=0),)
    plane, index = tl.arange(0, BN) % 4, tl.arange(0, PADDED_PARTS)
    if BLOCK > 0:
        unit = tl.load(unit_ptr + token, mask=token < tokens, other=0.0)
        of = columns * (BN // 4) + tl.arange(0, BN) // 4
        summed = ((of < tokens) & (plane == 3))[:, None] & (index < PARTS)[None, :]
        totals = tl.load(sum_ptr + of[:, None] * PARTS + index[None, :], mask=summed, other=0.0)
        taken_off = zero * tl.sum(totals, axis=1)  # in the empty column of a token
    if GROUPS > 1:
        even = tl.zeros([GROUPS, BR, BN], tl.int32)
    else:
        even = tl.zeros([BR, BN], tl.int32)
    odd = tl.zeros_like(even)  # two chains hide the tensor cores' latency
    if LOOP:
        for done in tl.range(HELD * STEP, span, STEP, num_stages=STAGES):
            inside = used & (coefficient + done < stop)
            b = tl.load(b_at + done, mask=(byte + done < stride) & every, other=0)
            for i in tl.static_range(codes):
                z = tl.load(z_at + (i * count + done), mask=inside, other=0)
                if i % 2 == 0:
                    even = tl.dot(byte_codes(b, i, BITS), z, even, out_dtype=tl.int32)
                else:
                    odd = tl.dot(byte_codes(b, i, BITS), z, odd, out_dtype=tl.int32)
    for step in tl.static_range(HELD):
        for i in tl.static_range(codes):
            if i % 2 == 0:
                even = tl.dot(
                    byte_codes(held[step], i, BITS), held_z[step * codes + i], even, out_dtype=tl.int32
                )
            else:
                odd = tl.dot(
                    byte_codes(held[step], i, BITS), held_z[step * codes + i], odd, out_dtype=tl.int32
                )
    acc = even + odd
    if GROUPS > 1:
        acc = tl.sum(acc, axis=0)
    worth = tl.where(plane == 0, factor, tl.where(plane == 1, factor * 256.0, factor * 65536.0))
    value = acc.to(tl.float32) * worth[None, :]
    if BLOCK > 0:
        value = (value - taken_off[None, :]) * (scale * (over_top * shrink))[:, None]
        y = tl.sum(tl.reshape(rotated(value, matrix, BR, BN, BLOCK), [BR, BN // 4, 4]), axis=2)
        store_outputs(y, unit, places, signs, bias, r, token, rows, tokens, u_ptr, BIAS)
    else:
        u = tl.sum(tl.reshape(value, [BR, BN // 4, 4]), axis=2)
        if part == 0:
            summed = (token < tokens)[:, None] & (index < PARTS)[None, :]
            totals = tl.load(sum_ptr + token[:, None] * PARTS + index[None, :], mask=summed, other=0.0)
            u -= (zero * tl.sum(totals, axis=1))[None, :]
        u *= scale[:, None]
        u_at = u_ptr + ((part * tokens + token).to(tl.int64) * rows)[None, :] + r[:, None]
        tl.store(u_at, u, mask=(token < tokens)[None, :] & (r < rows)[:, None])
