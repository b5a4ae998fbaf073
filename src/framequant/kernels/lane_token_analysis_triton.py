"""Coefficients of 5 to 16 tokens for the product through registers: a program for each token, in the passes of one.

``transform_triton`` makes the same by products of small matrices, between whose layouts numbers go through shared
memory; that takes longer than all passes of ``lane_analysis_triton``. What follows the third of them: coefficients, as
halves, go to shared memory in their order, two in a word, and come back as whole units of the order that
``lane_tokens_triton`` reads, of which adjacent lanes write adjacent eight bytes. Their sum is a product with ones on
the tensor cores, of the halves themselves: what a product takes for the level 0 must be the sum of what it multiplies.

Only ``lane_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_analysis_triton import (
    coefficient,
    copy_numbers,
    cube_place,
    hadamard_operand,
    in_halves,
    is_ninths,
    last_matrix,
    last_pass,
    load_signs,
    matrix_place,
    ninths,
    second_place,
    shrink,
    sixteen_of,
    sum_place,
    two_passes,
    unit_bits,
)
from framequant.kernels.lanes_triton import (
    first_mma_halves,
    from_lane,
    halves_of_two,
    kept,
    lane_sum,
    load_shared_words,
    load_shared_words_where,
    packed_pair,
    shared_memory,
    store_pair_where,
    store_shared,
    store_shared_pair,
    store_shared_words,
)
from framequant.kernels.launches import LANE_SHARED, MOST_SPARE
from framequant.kernels.transform_triton import first_factor, mantissa_place
from framequant.kernels.triton_support import let_next_start, wait_for_previous

_COUNTERS = tl.constexpr(MOST_SPARE)


@triton.constexpr_function
def raised(bits):
    """What coefficients are multiplied by, beside a bound of theirs: the largest halves are as large as they may be.

    Nor do they become so small that halves are less precise: from 2**22 (of two bits) below the bound on.
    """
    return 2.0**14 / first_factor(bits)


@triton.constexpr_function
def row_factor(run, bits):
    """What a row's coefficients are multiplied by, over those of a mantissa's last codes."""
    return first_factor(bits) >> mantissa_place(run, bits)


@triton.constexpr_function
def regions(size, item, each, threads):
    """Where the token and the cube begin in shared memory, in bytes, and the end of all; halves lie on the token.

    The cube lies there, too, where both are more than a kernel may have. Before is what threads tell each other.

    Args:
        size: numbers of a token, of ``item`` bytes each.
        each: coefficients of sixteen coordinates.
    """
    token = 12 * threads
    length = max(size * item * 9 // 8, size // 16 * each * 2)
    cube = token + -(-length // 128) * 128
    if cube + 4 * size > LANE_SHARED:
        cube = token
    return token, cube, max(cube + 4 * size, token + length)


@triton.jit
def _places(memory, thread, EACH: tl.constexpr, INTERLEAVE: tl.constexpr, DTYPE: tl.constexpr):
    """What does not depend on the token, made before the wait: for ``two_passes`` what ``places_of_threads`` has.

    From the tenth on: bytes to a thread's first coefficient and its first unit, and what ``halves_of_two`` takes for
    lower and upper halves. Of a unit of 32 bytes every other four lanes read the second half first, from other banks.

    Args:
        memory: 64 bytes of shared memory for each thread.
    """
    BYTES: tl.constexpr = 16 * thread.shape[0]
    at, sixteen = memory + thread * 16, sixteen_of(thread, 1)
    turned = thread // 4 % 2 if INTERLEAVE == 8 else thread * 0
    if in_halves(DTYPE, False):
        found = kept(at, (thread, matrix_place(thread), sum_place(thread), second_place(thread, 1)))
        operand = kept(at + BYTES, hadamard_operand(thread % 32, DTYPE))
    else:
        second = cube_place(thread // 16 * 256 + thread % 16)
        found = kept(at, (thread, thread, cube_place(thread), second))
        operand = found
    unit = thread * (4 * INTERLEAVE) ^ turned * 16
    others = kept(at + 2 * BYTES, (cube_place(sixteen * 16), sixteen * (2 * EACH), unit, thread))
    lower = tl.where(turned == 1, 0x1054, 0x5410)
    selectors = kept(at + 3 * BYTES, (lower, lower ^ 0x2222, thread, thread))
    return found + (others[0],) + operand + (others[1], others[2], selectors[0], selectors[1])  # noqa: RUF005


@triton.jit
def _packed(
    columns, scale, TURN: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, MATRIX: tl.constexpr
):
    """Coefficients of a thread's TURN-th sixteen coordinates, times ``scale``, rounded to halves, two a word."""
    column = last_pass(columns, TURN, WIDTH, EACH)
    if is_ninths(EACH, WIDTH):
        column = ninths(column)
        scale *= 1.0 / 3.0
    words = ()
    for c in tl.static_range(0, EACH, 2):
        low = coefficient(column, c, WIDTH, EACH, MATRIX) * scale
        high = coefficient(column, c + 1, WIDTH, EACH, MATRIX) * scale
        words += (packed_pair(low, high, tl.float16),)
    return words


@triton.jit
def _store_packed(at, words, TURN: tl.constexpr, EACH: tl.constexpr):
    """Write a thread's halves in as large pieces as lie evenly, so that lanes go to different banks."""
    FIRST: tl.constexpr = TURN * at.shape[0] * 2 * EACH
    for i in tl.static_range(0, EACH // 2, 4 if EACH % 8 == 0 else 2 if EACH % 4 == 0 else 1):
        first = words[i].to(tl.float32, bitcast=True)
        if EACH % 8 == 0:
            four = words[i], words[i + 1], words[i + 2], words[i + 3]
            store_shared_words(at + (FIRST + i * 4), four, words[i] * 0 + 1)
        elif EACH % 4 == 0:
            store_shared_pair(at, first, words[i + 1].to(tl.float32, bitcast=True), FIRST + i * 4)
        else:
            store_shared(at, first, FIRST + i * 4)


@triton.jit
def _sum_of_columns(words, thread, COUNT: tl.constexpr):
    """The sum of a warp's halves in two of eight parts: those of lanes 4 column + any, columns 2 (lane % 4) and + 1."""
    one = thread * 0 + 0x3C003C00
    total = thread * 0.0
    for i in tl.static_range(0, COUNT, 2):
        other = words[i + 1] if i + 1 < COUNT else thread * 0
        found = first_mma_halves(one, one, one, one, words[i], other)
        total += found[0] + found[1]
    return total


@triton.jit
def _total(parts, thread):
    """The sum of 32 numbers in shared memory."""
    at = parts + thread % 4 * 32
    words = load_shared_words(at) + load_shared_words(at, 16)
    total = thread * 0.0
    for i in tl.static_range(8):
        total += words[i].to(tl.float32, bitcast=True)
    for i in tl.static_range(2):
        total += from_lane(total, thread % 32 ^ (1 << i))
    return total


@triton.jit
def _write_units(z_at, halves, places, thread, LENGTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
                 INTERLEAVE: tl.constexpr):  # fmt: skip
    """Write a token's halves as ``transform_triton`` has them in PAIR_BITS, zeros behind the last coefficient.

    A unit is two words' coefficients: ``2 INTERLEAVE`` halves, of which each pair of rows has four, eight bytes.
    """
    PAIRS: tl.constexpr = INTERLEAVE // 2
    THREADS: tl.constexpr = thread.shape[0]
    for turn in tl.static_range((COUNT // 2 + THREADS - 1) // THREADS):
        unit = thread + turn * THREADS
        there = (unit < LENGTH // (2 * INTERLEAVE)).to(tl.int32)
        words = ()
        for i in tl.static_range(INTERLEAVE // 4):
            words += load_shared_words_where(
                halves + (places[10] ^ (i * 16)), there, turn * THREADS * 4 * INTERLEAVE
            )
        for p in tl.static_range(PAIRS):
            low = halves_of_two(words[p], words[p + PAIRS], places[11], row_factor(2 * p, BITS))
            high = halves_of_two(words[p], words[p + PAIRS], places[12], row_factor(2 * p + 1, BITS))
            at = z_at + (p * (4 * COUNT) + unit * 8)
            store_pair_where(at, low, high, (unit < COUNT // 2).to(tl.int32))


@triton.jit(do_not_specialize=["tokens"])
def token_analysis(
    x_ptr, x_signs_ptr, z_ptr, unit_ptr, sum_ptr, memory_ptr, tokens, x_stride, norm,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
    WARPS: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Coefficients of the program's token of SIZE numbers, what ``transform_triton`` writes with PAIR_BITS.

    Of PLACES programs one has a token; the others keep a multiprocessor from more than its share of tokens.

    Args:
        x_ptr: (tokens, SIZE) of any float dtype; rows on 16 bytes, ``x_stride`` numbers apart.
        x_signs_ptr: ``transform_plan.lane_sign_words``.
        z_ptr: halves (tokens, 16 / BITS, COUNT).
        unit_ptr: (tokens,): powers of two, ``raised`` times below bounds of the tokens' norms; what a token that is not
            finite is over is none.
        sum_ptr: float32 (tokens,): sums of a token's halves before they were multiplied by their rows' factors; and
            MOST_SPARE zeros behind them.
        memory_ptr: in place of shared memory; for the interpreter.
        norm: of the transform without the frame.
        OUTPUTS, WIDTH: sizes of the frame's block; 1, 1 without a frame.
        COUNT: words of a row of codes, a multiple of 4.
    """
    let_next_start(PDL)
    if tl.program_id(0) % PLACES > 0:
        wait_for_previous(PDL)
        return
    THREADS: tl.constexpr = 32 * WARPS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TURNS: tl.constexpr = SIZE // THREADS // 16
    EACH: tl.constexpr = OUTPUTS * 16 // WIDTH
    INTERLEAVE: tl.constexpr = 16 // BITS
    matrix: tl.constexpr = last_matrix(OUTPUTS, WIDTH) if WIDTH > 1 else ()
    begins: tl.constexpr = regions(SIZE, DTYPE.primitive_bitwidth // 8, EACH, THREADS)
    APART: tl.constexpr = begins[1] > begins[0]
    thread, number = tl.arange(0, THREADS), tl.program_id(0) // PLACES
    base = shared_memory(begins[2], memory_ptr)
    halves = base + begins[0]
    parts = base + 8 * THREADS  # where a norm would have its squares
    loaded = load_signs(x_signs_ptr, x_signs_ptr, thread, SIZE, THREADS, False, DTYPE)
    places = _places(base, thread, EACH, INTERLEAVE, DTYPE)
    tl.debug_barrier()  # or the compiler moves these loads behind the wait
    wait_for_previous(PDL)
    x_at = x_ptr + number.to(tl.int64) * x_stride
    copy_numbers(x_at, halves, thread, SIZE, THREADS, in_halves(DTYPE, False))
    tl.static_assert(_COUNTERS <= THREADS)
    tl.store(sum_ptr + tokens + thread, 0.0, mask=(thread < _COUNTERS) & (number == 0))
    tl.debug_barrier()
    columns, squares, largest, _ = two_passes(
        loaded, places, halves, base + begins[1], base, thread, DTYPE, SIZE, THREADS, False, APART
    )
    if not APART:
        tl.debug_barrier()  # halves take the place of the cube
    bits, finite = unit_bits(lane_sum(squares), largest, SIZE, DTYPE)
    scale = norm * raised(BITS) * (0x7F000000 - bits).to(tl.float32, bitcast=True)
    total = thread * 0.0
    for turn in tl.static_range(TURNS):
        words = _packed(columns, scale, turn, WIDTH, EACH, matrix)
        _store_packed(halves + places[9], words, turn, EACH)
        total += _sum_of_columns(words, thread, EACH // 2)
    store_shared(parts + (thread // 32 * 16 + thread % 4 * 4), total)
    tl.debug_barrier()
    z_at = z_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + number.to(tl.int64) * (INTERLEAVE * COUNT * 2)
    _write_units(z_at, halves, places, thread, SIZE // 16 * EACH, COUNT, BITS, INTERLEAVE)
    # a product of powers of two, the smaller first
    unit = (
        tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))
        * (1.0 / raised(BITS))
        / shrink(DTYPE)
    )
    tl.store(sum_ptr + number + thread * 0, _total(parts, thread), mask=thread == 0)
    tl.store(unit_ptr + number + thread * 0, unit, mask=thread == 0)
