"""A frame's transforms of many tokens on the CPU, compiled by numba: sixteen tokens abreast, one in each vector lane.

With tokens in the lanes every step is the same few vector instructions, whatever the dimension: butterflies for powers
of two, small dense matrices for odd factors and for the fusion frame's block. Sixteen tokens of a linear stay in a
core's cache from the reading of their inputs to the writing of their coefficients. Results do not depend on how tokens
are batched or shared out to threads. ``framequant.kernels.cpu_frames`` makes the constants. Imports numba and numpy,
no torch.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from framequant.kernels.product_cpu import (
    BFLOAT16,
    _float_pointer,
    _short_pointer,
    _write,
)
from framequant.kernels.transform_cpu import _last_axis

LANES = 16
#: Places in the array of sizes: coordinates, coefficients, the fusion frame's blocks (0 for none) with their columns
#: and rows, and the order in which coefficients are written: column ``p * GROUPS + g`` is number ``g * SIZE + p``.
DIM, COEFFICIENTS, BLOCKS, BLOCK_IN, BLOCK_OUT, GROUPS, SIZE = range(7)


@njit(nogil=True, cache=True)
def _read_lanes(address, kind, count, first, stop, lanes):
    """Rows ``first …`` of a matrix of ``count`` columns, each to a lane of ``lanes`` (count, LANES)."""
    bits = lanes.view(np.uint32)
    for lane in range(LANES):
        token = first + lane
        if token >= stop:
            for i in range(count):
                lanes[i * LANES + lane] = np.float32(0)
        elif kind == BFLOAT16:
            shorts = carray(_short_pointer(address + 2 * token * count), count)
            for i in range(count):
                bits[i * LANES + lane] = np.uint32(shorts[i]) << np.uint32(16)
        else:
            values = carray(_float_pointer(address + 4 * token * count), count)
            for i in range(count):
                lanes[i * LANES + lane] = values[i]


@njit(nogil=True, cache=True)
def _scale_lanes(lanes, factors):
    for i in range(factors.size):
        factor = factors[i]
        row = lanes[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            row[lane] *= factor


@njit(nogil=True, cache=True)
def _kronecker(lanes, work, axes, matrices):
    """Multiply every axis by its factor, a Hadamard matrix without its scale times an odd one; the array of the result.

    ``axes`` holds for each the power of two, the odd size, and the coordinates from one of its points to the next.
    """
    at, total = 0, lanes.size
    for axis in range(axes.shape[0]):
        power, odd, run = axes[axis, 0], axes[axis, 1], axes[axis, 2] * LANES
        half = odd * run
        while half < power * odd * run:
            for start in range(0, total, 2 * half):
                low, high = lanes[start : start + half], lanes[start + half : start + 2 * half]
                for i in range(half):
                    u, v = low[i], high[i]
                    low[i], high[i] = u + v, u - v
            half *= 2
        if odd > 1:
            matrix = matrices[at : at + odd * odd]
            at += odd * odd
            for start in range(0, total, odd * run):
                stop = start + odd * run
                _last_axis(matrix, lanes[start:stop], work[start:stop], odd, odd, run)
            lanes, work = work, lanes
    return lanes


@njit(nogil=True, cache=True)
def _blocks(lanes, block, blocks, outer, inner):
    """Multiply every block of ``inner`` numbers by the matrix ``block`` (outer, inner); a new array."""
    result = np.empty(blocks * outer * LANES, np.float32)
    for b in range(blocks):
        source = lanes[b * inner * LANES : (b + 1) * inner * LANES]
        target = result[b * outer * LANES : (b + 1) * outer * LANES]
        _last_axis(block, source, target, outer, inner, LANES)
    return result


@njit(nogil=True, cache=True)
def analysis(inputs, kind, coefficients, tokens, factors, axes, matrices, block, sizes, start, stop):
    """Coefficients of tokens ``start … stop - 1``, from the address of all inputs to that of all coefficients.

    Args:
        factors: (dim,) signs times the scale of the transform.
        axes: of ``_kronecker``, with ``matrices``.
        block: of the fusion frame, (rows, columns) flat, or empty.
        sizes: see the module.
    """
    dim, groups, size = sizes[DIM], sizes[GROUPS], sizes[SIZE]
    lanes, work = np.empty(dim * LANES, np.float32), np.empty(dim * LANES, np.float32)
    row, nothing = np.empty(groups * size, np.float32), np.empty(0, np.float32)
    for first in range(start, stop, LANES):
        _read_lanes(inputs, kind, dim, first, min(stop, tokens), lanes)
        _scale_lanes(lanes, factors)
        found = _kronecker(lanes, work, axes, matrices)
        if sizes[BLOCKS]:
            found = _blocks(found, block, sizes[BLOCKS], sizes[BLOCK_OUT], sizes[BLOCK_IN])
        for lane in range(min(LANES, stop - first)):
            for p in range(size):
                for g in range(groups):
                    k = g * size + p
                    row[p * groups + g] = (
                        found[k * LANES + lane] if k < sizes[COEFFICIENTS] else np.float32(0)
                    )
            _write(row, nothing, coefficients, first + lane, kind)


@njit(nogil=True, cache=True)
def synthesis(products, kind, outputs, tokens, factors, axes, matrices, block, sizes, bias, start, stop):
    """Outputs of tokens ``start … stop - 1``, from the address of all products to that of all outputs.

    Args:
        block: of the fusion frame's adjoint, (columns, rows) flat, or empty.
        bias: added to every output, or empty; the others as for ``analysis``.
    """
    dim, count = sizes[DIM], sizes[COEFFICIENTS]
    lanes, work = np.empty(count * LANES, np.float32), np.empty(dim * LANES, np.float32)
    row = np.empty(dim, np.float32)
    for first in range(start, stop, LANES):
        _read_lanes(products, kind, count, first, min(stop, tokens), lanes)
        found = lanes
        if sizes[BLOCKS]:
            found = _blocks(found, block, sizes[BLOCKS], sizes[BLOCK_IN], sizes[BLOCK_OUT])
        found = _kronecker(found, work, axes, matrices)
        _scale_lanes(found, factors)
        for lane in range(min(LANES, stop - first)):
            for i in range(dim):
                row[i] = found[i * LANES + lane]
            _write(row, bias, outputs, first + lane, kind)
