"""The linear of one token where codes go from memory to the tensor cores through registers alone.

``product_bytes_triton`` brings codes to shared memory and back, for each step of a tile a barrier. Here a lane loads
16 bytes of four rows, which are its own operands of ``mma.m16n8k32`` once they are shifted and masked; a warp has
WARPS_K neighbours that take other bytes of the same 32 rows, and they meet once for each 32 rows, in shared memory.
Programs stay: as many as multiprocessors hold, they go on to their next rows while codes of them are on their way.
Coefficients lie in shared memory: loads come back in their order, so behind codes even the nearest cache is far.

A *chunk* is 64 bytes of each of 32 rows. Scalar codes: coefficients as in ``product_bytes_triton``, but those of the
second of each two codes of a byte over ``2**BITS``, as these codes are not shifted down. A trellis of two bits: a
state's value is the sum of the four bytes of a number (``codes/trellis_codebook.py``), so those bytes are the operand,
each met by the same coefficient, and the tensor cores add them up; of two weights a state two bytes meet the one
coefficient and two the other. All sums are integers, exact.

Then a lane has a row: it adds up the warps' parts, rotates blocks of rows by shuffles and writes outputs, or, without
blocks, coefficients in units of the token. Only ``lane_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_analysis_triton import (
    analyse,
    copy_numbers,
    copy_planes,
    in_halves,
    load_signs,
    places_of_threads,
    plane_bytes,
    signed_weights,
    zero_tails,
)
from framequant.kernels.lanes_triton import (
    byte_repeated,
    bytes_doubled,
    four,
    from_lane,
    half_word,
    lane_hadamard,
    lane_sum,
    load_shared,
    load_shared_words,
    load_words,
    mma_bytes,
    prefetch_line,
    shared_memory,
    store_shared,
)
from framequant.kernels.launches import LANE_SHARED
from framequant.kernels.trellis_triton import offset, window
from framequant.kernels.triton_support import let_next_start, wait_for_previous

_ROW_STRIDE = tl.constexpr(160)  # bytes from one quarter's rows to the next's in shared memory: other banks


@triton.constexpr_function
def part_bytes(warps):
    """Bytes of shared memory for the warps' parts of 32 rows."""
    return warps * 4 * 160


@triton.constexpr_function
def regions(warps, count, codes, analysed):
    """Where regions of shared memory begin, in bytes: parts of two turns, three planes, the cube; and the end of all.

    Before these lies what threads tell each other in an analysis of ``analysed`` numbers. The cube is behind the planes
    where it fits, or begins where the parts do.
    """
    parts = 12 * 32 * warps if analysed else 0
    planes = parts + 2 * part_bytes(warps)
    end = planes + 3 * plane_bytes(count, codes, 80 if analysed else 64)
    cube = end if end + 4 * analysed <= LANE_SHARED else parts
    return parts, planes, cube, max(end, cube + 4 * analysed)


@triton.constexpr_function
def shared_bytes(warps, count, codes, analysed):
    """Bytes of shared memory."""
    return regions(warps, count, codes, analysed)[3]


@triton.jit
def chunk_words(row_at, byte, stride, there):
    """Codes of a chunk: four words of each of four rows; behind the end of a row, where coefficients are 0, any."""
    inside = ((byte < stride) & there).to(tl.int32)
    found = ()
    for i in tl.static_range(4):
        found += load_words(row_at[i] + byte, inside)
    return found


@triton.jit
def first_words(row_at, byte, stride):
    """The same without a predicate, which would make the compiler branch, and wait for all but the first."""
    found = ()
    for i in tl.static_range(4):
        found += load_words(row_at[i] + tl.minimum(byte, stride - 16), 1)
    return found


@triton.jit
def row_addresses(codes_ptr, block, place, rows, stride, TRELLIS: tl.constexpr):
    """Addresses of a lane's four rows of codes; of a trellis the words that hold four rows of two tiles."""
    found = ()
    for i in tl.static_range(4):
        if TRELLIS:  # a tile's first row has its last word
            row = tl.minimum(block * 2 + i // 2, (rows + 15) // 16 - 1) * 16 + 15 - (i % 2) * 8 - place
        else:
            row = tl.minimum(block * 32 + i * 8 + place, rows - 1)
        found += (codes_ptr + row.to(tl.int64) * stride,)
    return found


@triton.jit
def _prefetch_turns(codes_ptr, thread, rows, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
                    TRELLIS: tl.constexpr):  # fmt: skip
    """Ask for codes of the next AHEAD turns for the L2 cache: memory need not wait for coefficients.

    A turn's codes, HEIGHT rows of WIDTH bytes or fewer, lie side by side.
    """
    if TRELLIS:
        rows = (rows + 15) // 16 * 16
    for turn in tl.static_range(1, AHEAD + 1):
        row = (tl.program_id(0) + turn * tl.num_programs(0)) * HEIGHT
        end = tl.minimum(HEIGHT, rows - row) * stride
        row_at = codes_ptr + row.to(tl.int64) * stride
        for i in tl.static_range((HEIGHT * WIDTH // 128 + thread.shape[0] - 1) // thread.shape[0]):
            byte = (thread + i * thread.shape[0]) * 128
            prefetch_line(row_at + byte, (byte < end).to(tl.int32))


@triton.jit
def row_ends(scale_ptr, places_ptr, signs_ptr, row, rows, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr):
    """A row's scale, its output's place and sign. Asked for a turn ahead: loads come back in their order."""
    used = row < rows
    if ROW_SCALES:
        scale = tl.load(scale_ptr + row, mask=used, other=0.0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr + row * 0).to(tl.float32)
    target, sign = row, scale
    if BLOCK > 0:
        target = tl.load(places_ptr + row, mask=used, other=0)
        sign = tl.load(signs_ptr + row, mask=used, other=0).to(tl.float32)
    return scale, target, sign


@triton.constexpr_function
def _byte_mask(bits, place):
    """An int32 with so many bits from a place on in each of its bytes."""
    mask = (((1 << bits) - 1) << place) * 0x01010101
    return mask - (mask >> 31 << 32)


@triton.jit
def _scalar_chunk(even, odd, words, z_at, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Add the products of a chunk of scalar codes to those of two times 16 rows.

    Two codes of a byte share a shift: the second is ``2**BITS`` times as large, its coefficients as much smaller.
    """
    for i in tl.static_range(8 // BITS):
        b = load_shared_words(z_at + i * COUNT)
        for r in tl.static_range(2):
            a = ()
            for j in tl.static_range(8):
                a += ((words[8 * r + j] >> (BITS * (i // 2 * 2))) & _byte_mask(BITS, BITS * (i % 2)),)
            even = replaced(even, mma_bytes(four(even, r), a[0], a[4], a[1], a[5], b[0], b[1], True), 4 * r)
            odd = replaced(odd, mma_bytes(four(odd, r), a[2], a[6], a[3], a[7], b[2], b[3], True), 4 * r)
    return even, odd


@triton.jit
def _added(some, others):
    """Sums of the elements of two tuples, as float32."""
    found = ()
    for i in tl.static_range(len(some)):
        found += ((some[i] + others[i]).to(tl.float32),)
    return found


@triton.jit
def replaced(values, new, START: tl.constexpr):
    """A tuple with some of its elements replaced by new ones."""
    found = ()
    for i in tl.static_range(len(values)):
        if i >= START and i < START + len(new):
            found += (new[i - START],)
        else:
            found += (values[i],)
    return found


@triton.constexpr_function
def step_pairs(bits):
    """The sixteen steps of a row of a tile in pairs, those that share a window first: (later step, earlier one)."""
    apart = (32 - bits) // 2
    shared = [(step + apart, step) for step in range(16 - apart)] if apart < 16 else []
    taken = {step for pair in shared for step in pair}
    rest = [step for step in range(16) if step not in taken]
    return [number for pair in shared + list(zip(rest[::2], rest[1::2], strict=True)) for number in pair]


@triton.jit
def _state_bytes(low, high, one, STEP: tl.constexpr, FROM: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr,
                 ADDEND: tl.constexpr):  # fmt: skip
    """The four bytes whose sum is the level of a step's state, out of 32 bits from that of step FROM on.

    A state at neither end is cut out by two shifts. The first is a multiplication, by ``one``, which the compiler does
    not know to be 1: these have a pipe of their own, while masks and shifts share the one that all else waits for.
    """
    place: tl.constexpr = offset(2, 16, FROM)
    above: tl.constexpr = 32 - BITS - (offset(2, 16, STEP) - place)
    state = window((low, high), place, 32)
    if above == 32 - BITS:
        state = state & ((1 << BITS) - 1)
    else:
        if above > 0:
            state *= one << above
        state = (state.to(tl.uint32, bitcast=True) >> (32 - BITS)).to(tl.int32, bitcast=True)
    h = state.to(tl.uint32, bitcast=True) * MULTIPLIER + ADDEND
    return h.to(tl.int32, bitcast=True)


@triton.constexpr_function
def window_step(late, early, step, bits):
    """The step whose state begins the 32 bits that a step of a pair is cut out of.

    Of two that are so far apart the later one's; of any other the own word, which the last step's begins, or its own.
    """
    if late - early == (32 - bits) // 2:
        return late
    return 15 if offset(2, 16, step) + bits <= 32 else step


@triton.jit
def _two_steps(acc, low, lower, high, higher, b0, b1, one, LATE: tl.constexpr, EARLY: tl.constexpr, BITS: tl.constexpr,
               MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr):  # fmt: skip
    """Add the products of two steps of sixteen rows of four tiles; steps so far apart share a window."""
    FIRST: tl.constexpr = window_step(LATE, EARLY, LATE, BITS)
    OTHER: tl.constexpr = window_step(LATE, EARLY, EARLY, BITS)
    a0 = _state_bytes(low, high, one, LATE, FIRST, BITS, MULTIPLIER, ADDEND)
    a1 = _state_bytes(lower, higher, one, LATE, FIRST, BITS, MULTIPLIER, ADDEND)
    a2 = _state_bytes(low, high, one, EARLY, OTHER, BITS, MULTIPLIER, ADDEND)
    a3 = _state_bytes(lower, higher, one, EARLY, OTHER, BITS, MULTIPLIER, ADDEND)
    return mma_bytes(acc, a0, a1, a2, a3, b0, b1, True)


@triton.jit
def _older(low, lower, lane):
    """The bits before those of rows of two tiles: the row above has them, around the tile."""
    above, middle = from_lane(low, (lane + 28) % 32), from_lane(lower, (lane + 28) % 32)
    return tl.where(lane < 4, middle, above), tl.where(lane < 4, above, middle)


@triton.jit
def _pair_states(low, high):
    """The eight states of sixteen bits of rows of a tile, four new bits each, the first step's first.

    Every one but the two that reach into the row before is two bytes of the row or of the row moved by four bits.
    """
    moved = window((low, high), 4, 32)
    return (
        half_word(window((low, high), 28, 16), 0), half_word(window((low, high), 24, 16), 0), half_word(moved, 2),
        half_word(low, 2), half_word(moved, 1), half_word(low, 1), half_word(moved, 0), half_word(low, 0),
    )  # fmt: skip


@triton.jit
def _numbers(states, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr):
    """The four bytes of each state of a tuple: two whose sum is the level of its first weight, two of its second."""
    found = ()
    for i in tl.static_range(len(states)):
        h = states[i].to(tl.uint32, bitcast=True) * MULTIPLIER + ADDEND
        found += (h.to(tl.int32, bitcast=True),)
    return found


@triton.jit
def _pair_chunk(even, odd, words, z_at, lane, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr):
    """Add the products of a chunk of trellis codes, two weights a state of 16 bits, to those of two times 16 rows."""
    for q in tl.static_range(4):
        z = load_shared_words(z_at + 16 * q)
        a = ()
        for r in tl.static_range(2):
            low, lower = words[8 * r + q], words[8 * r + 4 + q]
            high, higher = _older(low, lower, lane)
            a += _numbers(_pair_states(low, high), MULTIPLIER, ADDEND)
            a += _numbers(_pair_states(lower, higher), MULTIPLIER, ADDEND)
        for s in tl.static_range(4):
            b0, b1 = bytes_doubled(z[s], False), bytes_doubled(z[s], True)
            for r in tl.static_range(2):
                acc = four(even if s % 2 == 0 else odd, r)
                acc = mma_bytes(
                    acc, a[16 * r + 2 * s], a[16 * r + 8 + 2 * s], a[16 * r + 2 * s + 1], a[16 * r + 9 + 2 * s],
                    b0, b1, True,
                )  # fmt: skip
                if s % 2 == 0:
                    even = replaced(even, acc, 4 * r)
                else:
                    odd = replaced(odd, acc, 4 * r)
    return even, odd


@triton.jit
def _trellis_chunk(even, odd, words, z_at, lane, BITS: tl.constexpr, MULTIPLIER: tl.constexpr,
                   ADDEND: tl.constexpr):  # fmt: skip
    """Add the products of a chunk of trellis codes to those of two times 16 rows."""
    pairs: tl.constexpr = step_pairs(BITS)
    one = tl.num_programs(1)  # as the compiler does not know
    for q in tl.static_range(4):
        z = load_shared_words(z_at + 16 * q)
        rows = ()
        for r in tl.static_range(2):
            low, lower = words[8 * r + q], words[8 * r + 4 + q]
            rows += (low, lower) + _older(low, lower, lane)  # noqa: RUF005
        for s in tl.static_range(8):
            b0 = byte_repeated(z[pairs[2 * s] // 4], pairs[2 * s] % 4)
            b1 = byte_repeated(z[pairs[2 * s + 1] // 4], pairs[2 * s + 1] % 4)
            for r in tl.static_range(2):
                acc = four(even if s % 2 == 0 else odd, r)
                acc = _two_steps(acc, rows[4 * r], rows[4 * r + 1], rows[4 * r + 2], rows[4 * r + 3], b0, b1, one,
                                 pairs[2 * s], pairs[2 * s + 1], BITS, MULTIPLIER, ADDEND)  # fmt: skip
                if s % 2 == 0:
                    even = replaced(even, acc, 4 * r)
                else:
                    odd = replaced(odd, acc, 4 * r)
    return even, odd


@triton.jit
def lane_product(
    codes_ptr, x_ptr, z_ptr, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, x_signs_ptr,
    weight_ptr, added_ptr, memory_ptr, rows, stride, factor, zero, norm, x_norm, epsilon,
    ANALYSED: tl.constexpr, NORMED: tl.constexpr, ADDED: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    TRELLIS: tl.constexpr, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
    CHUNKS: tl.constexpr, ROUNDS: tl.constexpr, WARPS: tl.constexpr, WARPS_K: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one token, or products in units of the token; see the module's text.

    A program makes every so many-th ``32 WARPS / WARPS_K`` rows as there are programs, a *turn* each; a warp takes
    CHUNKS chunks of its rows in each of ROUNDS.

    Args:
        codes_ptr: bytes (rows, stride), of a trellis words in as many rows (``words.to_words``).
        x_ptr: (ANALYSED,) float16, bfloat16 or float32, on 16 bytes; ``x_signs_ptr``,
            ``transform_plan.lane_sign_words``, and ``x_norm`` then are those of a ``TransformPlan``, OUTPUTS and WIDTH
            the sizes of its frame's block. NORMED, the token is the root-mean-square norm of these numbers, with
            ``weight_ptr`` (ANALYSED,) and ``epsilon``.
        z_ptr: if ANALYSED is 0, int8 planes of coefficients (1, 4, 8 / BITS, COUNT), of a trellis (1, 4, 1, COUNT):
            zeros behind the last coefficient, at least 16 bytes, of a trellis 64. In units of LAST_BIT, for the second
            code of each two of a byte of ``2**BITS`` times that.
        sum_ptr: float32 (PARTS,): sums of z, in units of the token.
        unit_ptr: (1,), of the token; if ANALYSED, written, not read.
        scale_ptr: scales, (rows,) or one.
        y_ptr: outputs (rows,); without BLOCK float32, in units of the token.
        added_ptr: (rows,), ADDED to outputs; only with BLOCK.
        memory_ptr: float32, in place of shared memory; for the interpreter.
        factor: value of a level times the last bit of a coefficient, in units of the token.
        zero: the level 0, in units of the product of a code with the last bit.
        norm: of the rotation of a block.
        TRELLIS: weights of a state; 0 for scalar codes.
        AHEAD: turns whose codes are asked for before the first begins.
    """
    let_next_start(PDL)
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    place, quarter = lane // 4, lane % 4
    part, group = warp % WARPS_K, warp // WARPS_K
    GROUPS: tl.constexpr = WARPS // WARPS_K
    STEP: tl.constexpr = 64 * WARPS_K
    HALF: tl.constexpr = part_bytes(WARPS)
    CODES: tl.constexpr = 0 if TRELLIS else 8 // BITS
    TILES: tl.constexpr = 80 if ANALYSED else 64
    PLANE: tl.constexpr = plane_bytes(COUNT, CODES, TILES)
    begins: tl.constexpr = regions(WARPS, COUNT, CODES, ANALYSED)
    base = shared_memory(begins[3], memory_ptr)
    parts = base + begins[0]
    shared = base + begins[1]
    first = tl.program_id(0) * GROUPS + group
    turns = tl.cdiv(tl.cdiv(rows, 32 * GROUPS) - tl.program_id(0), tl.num_programs(0))
    byte = part * 64 + quarter * 16
    row_at = row_addresses(codes_ptr, first, place, rows, stride, TRELLIS)
    z_first = shared + tl.minimum(place, 2) * PLANE  # of eight columns three are planes
    if ANALYSED:
        DTYPE: tl.constexpr = x_ptr.dtype.element_ty
        loaded = load_signs(x_signs_ptr, weight_ptr, thread, ANALYSED, 32 * WARPS, NORMED, DTYPE)
    words = ()
    for c in tl.static_range(CHUNKS):
        words += first_words(row_at, byte + c * STEP, stride)
    _prefetch_turns(codes_ptr, thread, rows, stride, 32 * GROUPS, CHUNKS * ROUNDS * STEP, AHEAD, TRELLIS)
    if ANALYSED:
        places = places_of_threads(
            base, thread, turns, ANALYSED, OUTPUTS, WIDTH, COUNT, CODES, TILES, DTYPE, NORMED
        )
        if NORMED:
            loaded = signed_weights(base, loaded, thread, ANALYSED, 32 * WARPS, DTYPE)
    ends = row_ends(scale_ptr, places_ptr, signs_ptr, first * 32 + lane, rows, ROW_SCALES, BLOCK)
    tl.debug_barrier()  # or the compiler moves these loads behind the wait
    if ANALYSED and begins[2] > begins[1] and in_halves(x_ptr.dtype.element_ty, NORMED):
        tl.static_assert(ANALYSED * 9 // 4 <= 2 * HALF)  # or the token will lie on the planes
        zero_tails(shared, thread, ANALYSED * OUTPUTS // WIDTH, COUNT, CODES, TILES)
    wait_for_previous(PDL)
    if ANALYSED:
        copy_numbers(x_ptr, parts, thread, ANALYSED, 32 * WARPS, in_halves(DTYPE, NORMED))
        unit, total = analyse(
            loaded, places, parts, base + begins[2], shared, base, thread, x_norm, epsilon, DTYPE, ANALYSED, OUTPUTS,
            WIDTH, COUNT, CODES, TILES, 32 * WARPS, NORMED, begins[2] > begins[1],
        )  # fmt: skip
        tl.store(unit_ptr + thread * 0, unit, mask=(thread == 0) & (tl.program_id(0) == 0))
        total = total * zero
    else:
        copy_planes(z_ptr, shared, thread, COUNT, CODES, TILES, 32 * WARPS)
        total = thread * 0.0
        for k in tl.static_range((PARTS + 31) // 32):
            index = lane + 32 * k
            total += tl.load(sum_ptr + index, mask=index < PARTS, other=0.0)
        total = lane_sum(total) * zero
        unit = tl.load(unit_ptr)
    none = thread * 0
    start = (none, none, none, none, none, none, none, none)
    even, odd = start, start
    tl.debug_barrier()
    for n in tl.range(0, turns * ROUNDS):
        turn, round_ = n // ROUNDS, n % ROUNDS
        row = (first + turn * (tl.num_programs(0) * GROUPS)) * 32 + lane
        later = (n + 1) // ROUNDS
        block_next = first + later * (tl.num_programs(0) * GROUPS)
        next_at = row_addresses(codes_ptr, block_next, place, rows, stride, TRELLIS)
        ends_next = row_ends(
            scale_ptr, places_ptr, signs_ptr, block_next * 32 + lane, rows, ROW_SCALES, BLOCK
        )
        if ADDED:  # before the next codes are asked for: loads come back in their order
            added = tl.load(added_ptr + ends[1], mask=(row < rows) & (part == 0), other=0.0).to(tl.float32)
        here = round_ * (CHUNKS * STEP) + byte
        more = (n + 1) % ROUNDS * (CHUNKS * STEP) + byte
        for c in tl.static_range(CHUNKS):
            chunk = ()
            for i in tl.static_range(16):
                chunk += (words[16 * c + i],)
            if TRELLIS:  # a word of codes meets sixteen coefficients
                z_at = z_first + tl.minimum((here + c * STEP) // 16, COUNT // 64 - 1) * TILES
                if TRELLIS == 2:
                    even, odd = _pair_chunk(even, odd, chunk, z_at, lane, MULTIPLIER, ADDEND)
                else:
                    even, odd = _trellis_chunk(even, odd, chunk, z_at, lane, BITS, MULTIPLIER, ADDEND)
            else:
                z_at = z_first + tl.minimum(here + c * STEP, COUNT - 16)
                even, odd = _scalar_chunk(even, odd, chunk, z_at, COUNT, BITS)
            words = replaced(words, chunk_words(next_at, more + c * STEP, stride, later < turns), 16 * c)
        if round_ == ROUNDS - 1:
            half = parts + (turn % 2) * HALF
            mine = half + (warp * 4 + quarter) * _ROW_STRIDE + place * 4
            for r in tl.static_range(2):
                sums = _added(four(even, r), four(odd, r))
                for h in tl.static_range(2):
                    value = tl.where(
                        quarter % 2 == 0, sums[2 * h] + 256.0 * sums[2 * h + 1], 65536.0 * sums[2 * h]
                    )
                    store_shared(mine + (16 * r + 8 * h) * 4, value)
            tl.debug_barrier()
            at = half + group * (WARPS_K * 4 * _ROW_STRIDE) + lane * 4
            value = thread * 0.0
            for k in tl.static_range(WARPS_K):
                value += load_shared(at + k * 4 * _ROW_STRIDE)
                value += load_shared(at + (k * 4 + 1) * _ROW_STRIDE)
            value = (value * factor - total) * ends[0]
            written = (row < rows) & (part == 0)
            if BLOCK > 0:
                value = lane_hadamard(value, BLOCK) * (unit * norm * ends[2])
                if BIAS:
                    value += tl.load(bias_ptr + ends[1], mask=written, other=0.0).to(tl.float32)
                if ADDED:
                    value += added
            tl.store(y_ptr + ends[1], value.to(y_ptr.dtype.element_ty), mask=written)
            even, odd = start, start
        ends = ends_next
