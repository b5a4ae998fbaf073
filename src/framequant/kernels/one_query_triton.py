"""Attention of one query a sequence over a static cache: rotation, the cache's new entry and the sum, in one launch.

A program has one query head and a share of the cache's positions. What the cache held before this step is on its way
to registers while the kernel before still runs; only the query, and the keys and values that the step adds, wait for
it. Sums of exponentials are kept with their largest exponent, in float32. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import let_next_start, wait_for_previous

_LEAST = tl.constexpr(-1.0e30)  # no exponent is smaller; a finite one, so that differences are numbers


@triton.jit
def _rotated(ptr, cos, sin, d, DIM: tl.constexpr, ROTATED: tl.constexpr):
    """A head's numbers, float32, their halves rotated by angles."""
    x = tl.load(ptr + d).to(tl.float32)
    if ROTATED:
        other = tl.load(ptr + (d + DIM // 2) % DIM).to(tl.float32)
        x = x * cos + tl.where(d < DIM // 2, -other, other) * sin
    return x


@triton.jit
def _entries(keys_ptr, values_ptr, begin, end, n, d, DIM: tl.constexpr):
    """Keys and values of positions from ``begin`` on, 0 from ``end`` on."""
    at = (begin + n)[:, None] * DIM + d[None, :]
    there = (begin + n < end)[:, None]
    return tl.load(keys_ptr + at, mask=there, other=0.0), tl.load(values_ptr + at, mask=there, other=0.0)


@triton.jit
def _attend(query, keys, values, there, highest, weights, total):
    """Add positions to a running sum: the highest exponent, the sum of weights and that of values."""
    exponents = tl.sum(keys.to(tl.float32) * query[None, :], axis=1)
    exponents = tl.where(there, exponents, _LEAST)
    new = tl.maximum(highest, tl.max(exponents, axis=0))
    shrink = tl.exp2(highest - new)
    weight = tl.where(there, tl.exp2(exponents - new), 0.0)
    total = total * shrink + tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
    return new, weights * shrink + tl.sum(weight, axis=0), total


@triton.jit
def one_query(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, length_ptr, out_ptr, part_ptr,
    q_stride, k_stride, v_stride, angle_stride, longest, scale,
    HEADS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    ROTATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one query head and, by SPLITS > 1, partial sums of a share of positions; see ``join``.

    The grid is (batch × HEADS, SPLITS).

    Args:
        q_ptr: (batch, HEADS, DIM), the latter two contiguous; k and v (batch, HEADS / SHARED, DIM) likewise.
        cos_ptr: (batch or 1, DIM), as ``sin_ptr``: of the angles of this position, stride 0 for one; only ROTATED.
        keys_ptr: (batch, HEADS / SHARED, longest, DIM), as ``values_ptr``; position ``length`` is written.
        length_ptr: (1,) int64, positions before this step's; below ``longest``. Not written in this step before.
        out_ptr: (batch, HEADS, DIM).
        part_ptr: float32 (batch × HEADS, SPLITS, DIM + 2): sums, highest exponent, sum of weights.
        scale: of products, times the logarithm of e to base 2.
    """
    let_next_start(PDL)
    head, split = tl.program_id(0), tl.program_id(1)
    batch = head // HEADS
    d, n = tl.arange(0, DIM), tl.arange(0, TILE)
    length = tl.load(length_ptr).to(tl.int32)
    shared_head = batch * (HEADS // SHARED) + head % HEADS // SHARED
    keys_at = keys_ptr + shared_head.to(tl.int64) * longest * DIM
    values_at = values_ptr + shared_head.to(tl.int64) * longest * DIM
    span = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    begin = split * span
    end = tl.minimum(begin + span, length)
    keys, values = _entries(keys_at, values_at, begin, end, n, d, DIM)
    tl.debug_barrier()  # or the compiler moves these loads behind the wait
    wait_for_previous(PDL)
    cos, sin = 0.0, 0.0
    if ROTATED:
        cos = tl.load(cos_ptr + batch * angle_stride + d).to(tl.float32)
        sin = tl.load(sin_ptr + batch * angle_stride + d).to(tl.float32)
    own = head % HEADS
    query = _rotated(q_ptr + batch * q_stride + own * DIM, cos, sin, d, DIM, ROTATED) * scale
    new_key = _rotated(k_ptr + batch * k_stride + own // SHARED * DIM, cos, sin, d, DIM, ROTATED).to(
        keys.dtype
    )
    new_value = tl.load(v_ptr + batch * v_stride + own // SHARED * DIM + d)
    if split == 0:
        writes = (d >= 0) & (own % SHARED == 0) & (length < longest)
        tl.store(keys_at + length * DIM + d, new_key, mask=writes)
        tl.store(values_at + length * DIM + d, new_value, mask=writes)
    exponent = tl.sum(query * new_key.to(tl.float32), axis=0)
    highest = tl.where(split == 0, exponent, _LEAST)
    weights = tl.where(split == 0, 1.0, 0.0)
    total = new_value.to(tl.float32) * weights
    highest, weights, total = _attend(query, keys, values, begin + n < end, highest, weights, total)
    for start in tl.range(begin + TILE, end, TILE):
        keys, values = _entries(keys_at, values_at, start, end, n, d, DIM)
        highest, weights, total = _attend(query, keys, values, start + n < end, highest, weights, total)
    if SPLITS == 1:
        tl.store(out_ptr + head * DIM + d, (total / weights).to(out_ptr.dtype.element_ty))
    else:
        part = part_ptr + (head * SPLITS + split) * (DIM + 2)
        tl.store(part + d, total)
        tl.store(part + DIM, highest)
        tl.store(part + DIM + 1, weights)


@triton.jit
def join(part_ptr, out_ptr, SPLITS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, PDL: tl.constexpr):
    """Outputs of one head from the partial sums of ``one_query``; PADDED is a power of two of at least SPLITS."""
    let_next_start(PDL)
    head = tl.program_id(0)
    d, s = tl.arange(0, DIM), tl.arange(0, PADDED)
    wait_for_previous(PDL)
    part = part_ptr + (head * SPLITS + s) * (DIM + 2)
    there = s < SPLITS
    highest = tl.load(part + DIM, mask=there, other=_LEAST)
    weight = tl.exp2(highest - tl.max(highest, axis=0))
    weights = tl.sum(tl.load(part + DIM + 1, mask=there, other=0.0) * weight, axis=0)
    totals = tl.load(part[:, None] + d[None, :], mask=there[:, None], other=0.0)
    total = tl.sum(totals * weight[:, None], axis=0)
    tl.store(out_ptr + head * DIM + d, (total / weights).to(out_ptr.dtype.element_ty))
