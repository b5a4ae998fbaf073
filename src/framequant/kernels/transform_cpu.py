"""A frame's transform on the CPU, compiled by numba: Kronecker factors, then the fusion frame's block, in float32.

For the few vectors of decoding, where every call of a torch operator costs more than its arithmetic. Constants of
one direction lie in one float32 array, sizes in one of int64; ``cpu_plan`` makes both. Only ``framequant.kernels``'
other CPU modules import this one. Imports numba and numpy, no torch.
"""

# Compiled in: 66edef366cf2 (tests/kernels/test_stamps.py says why)
from __future__ import annotations

import numpy as np
from numba import njit

from framequant.kernels.cpu_rows import LANES, rows_1_1, rows_1_2, rows_1_4, rows_2_4, rows_4_2, rows_8_1

#: Places in the array of sizes: the three factors, columns and rows of the block as it is stored, number of blocks
#: (0 for none), coordinates, coefficients; where coordinates are put in order, the one that each place takes follows.
FIRST, SECOND, THIRD, BLOCK_IN, BLOCK_OUT, BLOCKS, DIM, COEFFICIENTS, ORDER = range(9)
#: Sums may be reordered and contracted; NaN and infinity keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _few_columns(source, matrix, result, rows, inner, outer):
    """``_last_axis`` where a row of results is less than a vector."""
    for r in range(rows):
        for c in range(outer):
            total = np.float32(0)
            for k in range(inner):
                total += source[r * inner + k] * matrix[k * outer + c]
            result[r * outer + c] = total


@njit(nogil=True, cache=True)
def _columns(source, matrix, result, rows, inner, outer, first, vectors):
    """``_last_axis`` for so many vectors of columns, addresses as integers."""
    matrix += 4 * first
    result += 4 * first
    count = rows // (8 // vectors)
    done = count * (8 // vectors)
    rest, x, y = rows - done, source + 4 * done * inner, result + 4 * done * outer
    if vectors == 4:
        rows_2_4(source, matrix, result, count, inner, outer)
        rows_1_4(x, matrix, y, rest, inner, outer)
    elif vectors == 2:
        rows_4_2(source, matrix, result, count, inner, outer)
        rows_1_2(x, matrix, y, rest, inner, outer)
    else:
        rows_8_1(source, matrix, result, count, inner, outer)
        rows_1_1(x, matrix, y, rest, inner, outer)


@njit(nogil=True, cache=True)
def _last_axis(source, matrix, result, rows, inner, outer):
    """``result[r, c] = sum_k source[r, k] * matrix[k, c]``, all flat."""
    if outer < LANES:
        _few_columns(source, matrix, result, rows, inner, outer)
        return
    x, m, y = source.ctypes.data, matrix.ctypes.data, result.ctypes.data
    first = 0
    for vectors in (4, 2, 1):
        while outer - first >= vectors * LANES:
            _columns(x, m, y, rows, inner, outer, first, vectors)
            first += vectors * LANES
    if first < outer:  # the last vector again, with columns that are there already
        _columns(x, m, y, rows, inner, outer, outer - LANES, 1)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _kronecker(x, constants, start, sizes, work):
    """Multiply the three axes of ``x`` by the factors at ``start``; returns the array that holds the result."""
    first, second, third = sizes[FIRST], sizes[SECOND], sizes[THIRD]
    m0 = constants[start : start + first * first]
    start += first * first
    m1 = constants[start : start + second * second]
    start += second * second
    m2 = constants[start : start + third * third]
    if first > 1:  # rows of the matrix times rows of x: the same product with the roles exchanged
        _last_axis(m0, x, work, first, first, second * third)
        x, work = work, x
    if second > 1:
        size = second * third
        for i in range(first):
            _last_axis(
                m1, x[i * size : (i + 1) * size], work[i * size : (i + 1) * size], second, second, third
            )
        x, work = work, x
    if third > 1:
        _last_axis(x, m2, work, first * second, third, third)
        x, work = work, x
    return x


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def analysis(x, constants, sizes):
    """Coefficients of one vector ``x`` (dim,), which is overwritten; a new array (coefficients,) or ``x``."""
    dim = sizes[DIM]
    if sizes[FIRST] == 0:
        return x
    for i in range(dim):
        x[i] *= constants[i]
    if sizes.size > ORDER:
        unordered, x = x, np.empty(dim, np.float32)
        for i in range(dim):
            x[i] = unordered[sizes[ORDER + i]]
    y = _kronecker(x, constants, dim, sizes, np.empty(dim, np.float32))
    blocks, inner, outer = sizes[BLOCKS], sizes[BLOCK_IN], sizes[BLOCK_OUT]
    if blocks == 0:
        return y
    result = np.empty(blocks * outer, np.float32)
    _last_axis(y, constants[constants.size - inner * outer :], result, blocks, inner, outer)
    return result


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def synthesis(u, constants, sizes):
    """The vector of one row of coefficients ``u`` (coefficients,), which may be overwritten; (dim,)."""
    dim = sizes[DIM]
    if sizes[FIRST] == 0:
        return u
    blocks, inner, outer = sizes[BLOCKS], sizes[BLOCK_OUT], sizes[BLOCK_IN]
    if blocks > 0:
        y = np.empty(dim, np.float32)
        _last_axis(u, constants[constants.size - inner * outer :], y, blocks, inner, outer)
        u = y
    y = _kronecker(u, constants, dim, sizes, np.empty(dim, np.float32))
    if sizes.size > ORDER:
        ordered, y = y, np.empty(dim, np.float32)
        for i in range(dim):
            y[sizes[ORDER + i]] = ordered[i]
    for i in range(dim):
        y[i] *= constants[i]
    return y
