"""Tiles of decoded coefficients on the CPU, compiled by numba: for prompts, whose product is then dense.

Columns come in the order in which codes lie in their words, so that a vector of bytes gives vectors of values: for
scalar codes all first codes of the groups of bytes, then all second ones; for a trellis column c of all tiles, c
rising. ``framequant.kernels.cpu`` orders the activations to match. Values are those of ``storage.decode_rows``, up to
the last bit. Imports numba and numpy, no torch.
"""

# Compiled in: e133b989524d (tests/kernels/test_stamps.py says why)
from __future__ import annotations

import numpy as np
from numba import carray, njit

from framequant.kernels.product_cpu import (
    BFLOAT16,
    _byte_pointer,
    _float_pointer,
    _int_pointer,
    _short_pointer,
)


@njit(nogil=True, cache=True)
def _store(values, address, kind):
    """Write float32 values at an address, rounded to nearest even for bfloat16."""
    count = values.size
    if kind == BFLOAT16:
        bits, shorts = values.view(np.uint32), carray(_short_pointer(address), count)
        for i in range(count):
            word = bits[i]
            shorts[i] = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        target = carray(_float_pointer(address), count)
        for i in range(count):
            target[i] = values[i]


@njit(nogil=True, cache=True)
def scalar_rows(codes, stride, bits, groups, scales, offsets, out, kind, start, stop):
    """Decode rows ``start … stop - 1`` to ``out`` (rows, codes of a group, groups).

    A group is a byte, or three bytes of 3-bit codes.
    """
    size, width = (8, 3) if bits == 3 else (8 // bits, 1)
    mask = np.uint32((1 << bits) - 1)
    words, values = np.empty(groups, np.uint32), np.empty(groups * size, np.float32)
    element = 2 if kind == BFLOAT16 else 4
    for r in range(start, stop):
        row = carray(_byte_pointer(codes + r * stride), stride)
        if width == 1:
            for g in range(groups):
                words[g] = row[g]
        else:
            for g in range(groups):
                words[g] = 0
                for i in range(min(3, stride - 3 * g)):
                    words[g] |= np.uint32(row[3 * g + i]) << np.uint32(8 * i)
        scale, offset = scales[r], offsets[r]
        for p in range(size):
            shift = np.uint32(bits * p)
            part = values[p * groups : (p + 1) * groups]
            for g in range(groups):
                part[g] = (np.float32(np.int32((words[g] >> shift) & mask)) + offset) * scale
        _store(values, out + (r - start) * values.size * element, kind)


@njit(nogil=True, cache=True)
def trellis_rows(codes, words, across, places, book, each, scales, out, kind, start, stop):
    """Decode rows ``start … stop - 1`` to ``out`` (rows, 16, across); ``start`` is a multiple of 16.

    ``each`` is the number of a state's weights: of two the first is made of the lower bytes.
    """
    values = np.empty(16 * across, np.float32)
    mask, multiplier, addend = book[0], book[1], book[2]
    element, centre = 2 if kind == BFLOAT16 else 4, np.int32(510 // each)
    for r in range(start, stop):
        tiles = carray(_int_pointer(codes + r // 16 * words * across * 4), words * across)
        scale = scales[r]
        for c in range(16):
            t = (r % 16 * 16 + c) // each
            low = tiles[places[t, 0] : places[t, 0] + across]
            high = tiles[places[t, 1] : places[t, 1] + across]
            shift = np.uint32(places[t, 2])
            part = values[c * across : (c + 1) * across]
            for j in range(across):
                above = (high[j] << np.uint32(1)) << (np.uint32(31) - shift)
                h = ((low[j] >> shift | above) & mask) * multiplier + addend
                pairs = (h & np.uint32(0x00FF00FF)) + ((h >> np.uint32(8)) & np.uint32(0x00FF00FF))
                total = pairs + (pairs >> np.uint32(16)) if each == 1 else pairs >> np.uint32(c % 2 * 16)
                part[j] = np.float32(np.int32(total & np.uint32(0xFFFF)) - centre) * scale
        _store(values, out + (r - start) * values.size * element, kind)
