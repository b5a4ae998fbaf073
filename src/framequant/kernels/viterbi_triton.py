"""Viterbi search for bit-shift trellises on a GPU: one Triton program per sequence.

The metrics are one tensor in registers, indexed by ``p = s >> low`` with the smaller of the pattern's two
rates; after a step of the larger rate, each metric stands there several times, so every step has the same
shape. With ``s = (p << low) | b`` and ``p = j * R + a`` a step is a broadcast sum over ``[j, a, b]``, a
minimum over ``j``, and a reshape of ``[a, b]`` to the next ``[j, a]``: the only traffic between threads,
through shared memory. The codebook in its own order is ``[j, a, b]``; it stays in registers while it fits
(``RESIDENT``) and is read through the caches otherwise, as halves where that is exact. The predecessor rides
in the low mantissa bits of the metric, so one integer minimum finds both, and several predecessors share a
byte. Back-pointers go to global scratch; the same program traces them back.

Only ``framequant.kernels.viterbi`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCRATCH_BYTES = 1 << 31  # back-pointers of the sequences in flight
HUGE = tl.constexpr(1e30)  # an impossible path: finite, so that index bits in its mantissa cannot make a NaN


def _per_byte(low, bits):
    """Return how many back-pointers of ``bits`` share a byte: a power of two, at most ``2**low``."""
    return min(8 if bits == 1 else 4 if bits == 2 else 2 if bits <= 4 else 1, 1 << low)


_group = triton.constexpr_function(_per_byte)


@triton.jit
def _codes(table, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Load the codebook as ``[j, a, b]``, which is its own order."""
    rows: tl.constexpr = 1 << (L - LOW - KN)
    j = tl.arange(0, 1 << KN)[:, None, None]
    a = tl.arange(0, rows)[None, :, None]
    b = tl.arange(0, 1 << LOW)[None, None, :]
    return tl.load(table + (((j * rows + a) << LOW) + b))


@triton.jit
def _advance(metric, codes, gain, slope, offset, back, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Take one step: write its back-pointers, several a byte, and return the next step's metric."""
    rows: tl.constexpr = 1 << (L - LOW - KN)
    group: tl.constexpr = _group(LOW, KN)
    words: tl.constexpr = (1 << LOW) // group
    codes = codes.to(tl.float32)
    old = tl.reshape(metric, [1 << KN, rows, 1])
    bits = (old + codes * (gain * codes - slope)).to(tl.int32, bitcast=True)
    j = tl.arange(0, 1 << KN)[:, None, None]
    best = tl.min((bits & -(1 << KN)) | j, axis=0)
    place = tl.arange(0, group)[None, None, :] * KN
    word = tl.sum(tl.reshape(best & ((1 << KN) - 1), [rows, words, group]) << place, axis=2)
    where = tl.arange(0, rows)[:, None] * words + tl.arange(0, words)[None, :]
    tl.store(back + where, word.to(tl.uint8))
    new = best.to(tl.float32, bitcast=True) + offset
    if KN > LOW:
        new = tl.broadcast_to(new[:, :, None], [rows, 1 << LOW, 1 << (KN - LOW)])
    return tl.reshape(new, [1 << (L - LOW)])


@triton.jit
def _predecessor(node, back, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Return the state of a step from the node that follows it."""
    group: tl.constexpr = _group(LOW, KN)
    b = node & ((1 << LOW) - 1)
    word = tl.load(back + (node >> LOW) * ((1 << LOW) // group) + b // group).to(tl.int32)
    return node | (((word >> ((b % group) * KN)) & ((1 << KN) - 1)) << (L - KN))


@triton.jit(do_not_specialize=["rates", "period"])
def _viterbi(
    values, weights, table, overlap, back, states, steps, rates, period,
    L: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, STRIDE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Search one sequence; bit ``t % period`` of ``rates`` says whether step t has ``HIGH`` bits.

    A step has ``STRIDE`` bytes of back-pointers.
    """
    size: tl.constexpr = 1 << (L - LOW)
    tile = tl.program_id(0).to(tl.int64)
    values += tile * steps
    weights += tile * steps
    states += tile * steps
    back += tile * steps * STRIDE
    if RESIDENT:
        codes_low = _codes(table, L, LOW, LOW)
        if HIGH > LOW:
            codes_high = _codes(table, L, LOW, HIGH)
    ends = tl.load(overlap + tile).to(tl.int32)
    x = tl.load(values)
    first = tl.where((rates & 1) == 1, HIGH, LOW)
    node = tl.arange(0, size) >> (first - LOW)
    metric = tl.where((ends < 0) | (node == ends), tl.load(weights) * x * x, HUGE)
    for t in range(0, steps):
        gain = tl.load(weights + t)
        slope = 2.0 * gain * tl.load(values + t)
        more = t + 1 < steps
        following = tl.load(values + t + 1, mask=more, other=0.0)
        offset = tl.load(weights + t + 1, mask=more, other=0.0) * following * following
        row = back + t * STRIDE
        if HIGH == LOW:
            if RESIDENT:
                metric = _advance(metric, codes_low, gain, slope, offset, row, L, LOW, LOW)
            else:
                metric = _advance(metric, _codes(table, L, LOW, LOW), gain, slope, offset, row, L, LOW, LOW)
        elif ((rates >> ((t + 1) % period)) & 1) == 1:
            if RESIDENT:
                metric = _advance(metric, codes_high, gain, slope, offset, row, L, LOW, HIGH)
            else:
                metric = _advance(metric, _codes(table, L, LOW, HIGH), gain, slope, offset, row, L, LOW, HIGH)
        else:
            if RESIDENT:
                metric = _advance(metric, codes_low, gain, slope, offset, row, L, LOW, LOW)
            else:
                metric = _advance(metric, _codes(table, L, LOW, LOW), gain, slope, offset, row, L, LOW, LOW)
    best = tl.argmin(metric, axis=0) >> (first - LOW)
    last = tl.where(ends < 0, best, ends)
    tl.debug_barrier()  # the back-pointers of all threads are written
    for i in range(0, steps):
        t = steps - 1 - i
        row = back + t * STRIDE
        if HIGH == LOW:
            state = _predecessor(last, row, L, LOW, LOW)
        elif ((rates >> ((t + 1) % period)) & 1) == 1:
            state = _predecessor(last, row, L, LOW, HIGH)
        else:
            state = _predecessor(last, row, L, LOW, LOW)
        tl.store(states + t, state)
        last = state >> tl.where(((rates >> (t % period)) & 1) == 1, HIGH, LOW)


def supports(state_bits: int, rates: tuple[int, ...]) -> bool:
    """Say whether the kernel covers this trellis: at most two rates, and two steps' bits within a state."""
    return len(set(rates)) <= 2 and 2 * max(rates) <= state_bits


def launch_options(state_bits: int) -> dict[str, int | bool]:
    """Return warps and the place of the codebook: 32 branches a thread and step, up to 1024 threads."""
    warps = min(32, max(1, 1 << (state_bits - 10)) if state_bits >= 10 else 1)
    return {"num_warps": warps, "RESIDENT": state_bits <= 14}


def _halves(codebook: Tensor) -> Tensor:
    """Return the codebook in half precision if that is exact (levels of the computed codebook are)."""
    half = codebook.to(torch.float16)
    return half if bool((half.to(torch.float32) == codebook).all()) else codebook.to(torch.float32)


def search(
    values: Tensor,
    weights: Tensor,
    codebook: Tensor,
    rates: tuple[int, ...],
    overlap: Tensor,
    state_bits: int,
    options: dict[str, int | bool] | None = None,
) -> Tensor:
    """Return the states of least squared error; arguments as in ``framequant.kernels.viterbi.search``.

    ``options`` overrides ``launch_options`` (the benchmark compares several).
    """
    values, weights, overlap = values.contiguous(), weights.contiguous(), overlap.contiguous()
    steps, low, high = values.shape[1], min(rates), max(rates)
    stride = max((1 << (state_bits - k)) // _per_byte(low, k) for k in (low, high))
    states = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    share = max(1, min(len(values), _SCRATCH_BYTES // (steps * stride)))
    back = torch.empty((share, steps, stride), dtype=torch.uint8, device=values.device)
    pattern = sum((k > low) << i for i, k in enumerate(rates))
    table = _halves(codebook.contiguous())
    options = options or launch_options(state_bits)
    for i in range(0, len(values), share):
        part = slice(i, min(i + share, len(values)))
        with torch.cuda.device_of(values):
            _viterbi[(part.stop - part.start,)](
                values[part], weights[part], table, overlap[part], back, states[part],
                steps, pattern, len(rates),
                L=state_bits, LOW=low, HIGH=high, STRIDE=stride, **options,
            )  # fmt: skip
    return states
