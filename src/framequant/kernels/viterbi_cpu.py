"""Viterbi search for bit-shift trellises on the CPU, compiled by numba.

The best predecessor of a state ``s`` depends on ``p = s >> k`` alone, so a step keeps ``2**(L-k)`` metrics.
Write ``s = (p << k) | b`` and let the next step have ``kn`` bits; the next metric's index is ``q = (a << k) |
b`` with ``p = j * R + a``, ``R = 2**(L-k-kn)``, and the minimum runs over ``j < 2**kn``. For fixed ``b`` and
``j`` everything is contiguous in ``a``, so ``_branch`` emits LLVM vector code over ``a`` (legalised to
whatever the machine has) with ``b`` and ``j`` unrolled. The metric is positive, so its bits order as integers
do: the lowest ``kn`` mantissa bits carry ``j``, and one integer minimum finds value and predecessor together.
Several predecessors share a byte of back-pointers. A state with two values has two tables, and two terms of its cost.

Only ``framequant.kernels.viterbi`` imports this module, and only when numba is present. Imports numba, numpy,
no torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

HUGE = np.float32(1e30)  # an impossible path: finite, so that index bits in its mantissa cannot make a NaN
_LANES = 16
_MAX_VECTOR_RATE = 4
_F32, _I32, _I64, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8)


def _splat(builder, value, lanes):
    vector = ir.VectorType(value.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _weave(builder, vectors):
    """Interleave a power-of-two number of vectors: ``[x0, y0, x1, y1, ...]``."""
    if len(vectors) == 1:
        return vectors[0]
    even, odd = _weave(builder, vectors[0::2]), _weave(builder, vectors[1::2])
    lanes = even.type.count
    order = [i // 2 + (i % 2) * lanes for i in range(2 * lanes)]
    return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_I32, 2 * lanes), order))


def _address(builder, base, index, vector):
    return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())


def _best_of(builder, old, table, terms, lanes):
    """Return ``min_j (old[j] + sum_i c_ij (gain_i c_ij - slope_i))`` as integers whose low bits are ``j``.

    ``table[j]`` are the codes of a state's values, ``terms`` a gain and a slope for each of these.
    """
    flags, vector = ("contract",), ir.VectorType(_I32, lanes)
    best = None
    for j, (value, codes) in enumerate(zip(old, table, strict=True)):
        for code, (gain, slope) in zip(codes, terms, strict=True):
            inner = builder.fsub(builder.fmul(gain, code, flags=flags), slope, flags=flags)
            value = builder.fadd(value, builder.fmul(code, inner, flags=flags), flags=flags)
        bits = builder.and_(builder.bitcast(value, vector), ir.Constant(vector, [-len(old)] * lanes))
        bits = builder.or_(bits, ir.Constant(vector, [j] * lanes))
        if best is None:
            best = bits
        else:
            best = builder.select(builder.icmp_signed("<", bits, best), bits, best)
    return best


@intrinsic(prefer_literal=True)
def _branch(context, old, new, back, table, other, a, stride, terms, bits, next_bits, lanes, each):
    """Advance ``lanes`` values of ``a``: ``new[(a << k) | b] = offset + min_j (...)``; see the module.

    ``other`` is the table of the second of ``each`` 2 values of a state; ``terms`` are gain and slope of both values,
    and the offset.
    """
    literals = (bits, next_bits, lanes, each)
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None
    k, kn, n, count = (value.literal_value for value in literals)
    signature = types.void(old, new, back, table, other, a, stride, terms, bits, next_bits, lanes, each)

    def generate(context, builder, signature, args):
        old_p, new_p, back_p, *tables = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]).data for i in range(5)
        )
        a, stride = args[5], args[6]
        numbers = [_splat(builder, builder.extract_value(args[7], i), n) for i in range(5)]
        terms, offset = (numbers[0:2], numbers[2:4])[:count], numbers[4]
        floats, ints, bytes_ = ir.VectorType(_F32, n), ir.VectorType(_I32, n), ir.VectorType(_I8, n)

        def load(base, row):
            index = builder.add(builder.mul(ir.Constant(_I64, row), stride), a)
            return builder.load(_address(builder, base, index, floats), align=4)

        metrics = [load(old_p, j) for j in range(1 << kn)]
        group, values, word = max(1, 8 // kn), [], None
        for b in range(1 << k):
            codes = [[load(one, (b << kn) + j) for one in tables[:count]] for j in range(1 << kn)]
            best = _best_of(builder, metrics, codes, terms, n)
            values.append(builder.fadd(builder.bitcast(best, floats), offset))
            index = builder.and_(best, ir.Constant(ints, [(1 << kn) - 1] * n))
            place = builder.shl(index, ir.Constant(ints, [(b % group) * kn] * n))
            word = place if b % group == 0 else builder.or_(word, place)
            if b % group == group - 1 or b == (1 << k) - 1:
                index = builder.add(builder.mul(ir.Constant(_I64, b // group), stride), a)
                word = builder.trunc(word, bytes_)
                builder.store(word, _address(builder, back_p, index, bytes_), align=1)
        woven = _weave(builder, values)
        start = builder.shl(a, ir.Constant(_I64, k))
        builder.store(woven, _address(builder, new_p, start, woven.type), align=4)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True)
def _power(values, weights, i, t, each):
    """What every state of step t costs: weights times squares of its values."""
    power = np.float32(0)
    for place in range(t * each, (t + 1) * each):
        power += weights[i, place] * values[i, place] * values[i, place]
    return power


@cache
def _vector_search(low, high, lanes, each):
    """Build the search for two rates; row ``k - low`` of its ``table`` are the codebook's planes as ``[b, p]``."""

    @njit(nogil=True, cache=True)
    def vector_search(values, weights, table, rates, overlap, state_bits, states, old, new, back):
        steps, period = values.shape[1] // each, rates.shape[0]
        for i in range(values.shape[0]):
            first = 1 << (state_bits - rates[0])
            power = _power(values, weights, i, 0, each)
            for p in range(first):
                old[p] = power
            if overlap[i] >= 0:
                for p in range(first):
                    old[p] = HUGE
                old[overlap[i]] = power
            for t in range(steps):
                k, kn = rates[t % period], rates[(t + 1) % period]
                stride = 1 << (state_bits - k - kn)
                first_value, last_value = t * each, (t + 1) * each - 1  # the same of one value a state
                gain, last_gain = weights[i, first_value], weights[i, last_value]
                slope = np.float32(2) * gain * values[i, first_value]
                last_slope = np.float32(2) * last_gain * values[i, last_value]
                offset = np.float32(0)
                if t + 1 < steps:
                    offset = _power(values, weights, i, t + 1, each)
                terms = (gain, slope, last_gain, last_slope, offset)
                row, codes, more = back[t], table[k - low, 0], table[k - low, each - 1]
                if k == low and kn == low:
                    for a in range(0, stride, lanes):
                        _branch(old, new, row, codes, more, a, stride, terms, low, low, lanes, each)
                elif k == low:
                    for a in range(0, stride, lanes):
                        _branch(old, new, row, codes, more, a, stride, terms, low, high, lanes, each)
                elif kn == low:
                    for a in range(0, stride, lanes):
                        _branch(old, new, row, codes, more, a, stride, terms, high, low, lanes, each)
                else:
                    for a in range(0, stride, lanes):
                        _branch(old, new, row, codes, more, a, stride, terms, high, high, lanes, each)
                old, new = new, old
            q = overlap[i]
            if q < 0:
                q = 0
                for p in range(first):
                    if old[p] < old[q]:
                        q = p
            for t in range(steps - 1, -1, -1):
                k, kn = rates[t % period], rates[(t + 1) % period]
                group, b = max(1, 8 // kn), q & ((1 << k) - 1)
                word = back[t, ((b // group) << (state_bits - k - kn)) + (q >> k)]
                j = (word >> ((b % group) * kn)) & ((1 << kn) - 1)
                state = q | (np.int64(j) << (state_bits - kn))
                states[i, t] = state
                q = state >> k

    return vector_search


@njit(nogil=True, cache=True)
def _search_scalar(values, weights, codebook, rates, overlap, state_bits, states, old, new, back):
    """Any rates at all, one state at a time: for patterns that the vector search does not cover."""
    each = codebook.shape[1]
    steps, period = values.shape[1] // each, rates.shape[0]
    for i in range(values.shape[0]):
        first = 1 << (state_bits - rates[0])
        for p in range(first):
            old[p] = np.float32(0) if overlap[i] < 0 or overlap[i] == p else HUGE
        for t in range(steps):
            k, kn = rates[t % period], rates[(t + 1) % period]
            size = 1 << (state_bits - kn)
            for q in range(size):
                best, arg = np.float32(np.inf), 0
                for j in range(1 << kn):
                    state = j * size + q
                    value = old[state >> k]
                    for c in range(each):
                        error = values[i, t * each + c] - codebook[state, c]
                        value += weights[i, t * each + c] * error * error
                    if value < best:
                        best, arg = value, j
                new[q] = best
                back[t, q] = arg
            old, new = new, old
        q = overlap[i]
        if q < 0:
            q = 0
            for p in range(first):
                if old[p] < old[q]:
                    q = p
        for t in range(steps - 1, -1, -1):
            state = q | (np.int64(back[t, q]) << (state_bits - rates[(t + 1) % period]))
            states[i, t] = state
            q = state >> rates[t % period]


def _aligned(shape, dtype):
    """Return an empty array on a 64-byte boundary (a vector load across a cache line costs two)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _permuted(codebook, bits):
    """Return each plane of the codebook as ``[b, p]`` for ``s = (p << bits) | b``, (values of a state, states)."""
    states, each = codebook.shape
    return codebook.T.reshape(each, -1, 1 << bits).swapaxes(1, 2).reshape(each, states)


def _chunk(values, weights, codebook, rates, overlap, state_bits, states):
    """Search one thread's share, with its own scratch memory."""
    low, high = int(rates.min()), int(rates.max())
    size = 1 << (state_bits - low)
    old, new = _aligned(size, np.float32), _aligned(size, np.float32)
    count, each = codebook.shape
    back = _aligned((values.shape[1] // each, size), np.uint8)
    lanes = min(_LANES, 1 << max(0, state_bits - 2 * high))
    if lanes < 4 or high > low + 1 or high > _MAX_VECTOR_RATE:
        _search_scalar(values, weights, codebook, rates, overlap, state_bits, states, old, new, back)
        return
    table = _aligned((2, each, count), np.float32)
    table[0], table[1] = _permuted(codebook, low), _permuted(codebook, high)
    run = _vector_search(low, high, lanes, each)
    run(values, weights, table, rates, overlap, state_bits, states, old, new, back)


def search(values, weights, codebook, rates, overlap, state_bits, threads):
    """Run the Viterbi search over a batch of sequences.

    Args:
        values: ``(B, T * each)`` float32.
        weights: ``(B, T * each)`` float32, positive.
        codebook: ``(2**L, each)`` float32, ``each`` the values of a state, 1 or 2.
        rates: ``(period,)`` int64.
        overlap: ``(B,)`` int64, the ``L - k_0`` bits shared by both ends, or -1 where the ends are free.
        state_bits: L.
        threads: how many threads to use.

    Returns:
        ``(B, T)`` int32 states.
    """
    states = np.empty((len(values), values.shape[1] // codebook.shape[1]), np.int32)
    share = max(1, -(-len(values) // max(1, 4 * threads)))
    spans = [slice(i, i + share) for i in range(0, len(values), share)]

    def work(span):
        _chunk(values[span], weights[span], codebook, rates, overlap[span], state_bits, states[span])

    if threads == 1 or len(spans) <= 1:
        for span in spans:
            work(span)
    else:
        work(spans[0])  # compiles once, before the threads start
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, spans[1:]))
    return states
