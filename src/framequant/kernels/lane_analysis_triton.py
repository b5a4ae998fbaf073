"""Coefficients of one token in a program's shared memory: analysed by the program itself, or copied.

A launch for analysis costs more than the analysis: where the transform is Walsh and Hadamard's, every program of
``lane_product_triton`` makes all coefficients for itself, while its first codes are on their way: butterflies in
float32 registers, each thread's numbers a column of a cube with three axes, one after the other, through shared memory.
The block of the fusion frame, times the last butterflies, is a matrix of constants of the program's code. Other
transforms are copied from what ``column_triton`` or ``vector_triton`` wrote.

Tokens of 16 bits begin on the tensor cores, whose products with 1 and -1 are exact: sums of sixteen numbers, four bits
of a number's place. The sums that a thread then has make up two or three bits more, in its registers, and a second pass
the other two, 7 and 8: a warp keeps to itself there, as its third pass has the same numbers, whatever ``spread`` is.

============  ====================================  ===========================
bits           tokens of 16 bits                     float32, or NORMED
============  ====================================  ===========================
first pass     4, 5, 6, 9 (``mma``); 10 and on       8 and on
second pass    7, 8                                  4 … 7
third pass     0 … 3                                 0 … 3
============  ====================================  ===========================

A plane of bytes holds coefficients in the order of ``place_of``. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lanes_triton import (
    first_mma_halves,
    four,
    from_lane,
    kept,
    lane_largest,
    lane_sum,
    load_global_words,
    load_shared,
    load_shared_number,
    load_shared_transposed,
    load_shared_words,
    load_words,
    store_shared,
    store_shared_pair,
    store_shared_planes,
    store_shared_words,
    warp_barrier,
)
from framequant.kernels.vector_triton import bound

#: What a coefficient as large as the token's unit is in planes: with what carries below 2**22.
LARGEST = tl.constexpr(63.0 * 65536.0)


@triton.constexpr_function
def shrink(dtype):
    """What numbers are multiplied by, so that sums of 8192 of the largest, nine times, are finite."""
    return 1.0 if dtype == tl.float16 else 2.0**-20


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


@triton.jit
def cube_place(n):
    """Bytes from the cube's first number to the n-th; of an exclusive or of numbers that of their places.

    Numbers lie in their order but for the sixteen bytes that they are in of 128: so that in each pass the threads that
    are served together, whatever ``spread`` says, go to different banks.
    """
    turned = (n >> 5 & 1) * 6 ^ (n >> 6 & 1) * 5 ^ (n >> 7 & 1) ^ (n >> 8 & 1) * 6 ^ (n >> 9 & 1) * 4
    return (n ^ turned << 2) * 4


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
def sixteen_of(thread, SPREAD: tl.constexpr):
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
def hadamard_registers(values, SIZE: tl.constexpr, APART: tl.constexpr = 1):
    """Walsh and Hadamard's transform of a tuple of SIZE tensors, of each element for itself; of those APART."""
    for step in tl.static_range(5):
        if (1 << step) >= APART and (1 << step) < SIZE:
            new = ()
            for i in tl.static_range(SIZE):
                if (i >> step) % 2 == 0:
                    new += (values[i] + values[i + (1 << step)],)
                else:
                    new += (values[i - (1 << step)] - values[i],)
            values = new
    return values


@triton.constexpr_function
def in_halves(dtype, normed):
    """Whether the first butterflies are products of halves; of a norm, weights are multiplied in float32 before."""
    return dtype.primitive_bitwidth == 16 and not normed


@triton.jit
def load_signs(
    words_ptr, weight_ptr, thread, SIZE: tl.constexpr, THREADS: tl.constexpr, NORMED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Words of signs of a thread's first numbers and of the first sixteen of all; if NORMED, weights of both.

    None of it is from another kernel: to be loaded before the wait for one.
    """
    START: tl.constexpr = THREADS if in_halves(DTYPE, NORMED) else 0
    found = (tl.load(words_ptr + START + thread), tl.load(words_ptr + thread % 16))
    if NORMED:
        found += (tl.load(weight_ptr + thread % 16),)
        for i in tl.static_range(SIZE // THREADS):
            found += (tl.load(weight_ptr + thread + i * THREADS),)
    return found


@triton.jit
def head_weight(thread, SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """What the first sixteen numbers are multiplied by to add up to all coefficients before norms, two lanes each.

    Butterflies add up to the first of their numbers times how many. So sixteen numbers tell, those of the last
    butterflies, which the frame's block follows.
    """
    weight = thread * 0.0
    for k in tl.static_range(16):
        weight = tl.where(thread % 16 == k, column_sums(OUTPUTS, WIDTH)[k] * (SIZE // 16), weight)
    return weight


@triton.jit
def places_of_threads(
    memory, thread, turns, SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    CODES: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """What ``analyse`` needs that is the same for every token: to be made before the wait for one, and a barrier.

    ``head_weight``, as bits; bytes from the token's begin to a lane's row of a matrix; bytes from the cube's begin to
    where a thread is in the first, second and third pass; ``hadamard_operand``; and from the tenth on bytes from a
    plane's begin to its first coefficients, as many as ``period``. Where first butterflies are no products, what they
    need is any number.

    Args:
        memory: 64 bytes of shared memory for each thread.
        turns: another number that is to be made here.
    """
    EACH: tl.constexpr = OUTPUTS * 16 // WIDTH
    PERIOD: tl.constexpr = period(EACH, CODES)
    SPREAD: tl.constexpr = spread(EACH, CODES)
    BYTES: tl.constexpr = 16 * thread.shape[0]
    lane, sixteen, at = thread % 32, sixteen_of(thread, SPREAD), memory + thread * 16
    weight = head_weight(thread, SIZE, OUTPUTS, WIDTH).to(tl.int32, bitcast=True)
    if in_halves(DTYPE, NORMED):
        found = kept(at, (weight, matrix_place(thread), sum_place(thread), second_place(thread, SPREAD)))
        operand = kept(at + BYTES, hadamard_operand(lane, DTYPE))
    else:
        second = cube_place(thread // 16 * 256 + thread % 16)
        found = kept(at, (weight, thread, cube_place(thread), second))
        operand = found
    others = kept(at + 2 * BYTES, (cube_place(sixteen * 16), thread * 0 + turns, sixteen, thread))
    first = ()
    for c in tl.static_range(4):
        first += (place_of(sixteen * EACH + min(c, PERIOD - 1), COUNT, CODES, TILES),)
    first = kept(at + 3 * BYTES, first)
    for c in tl.static_range(4, PERIOD):
        first += (place_of(others[2] * EACH + c, COUNT, CODES, TILES),)
    return found + (others[0],) + operand + first  # noqa: RUF005


@triton.jit
def _signed(value, word, BIT: tl.constexpr):
    """A number, its sign changed if that bit of a word is 1."""
    return (value.to(tl.int32, bitcast=True) ^ ((word << (31 - BIT)) & -0x80000000)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def signed_weights(
    memory, loaded, thread, SIZE: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """What ``load_signs`` found, NORMED: with weights that have signs, and ``shrink``, made here, before a barrier.

    Args:
        memory: 64 bytes of shared memory for each thread.
    """
    found = (loaded[0], loaded[1], loaded[2])
    for quad in tl.static_range(SIZE // THREADS // 4):
        words = ()
        for i in tl.static_range(4):
            weight = loaded[3 + 4 * quad + i].to(tl.float32) * shrink(DTYPE)
            words += (_signed(weight, loaded[0], 4 * quad + i).to(tl.int32, bitcast=True),)
        words = kept(memory + thread * 16 + quad % 4 * (16 * THREADS), words)
        for i in tl.static_range(4):
            found += (words[i].to(tl.float32, bitcast=True),)
    return found


@triton.jit
def copy_numbers(x_ptr, shared, thread, SIZE: tl.constexpr, THREADS: tl.constexpr, PADDED: tl.constexpr):
    """Bring SIZE numbers to shared memory, 16 bytes a thread: up to four loads before the first store.

    PADDED, each 128 bytes have 16 behind them: numbers 32 bytes apart are in different banks then.
    """
    PIECE: tl.constexpr = THREADS * 16
    TURNS: tl.constexpr = SIZE * x_ptr.dtype.element_ty.primitive_bitwidth // 8 // PIECE
    at = x_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + thread * 16
    for begin in tl.static_range(0, TURNS, 4):
        found = ()
        for turn in tl.static_range(begin, min(begin + 4, TURNS)):
            found += load_global_words(at, turn * PIECE, False)
        for turn in tl.static_range(begin, min(begin + 4, TURNS)):
            piece = thread + turn * THREADS
            place = piece * 16 + (piece // 8 * 16 if PADDED else 0)
            store_shared_words(shared + place, four(found, turn - begin), thread * 0 + 1)


@triton.jit
def _first_axis(token, cube, sums, loaded, places, thread, SIZE: tl.constexpr, THREADS: tl.constexpr,
                NORMED: tl.constexpr, DTYPE: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Butterflies along the first axis, in float32; of each thread's numbers the sum of squares and the largest.

    And, NORMED, the sum of squares of what was read.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    column = ()
    squares, largest, energy = thread * 0.0, thread * 0.0, thread * 0.0
    for i in tl.static_range(SIZE // THREADS):
        value = load_shared_number(token + thread * BYTES, DTYPE, i * THREADS * BYTES)
        if NORMED:
            energy += value * value
            value *= loaded[3 + i]  # ``signed_weights``
        else:
            value = _signed(value * shrink(DTYPE), loaded[0], i)
        if tl.float16 != DTYPE:
            largest = tl.maximum(largest, tl.abs(value))
        squares += value * value
        column += (value,)
    column = hadamard_registers(column, SIZE // THREADS)
    if not APART:
        tl.debug_barrier()  # the cube takes the place of what was read
    for i in tl.static_range(SIZE // THREADS):
        store_shared(cube + (places[2] ^ cube_place(i * THREADS)), column[i])
    _store_sums(sums, squares, largest, energy, thread, THREADS, NORMED, DTYPE)


@triton.jit
def _store_sums(sums, squares, largest, energy, thread, THREADS: tl.constexpr, NORMED: tl.constexpr,
                DTYPE: tl.constexpr):  # fmt: skip
    """Write what ``unit_bits`` and ``_inverse_root`` read: a number each of every thread."""
    store_shared(sums + thread * 4, squares)
    if tl.float16 != DTYPE:
        store_shared(sums + thread * 4, largest, THREADS * 4)
    if NORMED:
        store_shared(sums + thread * 4, energy, THREADS * 8)


@triton.jit
def hadamard_operand(lane, DTYPE: tl.constexpr):
    """Sylvester's matrix of 16, times ``shrink``, as the first operand of ``mma.m16n8k16``: four words.

    The first three are the same, as they differ in the row or in the column alone; the last has the other signs.
    """
    ONE: tl.constexpr = 0x3580 if tl.bfloat16 == DTYPE else 0x3C00  # 2**-20 and 1
    row, quarter = lane // 4, lane % 4
    both = (row >> 1) & quarter
    sign = (both ^ (both >> 1)) & 1
    word = (ONE * 0x10001) | (sign << 15) | ((sign ^ (row & 1)) << 31)
    return word, word, word, word ^ -0x7FFF8000


@triton.jit
def sum_place(thread):
    """Bytes from the cube's begin to a thread's first sum of ``_half_butterflies``."""
    lane, warp = thread % 32, thread // 32
    return cube_place(lane // 4 * 16 + lane % 4 * 2 + warp % 2 * 8 + warp // 2 * 128)


@triton.jit
def matrix_place(thread):
    """Bytes from a token's begin to a lane's row of the first four matrices: halves, PADDED by ``copy_numbers``."""
    lane, warp = thread % 32, thread // 32
    matrix = lane // 8
    first = lane % 8 * 16 + warp % 2 * 8 + warp // 2 * 128 + matrix % 2 * 512 + matrix // 2 * 1024
    return (first + first // 64 * 8) * 2


@triton.jit
def _half_butterflies(token, word, places, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Butterflies of four bits of halves: four numbers for each 1024."""
    found = ()
    for pair in tl.static_range(SIZE // 2048):
        found += load_shared_transposed(token + places[1], pair * (2048 * 2 * 9 // 8))
    values = ()
    for tile in tl.static_range(SIZE // 1024):
        b0 = found[2 * tile] ^ ((word << (2 * tile)) & -0x7FFF8000)
        b1 = found[2 * tile + 1] ^ ((word << (2 * tile + 1)) & -0x7FFF8000)
        values += first_mma_halves(places[5], places[6], places[7], places[8], b0, b1, DTYPE)
    return values


@triton.jit
def _squares_largest(values, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of squares of numbers and, not of float16, the largest."""
    some, others = values[0] * values[0], values[1] * values[1]
    largest = tl.abs(values[0])
    for i in tl.static_range(2, COUNT, 2):
        some += values[i] * values[i]
        others += values[i + 1] * values[i + 1]
    if tl.float16 != DTYPE:
        for i in tl.static_range(1, COUNT):
            largest = tl.maximum(largest, tl.abs(values[i]))
    return some + others, largest


@triton.jit
def _first_pass(token, cube, sums, loaded, places, thread, SIZE: tl.constexpr, THREADS: tl.constexpr,
                DTYPE: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """The first pass of numbers of 16 bits, as the module's text has it, and what ``unit_bits`` reads."""
    tl.static_assert(THREADS == 256)
    COUNT: tl.constexpr = SIZE // THREADS
    values = hadamard_registers(_half_butterflies(token, loaded[0], places, SIZE, DTYPE), COUNT, 4)
    squares, largest = _squares_largest(values, COUNT, DTYPE)
    if not APART:
        tl.debug_barrier()  # the cube takes the place of what was read
    for half in tl.static_range(2):
        at = cube + (places[2] ^ cube_place(half * 512))
        for tile in tl.static_range(SIZE // 1024):
            store_shared_pair(at, values[4 * tile + 2 * half], values[4 * tile + 2 * half + 1], tile * 4096)
    # sums of SIZE / 64 numbers have so many times their squares; so the norm is at most eight times the largest sum
    _store_sums(sums, squares * (64.0 / SIZE), largest * (8.0 / SIZE), squares, thread, THREADS, False, DTYPE)


@triton.jit
def _second_axis(cube, places, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Butterflies along the second axis, in place."""
    for turn in tl.static_range(SIZE // THREADS // 16):
        begin = cube + turn * (THREADS * 64)
        column = ()
        for i in tl.static_range(16):
            column += (load_shared(begin + (places[3] ^ cube_place(16 * i))),)
        column = hadamard_registers(column, 16)
        for i in tl.static_range(16):
            store_shared(begin + (places[3] ^ cube_place(16 * i)), column[i])


@triton.constexpr_function
def _bit_of_warp(apart):
    """The bit of ``sixteen_of``'s lanes that is a number's seventh."""
    return {1: 3, 2: 2, 4: 1, 8: 0}[apart]


@triton.jit
def second_place(thread, SPREAD: tl.constexpr):
    """Bytes from the cube's begin to the first four numbers of a thread in ``_second_pass``."""
    BIT: tl.constexpr = _bit_of_warp(SPREAD)
    lane = thread % 32
    rest = lane // 4
    owner = rest % (1 << BIT) + rest // (1 << BIT) * (4 << BIT)  # the lane of bits 7 and 8 both 0
    return cube_place(sixteen_of(thread - lane + owner, SPREAD) * 16 + lane % 4 * 4)


@triton.jit
def _second_pass(cube, places, thread, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Butterflies of bits 7 and 8, in place: of four neighbours of each thread, all within what its warp reads next."""
    for turn in tl.static_range(SIZE // THREADS // 16):
        begin = cube + turn * (THREADS * 64)
        values = ()
        for i in tl.static_range(4):
            words = load_shared_words(begin + (places[3] ^ cube_place(i * 128)))
            for j in tl.static_range(4):
                values += (words[j].to(tl.float32, bitcast=True),)
        values = hadamard_registers(values, 16, 4)
        for i in tl.static_range(4):
            words = ()
            for j in tl.static_range(4):
                words += (values[4 * i + j].to(tl.int32, bitcast=True),)
            store_shared_words(begin + (places[3] ^ cube_place(i * 128)), words, thread * 0 + 1)
    warp_barrier(thread)


@triton.jit
def _third_axis(cube, place, THREADS: tl.constexpr, TURNS: tl.constexpr):
    """The sixteens of each thread along the third axis."""
    found = ()
    for turn in tl.static_range(TURNS):
        for i in tl.static_range(4):
            words = load_shared_words(cube + (place ^ (i * 16)), turn * (THREADS * 64), True)
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
def _first_sixteen(token, loaded, thread, NORMED: tl.constexpr, DTYPE: tl.constexpr):
    """The first sixteen numbers, signed, two lanes each."""
    number = load_shared_number(token + thread % 16 * (DTYPE.primitive_bitwidth // 8), DTYPE) * shrink(DTYPE)
    if NORMED:
        number *= loaded[2].to(tl.float32)
    return _signed(number, loaded[1], 0)


@triton.jit
def _of_threads(sums, thread, INDEX: tl.constexpr, THREADS: tl.constexpr):
    """Eight of the numbers that ``_store_sums`` wrote, a lane each; they make up all."""
    at = sums + thread % 32 * 16
    found = load_shared_words(at, INDEX * THREADS * 4, True)
    found += load_shared_words(at, INDEX * THREADS * 4 + 512, True)
    values = ()
    for i in tl.static_range(8):
        values += (found[i].to(tl.float32, bitcast=True),)
    return values


@triton.jit
def _added_up(v):
    """The sum of eight numbers."""
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))


@triton.jit
def _load_sums(sums, thread, THREADS: tl.constexpr, NORMED: tl.constexpr, DTYPE: tl.constexpr):
    """Of a lane's share of what all threads found: the squares, the largest number, and squares of what was read."""
    squares = _added_up(_of_threads(sums, thread, 0, THREADS))
    largest, energy = squares * 0.0, squares * 0.0
    if tl.float16 != DTYPE:
        v = _of_threads(sums, thread, 1, THREADS)
        for i in tl.static_range(8):
            largest = tl.maximum(largest, v[i])
    if NORMED:
        energy = _added_up(_of_threads(sums, thread, 2, THREADS))
    return squares, largest, energy


@triton.jit
def _two_sums(value, other, lane):
    """Sums over a warp of one number of each lane, and of another that lanes 16 apart share: six shuffles, not nine."""
    value += from_lane(value, lane ^ 16)
    half = lane < 16
    mixed = tl.where(half, value, other)
    for i in tl.static_range(4):
        mixed += from_lane(mixed, lane ^ (1 << i))
    opposite = from_lane(mixed, lane ^ 16)
    return tl.where(half, mixed, opposite), tl.where(half, opposite, mixed)


@triton.jit
def unit_bits(squares, largest, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """A power of two that bounds the norm, as bits, of its square and a warp's largest; and if all numbers are some.

    Not so small that its inverse times other factors is none.
    """
    if tl.float16 == DTYPE:
        # the root's exponent is half of the exponent; squares of halves are in range, but infinite where a number is
        half = (squares.to(tl.int32, bitcast=True) + 0x3F800000) >> 1
        bits, finite = (half & 0x7F800000) + (1 << 23), squares < float("inf")
    else:
        largest = lane_largest(largest)
        bits, finite = bound(squares, largest, SIZE), (largest < float("inf")) & (squares == squares)
    return tl.maximum(bits, 17 << 23), finite


@triton.jit
def _thirds(a, b, c):
    """The Fourier transform of three complex numbers, pairs, with exp(+2πi/3)."""
    return _of_sums(a, (b[0] + c[0], b[1] + c[1]), (b[0] - c[0], b[1] - c[1]))


@triton.jit
def _of_sums(a, sums, differences):
    """The same with sums and differences of the second and third."""
    turned = (differences[0] * 0.8660254037844386, differences[1] * 0.8660254037844386)
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
    three = _of_sums((x[4], x[5]), (x[10], x[11]), (x[10], x[11]))
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


@triton.constexpr_function
def is_ninths(each, width):
    """Whether the frame's block is that of ``ninths``."""
    return each == 18 and width == 16


@triton.jit
def coefficient(column, INDEX: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, MATRIX: tl.constexpr):
    """The INDEX-th coefficient of sixteen coordinates; without a frame, or with ``is_ninths``, it is there already."""
    if WIDTH == 1 or is_ninths(EACH, WIDTH):
        return column[INDEX]
    else:
        y = column[0] * 0.0
        for k in tl.static_range(16):
            y += column[k] * MATRIX[INDEX][k]
        return y


@triton.jit
def _store_column(column, scale, places, shared, WIDTH: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr,
                  CODES: tl.constexpr, TILES: tl.constexpr, MATRIX: tl.constexpr):  # fmt: skip
    """Coefficients of sixteen coordinates, whose first ``places_of_threads`` knows, to planes.

    Without a frame, or with ``is_ninths``, of coordinates that went through the last butterflies.
    """
    PERIOD: tl.constexpr = period(EACH, CODES)
    if is_ninths(EACH, WIDTH):
        column = ninths(column)
        scale *= 1.0 / 3.0
    scales = (scale, scale * pair_factor(CODES))
    for c in tl.static_range(EACH):
        y = coefficient(column, c, WIDTH, EACH, MATRIX) * scales[c % 2]
        # of a float32 in [2**23, 2**24), which is an integer: 0x8080 carries to the two upper digits, and is taken off
        digits = (y + (12582912.0 + 0x8080)).to(tl.int32, bitcast=True) ^ 0x8080
        store_shared_planes(
            shared + places[9 + c % PERIOD], digits, plane_bytes(COUNT, CODES, TILES), c // PERIOD, 64
        )


@triton.constexpr_function
def period(each, codes):
    """After so many coefficients the next one's place is one byte further."""
    if codes:
        return codes
    return 1 if 64 % each == 0 else each


@triton.jit
def two_passes(
    loaded, places, token, cube, sums, thread, DTYPE: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr,
    NORMED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The first two passes of a token that is in shared memory; the arguments are those of ``analyse``.

    Returns:
        Each thread's sixteens of numbers that the third pass is to go through, and what ``_load_sums`` finds. If not
        APART, other threads may still read theirs.
    """
    if in_halves(DTYPE, NORMED):
        _first_pass(token, cube, sums, loaded, places, thread, SIZE, THREADS, DTYPE, APART)
        tl.debug_barrier()
        _second_pass(cube, places, thread, SIZE, THREADS)
    else:
        _first_axis(token, cube, sums, loaded, places, thread, SIZE, THREADS, NORMED, DTYPE, APART)
        tl.debug_barrier()
        _second_axis(cube, places, SIZE, THREADS)
        tl.debug_barrier()
    columns = _third_axis(cube, places[4], THREADS, SIZE // THREADS // 16)
    # behind loads, which would wait for these shuffles
    squares, largest, energy = _load_sums(sums, thread, THREADS, NORMED, DTYPE)
    return columns, squares, largest, energy


@triton.jit
def last_pass(columns, TURN: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """The TURN-th sixteen numbers through the third pass; other blocks have its butterflies in their matrix."""
    column = ()
    for k in tl.static_range(16):
        column += (columns[16 * TURN + k],)
    if WIDTH == 1 or is_ninths(EACH, WIDTH):
        column = hadamard_registers(column, 16)
    return column


@triton.jit
def analyse(
    loaded, places, token, cube, shared, sums, thread, norm, epsilon, DTYPE: tl.constexpr,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    CODES: tl.constexpr, TILES: tl.constexpr, THREADS: tl.constexpr, NORMED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Write the coefficients of a token of SIZE numbers to planes; NORMED, of their root-mean-square norm.

    Args:
        loaded: by ``load_signs`` and, NORMED, ``signed_weights``; and ``places_of_threads``.
        epsilon: what the norm adds to the mean of squares.
        token: shared memory that ``copy_numbers`` brings the token to, PADDED if ``in_halves``; planes may lie there.
        cube: 4 SIZE bytes of shared memory, APART from all else; or beginning at ``token`` and with the planes in it,
            for two barriers more.
        shared: the planes; if ``in_halves``, and the cube is APART, ``zero_tails`` was called.
        sums: twelve bytes of shared memory for each thread, not in the cube.
        norm: of the transform without the frame.
        OUTPUTS, WIDTH: of the frame's block; 1, 1 without a frame.

    Returns:
        For each thread the power of two that coefficients are divided by, and their sum in units of it.
    """
    TURNS: tl.constexpr = SIZE // THREADS // 16
    EACH: tl.constexpr = OUTPUTS * 16 // WIDTH
    matrix: tl.constexpr = last_matrix(OUTPUTS, WIDTH) if WIDTH > 1 else ()
    tl.debug_barrier()
    number = _first_sixteen(token, loaded, thread, NORMED, DTYPE)
    columns, squares, largest, energy = two_passes(
        loaded, places, token, cube, sums, thread, DTYPE, SIZE, THREADS, NORMED, APART
    )
    if not APART:
        tl.debug_barrier()
    if not (APART and in_halves(DTYPE, NORMED)):
        zero_tails(shared, thread, SIZE // 16 * EACH, COUNT, CODES, TILES)
    squares, total = _two_sums(squares, number * places[0].to(tl.float32, bitcast=True), thread % 32)
    bits, finite = unit_bits(squares, largest, SIZE, DTYPE)
    down = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    for turn in tl.static_range(TURNS):
        column = last_pass(columns, turn, WIDTH, EACH)
        begin = shared + place_of(turn * THREADS * EACH, COUNT, CODES, TILES)
        _store_column(column, norm * LARGEST * down, places, begin, WIDTH, EACH, COUNT, CODES, TILES, matrix)
    power = tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))
    if NORMED:  # by the root of the mean square
        power *= tl.rsqrt(lane_sum(energy) * (1.0 / SIZE) + epsilon)
    return power / shrink(DTYPE), total * down * norm
