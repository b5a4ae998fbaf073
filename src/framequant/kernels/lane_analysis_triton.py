"""Coefficients of one token in a program's shared memory: analysed by the program itself, or copied.

A launch for analysis costs more than the analysis: where the transform is Walsh and Hadamard's, every program of
``lane_product_triton`` makes all coefficients for itself, while its first codes are on their way: butterflies in
float32 registers, each thread's numbers a column of a cube with three axes, one after the other, through shared memory.
The block of the fusion frame, times the last butterflies, is a matrix of constants of the program's code. Other
transforms are copied from what ``column_triton`` or ``vector_triton`` wrote.

A plane of bytes holds coefficients in the order of ``place_of``. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lanes_triton import (
    copy_to_shared,
    lane_largest,
    lane_sum,
    load_shared,
    load_shared_number,
    load_shared_words,
    load_words,
    store_shared,
    store_shared_planes,
    store_shared_words,
    wait_for_copies,
)
from framequant.kernels.vector_triton import bound


@triton.constexpr_function
def shrink(dtype):
    """What numbers are multiplied by, so that sums of 8192 of the largest are finite."""
    return 1.0 if dtype == tl.float16 else 2.0**-16


@triton.constexpr_function
def plane_bytes(count, codes, tiles):
    """Bytes of shared memory from one plane to the next: adjacent ones begin in other banks.

    Args:
        count: bytes of a plane for each code of a byte; for a trellis coefficients, a multiple of 64.
        codes: of a byte; 0 for a trellis.
        tiles: bytes for each 64 of a trellis' coefficients, 64 or, with other banks for them to be written to, 80.
    """
    size = codes * count if codes else count // 64 * tiles
    return -(-size // 128) * 128 + 64


@triton.jit
def place_of(k, COUNT: tl.constexpr, CODES: tl.constexpr, TILES: tl.constexpr):
    """Byte of a plane that coefficient k has.

    Scalar codes: the i-th codes of adjacent bytes are adjacent. A trellis: in their order, TILES bytes for each 64.
    """
    if CODES == 0:
        return k + k // 64 * (TILES - 64)
    else:
        return k % CODES * COUNT + k // CODES


@triton.jit
def zero_tails(shared, thread, LENGTH: tl.constexpr, COUNT: tl.constexpr, CODES: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """Write zeros behind the last of LENGTH coefficients, a multiple of 64, to each of three planes."""
    RUNS: tl.constexpr = CODES if CODES > 0 else 1
    BEGIN: tl.constexpr = LENGTH // CODES if CODES > 0 else LENGTH // 64 * TILES
    SIZE: tl.constexpr = COUNT if CODES > 0 else COUNT // 64 * TILES
    PIECES: tl.constexpr = (SIZE - BEGIN) // 16
    tl.static_assert(thread.shape[0] >= 3 * RUNS * PIECES)
    zero = thread * 0
    run, piece = thread // PIECES, thread % PIECES
    at = shared + run // RUNS * plane_bytes(COUNT, CODES, TILES) + run % RUNS * SIZE + (BEGIN + piece * 16)
    store_shared_words(at, (zero, zero, zero, zero), (run < 3 * RUNS).to(tl.int32))


@triton.jit
def copy_planes(z_ptr, shared, thread, COUNT: tl.constexpr, CODES: tl.constexpr, TILES: tl.constexpr,
                THREADS: tl.constexpr):  # fmt: skip
    """Bring three planes from memory, (1, 4, CODES, COUNT) bytes, all loads before the first store."""
    SIZE: tl.constexpr = (CODES if CODES > 0 else 1) * COUNT // 16
    passes: tl.constexpr = (3 * SIZE + THREADS - 1) // THREADS
    found = ()
    for i in tl.static_range(passes):
        piece = thread + i * THREADS  # of 16 bytes
        found += load_words(z_ptr + piece * 16, (piece < 3 * SIZE).to(tl.int32))
    for i in tl.static_range(passes):
        piece = thread + i * THREADS
        plane = piece // SIZE
        place = (piece - plane * SIZE) * 16
        if CODES == 0:
            place += place // 64 * (TILES - 64)
        words = (found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3])
        store_shared_words(
            shared + plane * plane_bytes(COUNT, CODES, TILES) + place, words, (piece < 3 * SIZE).to(tl.int32)
        )


@triton.constexpr_function
def cube_bytes(size):
    """Bytes of shared memory that a cube of float32 takes: ``cube_place`` of its end."""
    return (size + size // 16 * 4 + size // 128 * 4 + size // 256 * 8) * 4


@triton.jit
def cube_place(n):
    """Bytes from the cube's first number to the n-th: columns along all three axes lie in different banks.

    Of columns that ``spread`` keeps apart two lie in the same.
    """
    return (n + n // 16 * 4 + n // 128 * 4 + n // 256 * 8) * 4


@triton.constexpr_function
def spread(each, codes):
    """How many sixteens of coordinates apart those of adjacent lanes are, so that their bytes go to different banks.

    Args:
        each: coefficients of sixteen coordinates.
        codes: of a byte; 0 for a trellis.
    """
    if codes == 0:
        return 1
    return next(k for k in (1, 2, 4, 8) if k == 8 or each * k % (4 * codes) == 0)


@triton.jit
def _sixteen(thread, SPREAD: tl.constexpr):
    """Which sixteen coordinates a thread has, of as many sixteens as threads."""
    lane, warp = thread % 32, thread // 32
    return lane * SPREAD + warp % SPREAD + warp // SPREAD * (32 * SPREAD)


@triton.constexpr_function
def last_matrix(outputs, width):
    """(coefficients, 16): the frame's block of outputs × width, once or twice, times the last butterflies."""
    from framequant.frames.fusion_frame import shared_block  # triton takes no plain function of a module
    from framequant.frames.hadamard import sylvester

    copies = 16 // width
    rows = [[0.0] * 16 for _ in range(copies * outputs)]
    block = shared_block(outputs // 2, width // 2).tolist()
    walsh = (4 * sylvester(16)).round().tolist()
    for copy in range(copies):
        for i in range(outputs):
            for j in range(16):
                terms = [block[i][k] * walsh[copy * width + k][j] for k in range(width)]
                rows[copy * outputs + i][j] = sum(terms)
    return rows


@triton.jit
def hadamard_registers(values, SIZE: tl.constexpr):
    """Walsh and Hadamard's transform of a tuple of SIZE tensors, of each element for itself."""
    for step in tl.static_range(5):
        if (1 << step) < SIZE:
            new = ()
            for i in tl.static_range(SIZE):
                if (i >> step) % 2 == 0:
                    new += (values[i] + values[i + (1 << step)],)
                else:
                    new += (values[i - (1 << step)] - values[i],)
            values = new
    return values


@triton.jit
def load_signs(
    words_ptr, weight_ptr, thread, SIZE: tl.constexpr, THREADS: tl.constexpr, NORMED: tl.constexpr
):
    """Words of signs of a thread's first column and of the first sixteen numbers; if NORMED, weights of both.

    None of it is from another kernel: to be loaded before the wait for one.
    """
    found = (tl.load(words_ptr + thread), tl.load(words_ptr + thread % 16))
    if NORMED:
        found += (tl.load(weight_ptr + thread % 16),)
        for i in tl.static_range(SIZE // THREADS):
            found += (tl.load(weight_ptr + thread + i * THREADS),)
    return found


@triton.jit
def head_weight(thread, SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """What the first sixteen numbers are multiplied by in ``_sum_of_all``, a lane each."""
    weight = thread * 0.0
    for k in tl.static_range(16):
        weight = tl.where(thread % 32 == k, column_sums(OUTPUTS, WIDTH)[k] * (SIZE // 16), weight)
    return weight


@triton.jit
def _signed(value, word, BIT: tl.constexpr):
    """A number, its sign changed if that bit of a word is 1."""
    return (value.to(tl.int32, bitcast=True) ^ ((word << (31 - BIT)) & -0x80000000)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def copy_numbers(x_ptr, shared, thread, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Begin to bring SIZE numbers to shared memory: 16 bytes a thread, as all programs ask for the same lines."""
    at = x_ptr.to(tl.pointer_type(tl.int8), bitcast=True)
    for turn in tl.static_range(SIZE * x_ptr.dtype.element_ty.primitive_bitwidth // 128 // THREADS):
        piece = (thread + turn * THREADS) * 16
        copy_to_shared(shared + piece, at + piece, thread * 0 + 1)


@triton.jit
def _first_axis(token, cube, loaded, head, thread, SIZE: tl.constexpr, THREADS: tl.constexpr, NORMED: tl.constexpr,
                DTYPE: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Butterflies along the first axis; of each thread's numbers the sum of squares and, not of halves, the largest.

    And, NORMED, the sum of squares of what was read; and the sum of all coefficients before norms.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    column = ()
    squares, largest, energy = thread * 0.0, thread * 0.0, thread * 0.0
    for i in tl.static_range(SIZE // THREADS):
        value = load_shared_number(token + thread * BYTES, DTYPE, i * THREADS * BYTES)
        if NORMED:
            energy += value * value
            value *= loaded[3 + i].to(tl.float32)
        if tl.float16 != DTYPE:
            value *= shrink(DTYPE)
            largest = tl.maximum(largest, tl.abs(value))
        squares += value * value
        column += (_signed(value, loaded[0], i),)
    total = _sum_of_all(token, loaded, head, thread, NORMED, DTYPE)
    column = hadamard_registers(column, SIZE // THREADS)
    if not APART:
        tl.debug_barrier()  # the cube takes the place of what was read
    for i in tl.static_range(SIZE // THREADS):
        store_shared(cube + cube_place(thread), column[i], cube_bytes(i * THREADS))
    return squares, largest, energy, total


@triton.jit
def _second_axis(cube, thread, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Butterflies along the second axis, in place."""
    for turn in tl.static_range(SIZE // THREADS // 16):
        at = cube + cube_place((thread // 16 + turn * (THREADS // 16)) * 256 + thread % 16)
        column = ()
        for i in tl.static_range(16):
            column += (load_shared(at, cube_bytes(16 * i)),)
        column = hadamard_registers(column, 16)
        for i in tl.static_range(16):
            store_shared(at, column[i], cube_bytes(16 * i))


@triton.jit
def _third_axis(cube, sixteen, THREADS: tl.constexpr, TURNS: tl.constexpr):
    """The sixteens of each thread along the third axis."""
    found = ()
    for turn in tl.static_range(TURNS):
        at = cube + cube_place((sixteen + turn * THREADS) * 16)
        for i in tl.static_range(4):
            words = load_shared_words(at, i * 16)
            for j in tl.static_range(4):
                found += (words[j].to(tl.float32, bitcast=True),)
    return found


@triton.constexpr_function
def column_sums(outputs, width):
    """Sums of the columns of ``last_matrix``; without a frame of the last butterflies."""
    if width == 1:
        return [16.0] + [0.0] * 15
    return [sum(row[k] for row in last_matrix(outputs, width)) for k in range(16)]


@triton.jit
def _sum_of_all(token, loaded, head, thread, NORMED: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of all coefficients before norms: butterflies add up to the first of their numbers times how many.

    So sixteen numbers tell, those of the last butterflies, which the frame's block follows.
    """
    number = load_shared_number(token + thread % 16 * (DTYPE.primitive_bitwidth // 8), DTYPE) * shrink(DTYPE)
    if NORMED:
        number *= loaded[2].to(tl.float32)
    return lane_sum(_signed(number, loaded[1], 0) * head)


@triton.jit
def _unit(sums, thread, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """A power of two that bounds the norm, as bits, of what all warps found; and whether all numbers are some."""
    squares, largest = thread * 0.0, thread * 0.0
    for pair in tl.static_range(THREADS // 64):
        words = load_shared_words(sums + thread * 0, pair * 16)
        for i in tl.static_range(2):
            squares += words[2 * i].to(tl.float32, bitcast=True)
            largest = tl.maximum(largest, words[2 * i + 1].to(tl.float32, bitcast=True))
    return bound(squares, largest, SIZE), (largest < float("inf")) & (squares == squares)


@triton.jit
def _inverse_root(sums, thread, epsilon, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """One by the root of the mean square of what all warps read, ``epsilon`` added to the mean."""
    energy = thread * 0.0
    for quad in tl.static_range(THREADS // 128):
        words = load_shared_words(sums + thread * 0, THREADS // 4 + quad * 16)
        for i in tl.static_range(4):
            energy += words[i].to(tl.float32, bitcast=True)
    return tl.rsqrt(energy * (1.0 / SIZE) + epsilon)


@triton.jit
def _thirds(a, b, c):
    """The Fourier transform of three complex numbers, pairs, with exp(+2πi/3)."""
    sums = (b[0] + c[0], b[1] + c[1])
    turned = ((b[0] - c[0]) * 0.8660254037844386, (b[1] - c[1]) * 0.8660254037844386)
    middle = (a[0] - 0.5 * sums[0], a[1] - 0.5 * sums[1])
    return (a[0] + sums[0], a[1] + sums[1]), (middle[0] - turned[1], middle[1] + turned[0]), (
        middle[0] + turned[1], middle[1] - turned[0])  # fmt: skip


@triton.jit
def _turned(x, COS: tl.constexpr, SIN: tl.constexpr):
    """A complex number times COS + i SIN."""
    return x[0] * COS - x[1] * SIN, x[0] * SIN + x[1] * COS


@triton.jit
def ninths(x):
    """The Fourier transform, with exp(+2πi/9), of nine complex numbers of which x has eight as pairs; the ninth is 0.

    The block of a harmonic frame with redundancy 9/8, times 3 (``frames/fusion_frame.shared_block``).
    """
    one = _thirds((x[0], x[1]), (x[6], x[7]), (x[12], x[13]))
    two = _thirds((x[2], x[3]), (x[8], x[9]), (x[14], x[15]))
    three = _thirds((x[4], x[5]), (x[10], x[11]), (x[0] * 0.0, x[0] * 0.0))
    # cos and sin of 40, 80 and 160 degrees
    y0 = _thirds(one[0], two[0], three[0])
    y1 = _thirds(
        one[1],
        _turned(two[1], 0.766044443118978, 0.6427876096865394),
        _turned(three[1], 0.17364817766693041, 0.984807753012208),
    )
    y2 = _thirds(
        one[2],
        _turned(two[2], 0.17364817766693041, 0.984807753012208),
        _turned(three[2], -0.9396926207859083, 0.3420201433256689),
    )
    found = ()
    for k in tl.static_range(3):
        found += (y0[k][0], y0[k][1], y1[k][0], y1[k][1], y2[k][0], y2[k][1])
    return found


@triton.constexpr_function
def pair_factor(codes):
    """What coefficients of the second of each two codes of a byte are multiplied by; ``codes`` 0 for a trellis."""
    return 2.0 ** -(8 // codes) if codes else 1.0


@triton.jit
def _times(column, factor):
    """Sixteen numbers times a factor."""
    found = ()
    for k in tl.static_range(16):
        found += (column[k] * factor,)
    return found


@triton.jit
def _store_column(column, scale, first, shared, WIDTH: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr,
                  CODES: tl.constexpr, TILES: tl.constexpr, MATRIX: tl.constexpr):  # fmt: skip
    """Coefficients of sixteen coordinates, from the first-th on, to planes; of eighteen the butterflies are made."""
    PERIOD: tl.constexpr = period(EACH, CODES)
    places = ()
    for c in tl.static_range(PERIOD):
        places += (shared + place_of(first + c, COUNT, CODES, TILES),)
    if EACH == 18 and WIDTH == 16:
        column = ninths(column)
        scale *= 1.0 / 3.0
    scales = (scale, scale * pair_factor(CODES))
    for c in tl.static_range(EACH):
        if WIDTH == 1 or (EACH == 18 and WIDTH == 16):
            y = column[c] * scales[c % 2]
        else:
            y = column[0] * 0.0
            for k in tl.static_range(16):
                y += column[k] * MATRIX[c][k]
            y *= scales[c % 2]
        integer = (y + 12582912.0).to(tl.int32, bitcast=True)  # of a float32 in [2**23, 2**24), which is one
        digits = (integer - (0x4B400000 - 0x808080)) ^ 0x808080
        store_shared_planes(places[c % PERIOD], digits, plane_bytes(COUNT, CODES, TILES), c // PERIOD)


@triton.constexpr_function
def period(each, codes):
    """After so many coefficients the next one's place is one byte further."""
    if codes:
        return codes
    return 1 if 64 % each == 0 else each


@triton.jit
def analyse(
    loaded, head, token, cube, shared, sums, thread, norm, epsilon, DTYPE: tl.constexpr,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    CODES: tl.constexpr, TILES: tl.constexpr, THREADS: tl.constexpr, NORMED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Write the coefficients of a token of SIZE numbers to planes; NORMED, of their root-mean-square norm.

    Args:
        loaded: by ``load_signs``, and ``head_weight``; ``epsilon`` is what the norm adds to the mean of squares.
        token: shared memory that ``copy_numbers`` brings the token to; the planes may lie there, too.
        cube: ``cube_bytes(SIZE)`` of shared memory, APART from all else; or beginning at ``token`` and with the planes
            in it, for two barriers more.
        shared: the planes.
        sums: twelve bytes of shared memory for each warp, not in the cube.
        norm: of the transform without the frame.
        OUTPUTS, WIDTH: of the frame's block; 1, 1 without a frame.

    Returns:
        For each thread the power of two that coefficients are divided by, and their sum in units of it.
    """
    TURNS: tl.constexpr = SIZE // THREADS // 16
    EACH: tl.constexpr = OUTPUTS * 16 // WIDTH
    matrix: tl.constexpr = last_matrix(OUTPUTS, WIDTH) if WIDTH > 1 else ()
    wait_for_copies(thread)
    tl.debug_barrier()
    squares, largest, energy, total = _first_axis(
        token, cube, loaded, head, thread, SIZE, THREADS, NORMED, DTYPE, APART
    )
    tl.debug_barrier()
    _second_axis(cube, thread, SIZE, THREADS)
    # behind the second axis, whose loads would wait for these shuffles
    store_shared(sums + thread // 32 * 8, lane_sum(squares))
    if tl.float16 != DTYPE:
        largest = lane_largest(largest)
    store_shared(sums + thread // 32 * 8 + 4, largest)
    if NORMED:
        store_shared(sums + THREADS // 4 + thread // 32 * 4, lane_sum(energy))
    tl.debug_barrier()
    sixteen = _sixteen(thread, spread(EACH, CODES))
    columns = _third_axis(cube, sixteen, THREADS, TURNS)
    bits, finite = _unit(sums, thread, SIZE, THREADS)
    if not APART:
        tl.debug_barrier()
    zero_tails(shared, thread, SIZE // 16 * EACH, COUNT, CODES, TILES)
    down = (0x7F000000 - bits).to(tl.float32, bitcast=True)  # before other factors: it may be the largest
    for turn in tl.static_range(TURNS):
        column = ()
        for k in tl.static_range(16):
            column += (columns[16 * turn + k],)
        if WIDTH == 1 or (
            OUTPUTS == 18 and WIDTH == 16
        ):  # other blocks have these butterflies in their matrix
            column = hadamard_registers(column, 16)
        column = _times(column, down)
        first = (sixteen + turn * THREADS) * EACH
        _store_column(column, norm * 4194304.0, first, shared, WIDTH, EACH, COUNT, CODES, TILES, matrix)
    power = tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))
    if NORMED:
        power *= _inverse_root(sums, thread, epsilon, SIZE, THREADS)
    return power / shrink(DTYPE), total * down * norm
