"""Viterbi search for bit-shift trellises on a GPU: one Triton program per sequence.

A state's predecessors share one metric, so a step keeps ``2**(L - k)`` of them, indexed by ``p = s >> low``
with the smaller of the pattern's two rates; after a step of the larger rate, each metric stands there several
times, so every step has the same shape. With ``s = (p << low) | b`` and ``p = j * R + a`` a step is a minimum
over ``j`` of ``metric[j, a] + cost(codebook[j, a, b])``, and its result ``[a, b]`` is the next step's ``[j,
a]``. A thread keeps all ``j`` of its ``a``: the minimum is its own business, and regrouping the result is the
only traffic between threads, once a step, through shared memory. One ``j`` is worked off after the other,
which keeps the live values of 2**16 states in registers. The codebook is read through the caches, as halves
where that is exact: keeping it in registers, where it fits, was no faster (``benchmarks/viterbi_h100.csv``).

A state with two values has two planes of the codebook, and two terms of its cost.

The predecessor rides in the low mantissa bits of the metric, so one integer minimum finds both. Words of 32
bits collect the back-pointers of neighbouring ``b`` and of distant ``a``, which are one thread's too; they go
to global scratch, and the same program traces them back.

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
def _pointer_bits(bits):
    """Return the width of a stored back-pointer of ``bits``: a power of two."""
    return 1 if bits == 1 else 2 if bits == 2 else 4 if bits <= 4 else 8


@triton.constexpr_function
def _pointer_share(low, bits):
    """Return how many values of ``b`` share a word."""
    return min(32 // _pointer_bits(bits), 1 << low)


@triton.constexpr_function
def _pointer_fold(state_bits, low, bits):
    """Return how many values of ``a`` share a word: the ones that differ in their top bits."""
    most = 32 // (_pointer_bits(bits) * _pointer_share(low, bits))
    return min(most, 1 << (state_bits - low - bits))


def _pointer_words(state_bits, low, bits):
    """Return the words of back-pointers of one step."""
    pairs = 1 << (state_bits - bits)
    return pairs // (_pointer_share(low, bits) * _pointer_fold(state_bits, low, bits))


@triton.jit
def _column(matrix, j: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Return column ``j`` of ``[ROWS, 2**BITS]`` by halvings, which are free where a thread has whole rows."""
    for i in tl.static_range(BITS):
        even, odd = tl.split(tl.reshape(matrix, [ROWS, 1 << (BITS - 1 - i), 2]))
        matrix = odd if (j >> i) & 1 == 1 else even
    return tl.reshape(matrix, [ROWS])


@triton.jit
def _old(metric, j: tl.constexpr, L: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KN: tl.constexpr):
    """Return the metrics ``[a]`` of predecessor ``j``; ``metric`` is ``[r, top HIGH bits of p]``."""
    rows: tl.constexpr = 1 << (L - LOW - HIGH)
    rest: tl.constexpr = HIGH - KN
    if rest == 0:
        return _column(metric, j, rows, KN)
    split = tl.permute(tl.reshape(metric, [rows, 1 << KN, 1 << rest]), [0, 2, 1])
    part = _column(tl.reshape(split, [rows << rest, 1 << KN]), j, rows << rest, KN)
    return tl.reshape(tl.permute(tl.reshape(part, [rows, 1 << rest]), [1, 0]), [rows << rest])


@triton.jit
def _codes(table, j: tl.constexpr, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Return the codes ``[a, b]`` that follow predecessor ``j``."""
    rows: tl.constexpr = 1 << (L - LOW - KN)
    a = tl.arange(0, rows)[:, None]
    return tl.load(table + (((j * rows + a) << LOW) + tl.arange(0, 1 << LOW)[None, :]))


@triton.jit
def _store_pointers(best, back, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Store the low bits of ``best``, ``[a, b]``, many a word."""
    share: tl.constexpr = _pointer_share(LOW, KN)
    fold: tl.constexpr = _pointer_fold(L, LOW, KN)
    width: tl.constexpr = _pointer_bits(KN)
    rows: tl.constexpr = (1 << (L - LOW - KN)) // fold
    words: tl.constexpr = (1 << LOW) // share
    pointer = tl.reshape(best & ((1 << KN) - 1), [fold, rows, words, share])
    word = tl.sum(pointer << (tl.arange(0, share) * width)[None, None, None, :], axis=3)
    word = tl.sum(word << (tl.arange(0, fold) * (share * width))[:, None, None], axis=0)
    where = tl.arange(0, rows)[:, None] * words + tl.arange(0, words)[None, :]
    tl.store(back + where, word)


@triton.jit
def _costs(table, gains, slopes, j: tl.constexpr, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Return the costs ``[a, b]`` of the codes that follow predecessor ``j``, without what all states have."""
    code = _codes(table, j, L, LOW, KN).to(tl.float32)
    cost = code * (gains[0] * code - slopes[0])
    if len(gains) == 2:
        code = _codes(table + (1 << L), j, L, LOW, KN).to(tl.float32)
        cost += code * (gains[1] * code - slopes[1])
    return cost


@triton.jit
def _step(values, weights, t, steps, EACH: tl.constexpr):
    """Weights of the values of step t, their products with twice the values, and what all states of a step have."""
    gains, slopes = (), ()
    power = 0.0
    for i in tl.static_range(EACH):
        there = t < steps
        gain = tl.load(weights + t * EACH + i, mask=there, other=0.0)
        value = tl.load(values + t * EACH + i, mask=there, other=0.0)
        gains += (gain,)
        slopes += (2.0 * gain * value,)
        power += gain * value * value
    return gains, slopes, power


@triton.jit
def _advance(metric, table, gains, slopes, offset, back, L: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
             KN: tl.constexpr):  # fmt: skip
    """Take one step: write its back-pointers and return the next step's metric."""
    rows: tl.constexpr = 1 << (L - LOW - KN)
    for j in tl.static_range(1 << KN):
        old = _old(metric, j, L, LOW, HIGH, KN)
        bits = (old[:, None] + _costs(table, gains, slopes, j, L, LOW, KN)).to(tl.int32, bitcast=True)
        bits = (bits & -(1 << KN)) | j
        best = bits if j == 0 else tl.minimum(best, bits)
    _store_pointers(best, back, L, LOW, KN)
    new = best.to(tl.float32, bitcast=True) + offset
    if KN > LOW:
        new = tl.broadcast_to(new[:, :, None], [rows, 1 << LOW, 1 << (KN - LOW)])
    return tl.permute(tl.reshape(new, [1 << HIGH, 1 << (L - LOW - HIGH)]), [1, 0])


@triton.jit
def _predecessor(node, back, L: tl.constexpr, LOW: tl.constexpr, KN: tl.constexpr):
    """Return the state of a step from the node that follows it."""
    share: tl.constexpr = _pointer_share(LOW, KN)
    width: tl.constexpr = _pointer_bits(KN)
    rows: tl.constexpr = (1 << (L - LOW - KN)) // _pointer_fold(L, LOW, KN)
    a, b = node >> LOW, node & ((1 << LOW) - 1)
    word = tl.load(back + (a % rows) * ((1 << LOW) // share) + b // share)
    place = ((a // rows) * share + b % share) * width
    return node | (((word >> place) & ((1 << KN) - 1)) << (L - KN))


@triton.jit(do_not_specialize=["rates", "period"])
def _viterbi(
    values, weights, table, overlap, back, states, steps, rates, period,
    L: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, STRIDE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Search one sequence; bit ``t % period`` of ``rates`` says whether step t has ``HIGH`` bits.

    A step has ``EACH`` values, a table (EACH, states), and ``STRIDE`` words of back-pointers.
    """
    tile = tl.program_id(0).to(tl.int64)
    values += tile * steps * EACH
    weights += tile * steps * EACH
    states += tile * steps
    back += tile * steps * STRIDE
    ends = tl.load(overlap + tile).to(tl.int32)
    first = tl.where((rates & 1) == 1, HIGH, LOW)
    rows: tl.constexpr = 1 << (L - LOW - HIGH)
    node = tl.arange(0, 1 << HIGH)[None, :] * rows + tl.arange(0, rows)[:, None]
    bound = (ends < 0) | ((node >> (first - LOW)) == ends)
    _, _, power = _step(values, weights, 0, steps, EACH)
    metric = tl.where(bound, power, HUGE)
    for t in range(0, steps):
        gain, slope, _ = _step(values, weights, t, steps, EACH)
        _, _, offset = _step(values, weights, t + 1, steps, EACH)
        row = back + t * STRIDE
        if HIGH == LOW:
            metric = _advance(metric, table, gain, slope, offset, row, L, LOW, HIGH, LOW)
        elif ((rates >> ((t + 1) % period)) & 1) == 1:
            metric = _advance(metric, table, gain, slope, offset, row, L, LOW, HIGH, HIGH)
        else:
            metric = _advance(metric, table, gain, slope, offset, row, L, LOW, HIGH, LOW)
    least = tl.min(tl.min(metric, axis=1), axis=0)
    best = tl.min(tl.min(tl.where(metric == least, node, 1 << L), axis=1), axis=0) >> (first - LOW)
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


def launch_options(state_bits: int) -> dict[str, int]:
    """Return the number of warps: what an H100 was fastest with, up to 512 threads."""
    return {"num_warps": 1 << max(0, min(4, state_bits - 11))}


def _halves(codebook: Tensor) -> Tensor:
    """Return the codebook in half precision if that is exact (levels of the computed codebook are)."""
    if codebook.dtype == torch.float16:
        return codebook
    half = codebook.to(torch.float16)
    return half if bool((half.to(torch.float32) == codebook).all()) else codebook.to(torch.float32)


def search(
    values: Tensor,
    weights: Tensor,
    codebook: Tensor,
    rates: tuple[int, ...],
    overlap: Tensor,
    state_bits: int,
    options: dict[str, int] | None = None,
) -> Tensor:
    """Return the states of least squared error; arguments as in ``framequant.kernels.viterbi.search``.

    ``codebook`` is (states, values of a state). ``options`` overrides ``launch_options`` (the benchmark compares
    several).
    """
    values, weights, overlap = values.contiguous(), weights.contiguous(), overlap.contiguous()
    each = codebook.shape[1]
    steps, low, high = values.shape[1] // each, min(rates), max(rates)
    stride = max(_pointer_words(state_bits, low, k) for k in (low, high))
    states = torch.empty((len(values), steps), dtype=torch.int32, device=values.device)
    share = max(1, min(len(values), _SCRATCH_BYTES // (4 * steps * stride)))
    back = torch.empty((share, steps, stride), dtype=torch.int32, device=values.device)
    pattern = sum((k > low) << i for i, k in enumerate(rates))
    table = _halves(codebook.mT.contiguous())
    options = options or launch_options(state_bits)
    for i in range(0, len(values), share):
        part = slice(i, min(i + share, len(values)))
        with torch.cuda.device_of(values):
            _viterbi[(part.stop - part.start,)](
                values[part], weights[part], table, overlap[part], back, states[part],
                steps, pattern, len(rates),
                L=state_bits, LOW=low, HIGH=high, STRIDE=stride, EACH=each, **options,
            )  # fmt: skip
    return states
