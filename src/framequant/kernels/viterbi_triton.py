"""Viterbi search for bit-shift trellises on a GPU: one Triton program per sequence.

The metrics of a step are one tensor held in registers, indexed by ``p = s >> k``. With ``s = (p << k) | b``
and ``p = j * R + a`` (see ``viterbi_cpu``), a step is a broadcast sum over ``[j, a, b]``, a minimum over
``j``, and a reshape of ``[a, b]`` to the next ``[j, a]``: the only traffic between threads, through shared
memory. The codebook, permuted to ``[j, a, b]`` by its own order, stays in registers while it fits
(``RESIDENT``) and is read through the caches otherwise, as halves where that is exact. The predecessor rides
in the low mantissa bits of the metric, so one integer minimum finds both, and the predecessors of several
``b`` share a byte. Back-pointers go to global scratch, and the same program traces them back.

Only ``framequant.kernels.viterbi`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCRATCH_BYTES = 1 << 31  # back-pointers of the sequences in flight
HUGE = tl.constexpr(1e30)  # an impossible path: finite, so that index bits in its mantissa cannot make a NaN


@triton.constexpr_function
def _rate(rates, step, period):
    return (rates >> (4 * (step % period))) & 15


@triton.constexpr_function
def _group(bits, next_bits):
    """Return how many back-pointers of ``next_bits`` share a byte: a power of two, at most ``2**bits``."""
    fit = 8 if next_bits == 1 else 4 if next_bits == 2 else 2 if next_bits <= 4 else 1
    return min(fit, 1 << bits)


@triton.jit
def _codes(table, L: tl.constexpr, K: tl.constexpr, KN: tl.constexpr):
    """Load the codebook as ``[j, a, b]``, which is its own order."""
    rows: tl.constexpr = 1 << (L - K - KN)
    j = tl.arange(0, 1 << KN)[:, None, None]
    a = tl.arange(0, rows)[None, :, None]
    b = tl.arange(0, 1 << K)[None, None, :]
    return tl.load(table + (((j * rows + a) << K) + b))


@triton.jit
def _advance(metric, codes, gain, slope, offset, back, L: tl.constexpr, K: tl.constexpr, KN: tl.constexpr):
    """Take one step: write its back-pointers, several a byte, and return the next step's metric."""
    rows: tl.constexpr = 1 << (L - K - KN)
    group: tl.constexpr = _group(K, KN)
    words: tl.constexpr = (1 << K) // group
    codes = codes.to(tl.float32)
    old = tl.reshape(metric, [1 << KN, rows, 1])
    bits = (old + codes * (gain * codes - slope)).to(tl.int32, bitcast=True)
    j = tl.arange(0, 1 << KN)[:, None, None]
    best = tl.min((bits & -(1 << KN)) | j, axis=0)
    place = tl.arange(0, group)[None, None, :] * KN
    word = tl.sum(tl.reshape(best & ((1 << KN) - 1), [rows, words, group]) << place, axis=2)
    where = tl.arange(0, rows)[:, None] * words + tl.arange(0, words)[None, :]
    tl.store(back + where, word.to(tl.uint8))
    return tl.reshape(best.to(tl.float32, bitcast=True) + offset, [1 << (L - KN)])


@triton.jit
def _predecessor(node, back, L: tl.constexpr, K: tl.constexpr, KN: tl.constexpr):
    """Return the state of a step from the node that follows it."""
    group: tl.constexpr = _group(K, KN)
    b = node & ((1 << K) - 1)
    word = tl.load(back + (node >> K) * ((1 << K) // group) + b // group).to(tl.int32)
    return node | (((word >> ((b % group) * KN)) & ((1 << KN) - 1)) << (L - KN))


@triton.jit
def _viterbi(
    values, weights, table, overlap, back, states, steps,
    L: tl.constexpr, RATES: tl.constexpr, PERIOD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SIZE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Search one sequence; ``RATES`` holds four bits a rate, a step has ``SIZE`` bytes of back-pointers."""
    tile = tl.program_id(0).to(tl.int64)
    values += tile * steps
    weights += tile * steps
    states += tile * steps
    back += tile * steps * SIZE
    if RESIDENT:
        codes_ll = _codes(table, L, LOW, LOW)
        codes_lh = _codes(table, L, LOW, HIGH)
        codes_hl = _codes(table, L, HIGH, LOW)
        codes_hh = _codes(table, L, HIGH, HIGH)
    first: tl.constexpr = 1 << (L - (RATES & 15))
    ends = tl.load(overlap + tile)
    x = tl.load(values)
    power = tl.load(weights) * x * x
    p = tl.arange(0, first)
    metric = tl.where((ends < 0) | (p == ends), power, HUGE)
    for start in range(0, steps, PERIOD):
        for i in tl.static_range(PERIOD):
            t = start + i
            gain = tl.load(weights + t)
            slope = 2.0 * gain * tl.load(values + t)
            more = t + 1 < steps
            following = tl.load(values + t + 1, mask=more, other=0.0)
            offset = tl.load(weights + t + 1, mask=more, other=0.0) * following * following
            if not RESIDENT:
                codes = _codes(table, L, _rate(RATES, i, PERIOD), _rate(RATES, i + 1, PERIOD))
            elif _rate(RATES, i, PERIOD) == LOW and _rate(RATES, i + 1, PERIOD) == LOW:
                codes = codes_ll
            elif _rate(RATES, i, PERIOD) == LOW:
                codes = codes_lh
            elif _rate(RATES, i + 1, PERIOD) == LOW:
                codes = codes_hl
            else:
                codes = codes_hh
            metric = _advance(
                metric, codes, gain, slope, offset, back + t * SIZE,
                L, _rate(RATES, i, PERIOD), _rate(RATES, i + 1, PERIOD),
            )  # fmt: skip
    node = tl.where(ends < 0, tl.argmin(metric, axis=0), ends.to(tl.int32))
    tl.debug_barrier()  # the back-pointers of all threads are written
    for start in range(0, steps, PERIOD):
        for i in tl.static_range(PERIOD):
            t = steps - 1 - start - i
            k = _rate(RATES, PERIOD - 1 - i, PERIOD)
            state = _predecessor(node, back + t * SIZE, L, k, _rate(RATES, PERIOD - i, PERIOD))
            tl.store(states + t, state)
            node = state >> k


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
    steps, size = values.shape[1], 1 << (state_bits - min(rates))
    states = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    share = max(1, min(len(values), _SCRATCH_BYTES // (steps * size)))
    back = torch.empty((share, steps, size), dtype=torch.uint8, device=values.device)
    packed = sum(k << (4 * i) for i, k in enumerate(rates))
    table = _halves(codebook.contiguous())
    for i in range(0, len(values), share):
        part = slice(i, min(i + share, len(values)))
        _viterbi[(part.stop - part.start,)](
            values[part], weights[part], table, overlap[part], back, states[part], steps,
            L=state_bits, RATES=packed, PERIOD=len(rates), LOW=min(rates), HIGH=max(rates), SIZE=size,
            **(options or launch_options(state_bits)),
        )  # fmt: skip
    return states
