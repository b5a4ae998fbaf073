"""A quantized linear on the CPU for a few tokens, compiled by numba: codes are decoded in registers.

Coefficients ``z`` of a token become integers, ``z = unit * q``: of 15 bits with their sign where the input has at most
as many (bfloat16, half), of 30 as two halves for float32, relative to the token's largest coefficient. A row's sum of
``code * q`` is then exact, and one product with unit and scale ends it. Offsets (the centre of the levels, zero
points, the centre of the codebook) act on the sum of q alone.

Only ``framequant.kernels.cpu`` imports this module. Imports numba and numpy, no torch.
"""

# Compiled in: 5174727fa846 (tests/kernels/test_stamps.py says why)
from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from framequant.kernels import cpu_vectors as vectors
from framequant.kernels.transform_cpu import analysis, synthesis

LARGEST = 16383  # of a 15-bit integer with sign, one bit to spare
HALF = 1 << 15
LARGEST_PAIR = 1 << 29
LANES, TILES = vectors.LANES, vectors.TILES
SEGMENT = 16  # chunks of tiles whose sum fits 32 bits: 8 columns * 16 chunks * 1020 * 2**14 < 2**31
BLOCK = 64  # rows whose sums are turned into values together
BFLOAT16 = 1  # how inputs and outputs are stored; else float32

#: Places in the array of sizes of a product; TRELLIS has the weights of a state, or 0.
BITS, ROWS, COLS, STRIDE, CHUNKS, SPLIT, TRELLIS, ACROSS, WORDS = range(9)
#: Places in a plan's header, each an address and a count: of bytes for the codes, else of elements.
CODES, FRAME_IN, SIZES_IN, FRAME_OUT, SIZES_OUT, SIZES, PLACES, BOOK, SCALES, OFFSETS, BIAS = range(0, 22, 2)


def pointer(element):  # type: ignore[no-untyped-def]
    """The intrinsic that takes an address for a pointer to ``element``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    @intrinsic
    def cast(typing_context, address):  # type: ignore[no-untyped-def]
        return types.CPointer(element)(types.intp), generate

    return cast


_float_pointer, _long_pointer = pointer(types.float32), pointer(types.int64)
_int_pointer = pointer(types.uint32)
_short_pointer, _byte_pointer = pointer(types.uint16), pointer(types.uint8)


@njit(nogil=True, cache=True)
def _read(address, token, count, kind):
    """A token's coordinates as a new float32 array."""
    if kind == BFLOAT16:
        bits = np.empty(count, np.uint32)
        shorts = carray(_short_pointer(address + 2 * token * count), count)
        for i in range(count):
            bits[i] = np.uint32(shorts[i]) << np.uint32(16)
        return bits.view(np.float32)
    return carray(_float_pointer(address + 4 * token * count), count).copy()


@njit(nogil=True, cache=True)
def _write(values, bias, address, token, kind):
    """Write a token's outputs, plus the bias where there is one, rounded to nearest even for bfloat16."""
    count = values.size
    for i in range(bias.size):
        values[i] += bias[i]
    if kind == BFLOAT16:
        bits = values.view(np.uint32)
        shorts = carray(_short_pointer(address + 2 * token * count), count)
        for i in range(count):
            word = bits[i]
            rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            shorts[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
    else:
        target = carray(_float_pointer(address + 4 * token * count), count)
        for i in range(count):
            target[i] = values[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _unit(z, parts):
    """What one step of the token's integers is worth; NaN where a coefficient is not finite.

    The largest by their bits, which are in the order of what they stand for, infinity and NaN behind all numbers.
    """
    largest = np.zeros(1, np.uint32)
    for bits in z.view(np.uint32):
        largest[0] = max(largest[0], bits & np.uint32(0x7FFFFFFF))
    if largest[0] == 0:
        return np.float64(1)
    if largest[0] >= 0x7F800000:
        return np.float64(np.nan)
    return np.float64(largest.view(np.float32)[0]) / (LARGEST if parts == 1 else LARGEST_PAIR)


@njit(nogil=True, cache=True, error_model="numpy")
def _round(z, unit, parts, low, high):
    """Write the integers of ``z`` to ``low`` (and, of two parts, their upper halves to ``high``)."""
    inverse = np.float32(1 / unit)
    if not np.isfinite(inverse):
        inverse = np.float32(0)
    for k in range(z.size):
        q = np.int32(np.rint(z[k] * inverse)) if np.isfinite(z[k]) else np.int32(0)
        if parts == 2:
            upper = (q + (HALF >> 1)) >> 15
            high[k] = upper
            q -= upper * HALF
        low[k] = q


@njit(nogil=True, cache=True)
def _arrange_scalar(q, place, codes):
    """Integers in the order of the words: code p of the groups of a chunk side by side."""
    for group in range(-(-q.size // codes)):
        first = group // LANES * codes * LANES + group % LANES
        for p in range(min(codes, q.size - group * codes)):
            place[first + p * LANES] = q[group * codes + p]


@njit(nogil=True, cache=True)
def _arrange_trellis(q, place, each):
    """Integers of a chunk of tiles state by state: each in both halves of a 32-bit lane, or the two of a state."""
    states = 16 // each
    for tile in range(-(-q.size // 16)):
        first = 2 * (tile // TILES * states * TILES + tile % TILES)
        for k in range(min(16, q.size - tile * 16)):
            value = q[tile * 16 + k]
            if each == 2:
                place[first + k // 2 * (2 * TILES) + k % 2] = value
            else:
                place[first + k * (2 * TILES)] = value
                place[first + k * (2 * TILES) + 1] = value


@njit(nogil=True, cache=True)
def activations(x, tokens, kind, parts, constants, frame_sizes, sizes):
    """Analyse tokens and arrange their coefficients for the product.

    Returns:
        (streams, length) int16, the sums of each stream's integers (streams,), and the units (tokens,).
    """
    cols, dim = sizes[COLS], frame_sizes[6]
    if sizes[TRELLIS]:
        length = 32 // sizes[TRELLIS] * sizes[ACROSS]
    else:
        length = sizes[CHUNKS] * LANES * (16 // _gcd(sizes[BITS]))
    z = np.zeros((tokens * parts, length), np.int16)
    totals = np.zeros(tokens * parts, np.int64)
    units = np.empty(tokens, np.float64)
    integers = np.empty((2, cols), np.int32)
    for token in range(tokens):
        coefficients = analysis(_read(x, token, dim, kind), constants, frame_sizes)
        units[token] = _unit(coefficients, parts)
        _round(coefficients, units[token], parts, integers[0], integers[1])
        for part in range(parts):
            stream = token * parts + part
            for k in range(cols):
                totals[stream] += integers[part, k]
            if sizes[TRELLIS]:
                _arrange_trellis(integers[part], z[stream], sizes[TRELLIS])
            else:
                _arrange_scalar(integers[part], z[stream], 16 // _gcd(sizes[BITS]))
    return z, totals, units


@njit(nogil=True, cache=True)
def _gcd(bits):
    return 1 if bits % 2 else (2 if bits % 4 else 4)


@njit(nogil=True, cache=True)
def _scalar_rows(bits, words, row_stride, rows, z, stride, chunks, split, results, streams):
    """Add to ``results`` (rows, streams) the sums of rows for 1, 2 or 4 streams, ``split`` chunks at a time."""
    codes = 16 // _gcd(bits)
    step, size = 2 * LANES * (bits // _gcd(bits)), 2 * LANES * codes
    for start in range(0, chunks, split):
        count = min(split, chunks - start)
        w, a = words + start * step, z + start * size
        if bits == 2 and streams == 1:
            vectors.scalar_dot_2_1(w, row_stride, rows, a, stride, count, results)
        elif bits == 2 and streams == 2:
            vectors.scalar_dot_2_2(w, row_stride, rows, a, stride, count, results)
        elif bits == 2 and streams == 4:
            vectors.scalar_dot_2_4(w, row_stride, rows, a, stride, count, results)
        elif bits == 3 and streams == 1:
            vectors.scalar_dot_3_1(w, row_stride, rows, a, stride, count, results)
        elif bits == 3 and streams == 2:
            vectors.scalar_dot_3_2(w, row_stride, rows, a, stride, count, results)
        elif bits == 3 and streams == 4:
            vectors.scalar_dot_3_4(w, row_stride, rows, a, stride, count, results)
        elif bits == 4 and streams == 1:
            vectors.scalar_dot_4_1(w, row_stride, rows, a, stride, count, results)
        elif bits == 4 and streams == 2:
            vectors.scalar_dot_4_2(w, row_stride, rows, a, stride, count, results)
        elif bits == 4 and streams == 4:
            vectors.scalar_dot_4_4(w, row_stride, rows, a, stride, count, results)
        elif streams == 1:
            vectors.scalar_dot_1_1(w, row_stride, rows, a, stride, count, results)
        elif streams == 2:
            vectors.scalar_dot_1_2(w, row_stride, rows, a, stride, count, results)
        else:
            vectors.scalar_dot_1_4(w, row_stride, rows, a, stride, count, results)


@njit(nogil=True, cache=True)
def _trellis_rows(words, places, rows, z, stride, across, each, book, sums, results, streams):
    """The same for rows of one row of tiles, ``each`` weights a state; see ``cpu_vectors`` for the arguments."""
    chunks = across // TILES
    for start in range(0, chunks, SEGMENT):
        count = min(SEGMENT, chunks - start)
        w, a = words + 4 * TILES * start, z + 16 // each * 4 * TILES * start
        if each == 2 and streams == 1:
            vectors.pair_dot_1(w, places, rows, a, stride, count, book, sums, results)
        elif each == 2 and streams == 2:
            vectors.pair_dot_2(w, places, rows, a, stride, count, book, sums, results)
        elif each == 2:
            vectors.pair_dot_4(w, places, rows, a, stride, count, book, sums, results)
        elif streams == 1:
            vectors.trellis_dot_1(w, places, rows, a, stride, count, book, sums, results)
        elif streams == 2:
            vectors.trellis_dot_2(w, places, rows, a, stride, count, book, sums, results)
        else:
            vectors.trellis_dot_4(w, places, rows, a, stride, count, book, sums, results)


@njit(nogil=True, cache=True, error_model="numpy")
def _end_rows(results, streams, first_stream, totals, units, parts, scales, offsets, u, start, rows):
    """Turn the sums of some rows and streams into values, adding to ``u`` (tokens, all rows)."""
    for i in range(streams):
        stream = first_stream + i
        token, part = stream // parts, stream % parts
        unit = units[token] * (HALF if part else 1)
        total = np.float64(totals[stream])
        for r in range(rows):
            value = results[r * streams + i] + offsets[start + r] * total
            u[token, start + r] += value * (unit * scales[start + r])


@njit(nogil=True, cache=True, error_model="numpy")
def product(codes, size, z, totals, units, parts, sizes, places, book, scales, offsets, u, start, stop):
    """Rows ``start … stop - 1`` of ``u = D̃ z`` for every token, added to ``u`` (tokens, rows) of float64.

    Args:
        codes: address of the packed codes, ``size`` bytes of them.
        z: what ``activations`` returned, with ``totals`` and ``units``.
        parts: 1 or 2 streams a token.
        sizes: of the product.
        places: address of the places of the states of a tile, (256 or 128, 3) int64.
        book: address of mask, multiplier and addend of the codebook, int32.
        scales: (rows,) value of one code step.
        offsets: (rows,) added to every code of a row, in code steps.
    """
    streams, stride, row_stride = z.shape[0], 2 * z.shape[1], sizes[STRIDE]
    results, sums = np.empty(BLOCK * 4, np.int64), np.empty(16 * 4 * TILES, np.int32)
    bits, chunks, split = sizes[BITS], sizes[CHUNKS], sizes[SPLIT]
    needed = 0 if sizes[TRELLIS] else chunks * 2 * LANES * (bits // _gcd(bits))
    # Loads reach beyond a row, where activations are zero; they must not leave the tensor.
    safe = stop if needed <= row_stride else min(stop, max((size - needed) // row_stride + 1, 0))
    bounce = np.zeros(needed, np.uint8)
    # Asked for once: numba counts references atomically.
    z_start, results_start, bounce_start = z.ctypes.data, results.ctypes.data, bounce.ctypes.data
    sums_start = sums.ctypes.data
    # What only an address names is freed: ``sums`` is written to in the loop, and so stays.
    first = start
    while first < stop:
        if sizes[TRELLIS]:
            rows = min(16 - first % 16, stop - first)
        else:
            rows = min(BLOCK, safe - first) if first < safe else 1
        words = codes + (first // 16 if sizes[TRELLIS] else first) * row_stride
        sums[0] = 0
        if first >= safe:
            bounce[: size - first * row_stride] = carray(_byte_pointer(words), size - first * row_stride)[
                :needed
            ]
            words = bounce_start
        stream = 0
        while stream < streams:
            count = 4 if streams - stream >= 4 else (2 if streams - stream >= 2 else 1)
            results[: rows * count] = 0
            at = z_start + stream * stride
            if sizes[TRELLIS]:
                each = sizes[TRELLIS]
                spots = places + first % 16 * (16 // each) * 24
                _trellis_rows(
                    words,
                    spots,
                    rows,
                    at,
                    stride,
                    sizes[ACROSS],
                    each,
                    book,
                    sums_start,
                    results_start,
                    count,
                )
            else:
                _scalar_rows(bits, words, row_stride, rows, at, stride, chunks, split, results_start, count)
            _end_rows(results, count, stream, totals, units, parts, scales, offsets, u, first, rows)
            stream += count
        first += rows


@njit(nogil=True, cache=True)
def _floats(header, place):
    return carray(_float_pointer(header[place]), header[place + 1])


@njit(nogil=True, cache=True)
def _longs(header, place):
    return carray(_long_pointer(header[place]), header[place + 1])


@njit(nogil=True, cache=True)
def prepare(x, tokens, kind, parts, header):
    """``activations`` for a plan's header."""
    return activations(
        x, tokens, kind, parts, _floats(header, FRAME_IN), _longs(header, SIZES_IN), _longs(header, SIZES)
    )


@njit(nogil=True, cache=True)
def multiply(z, totals, units, parts, header, u, start, stop):
    """``product`` for a plan's header."""
    product(
        header[CODES], header[CODES + 1], z, totals, units, parts, _longs(header, SIZES), header[PLACES], header[BOOK],
        _floats(header, SCALES), _floats(header, OFFSETS), u, start, stop,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def finish(u, out, kind, header):
    """Synthesise every token's coefficients and write them, with the bias, at the address ``out``."""
    constants, sizes = _floats(header, FRAME_OUT), _longs(header, SIZES_OUT)
    for token in range(u.shape[0]):
        _write(
            synthesis(u[token].astype(np.float32), constants, sizes), _floats(header, BIAS), out, token, kind
        )


@njit(nogil=True, cache=True)
def linear(x, out, tokens, kind, parts, header):
    """The whole linear in one call, on one thread: from the address of inputs to the address of outputs."""
    z, totals, units = prepare(x, tokens, kind, parts, header)
    u = np.zeros((tokens, header[SCALES + 1]), np.float64)
    multiply(z, totals, units, parts, header, u, 0, u.shape[1])
    finish(u, out, kind, header)
