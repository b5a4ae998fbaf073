"""The product of 5 to 16 tokens where codes go from memory to the tensor cores through registers alone.

As in ``lane_product_triton`` a lane loads 16 bytes of four rows, which are its own operands of ``mma.m16n8k16`` once
they are masked: a code among the bits of a half's mantissa is a subnormal number, the code times a power of two, which
tensor cores multiply exactly; coefficients are over these powers. SHARE warps have 32 rows of all tokens and go through
their columns, each a chunk behind the one before it; coefficients come to shared memory a *slice* at a time, two slices
ahead. Then each of them adds up what all have of its tokens, rotates blocks of rows, within and between lanes, and
writes outputs. Four warps a scheduler hide what each of them waits for.

Of sixteen warps three times five share rows, and one is *spare*: the spare warps of three programs have 32 rows
between them (``launches.token_launch``). Each writes its part to memory and counts itself; the last one adds up the
parts, always in the same order, and finishes the rows. Nobody waits for another program. Only ``lane_ops`` imports this
module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_product_triton import (
    chunk_words,
    first_words,
    replaced,
    row_addresses,
    row_ends,
)
from framequant.kernels.lanes_triton import (
    arrived_or_all,
    copy_some_to_shared,
    end_of_copies,
    end_of_warps,
    four,
    from_lane,
    last_to_arrive,
    load_shared_words,
    load_words,
    mma_halves,
    prefetch_line,
    shared_memory,
    some_barrier,
    store_shared_words,
    store_words_where,
    wait_for_copies,
)
from framequant.kernels.launches import LANE_SHARED
from framequant.kernels.transform_triton import mantissa_place, mantissa_runs
from framequant.kernels.triton_support import COMPILED, let_next_start, wait_for_previous

#: Chunks of codes that are on their way.
AHEAD = tl.constexpr(2)


@triton.constexpr_function
def slice_bytes(tiles, bits, share):
    """Bytes of shared memory for a slice of coefficients of ``8 tiles`` tokens, 64 bytes of a row for each warp."""
    return share * (16 // bits) * 8 * tiles * 64


@triton.constexpr_function
def slice_parts(tiles, bits, share):
    """In how many parts slices come: one, or two where three whole slices are more than shared memory has."""
    return 1 if share == 2 or 3 * slice_bytes(tiles, bits, share) <= LANE_SHARED else 2


@triton.constexpr_function
def ring(parts):
    """Parts of slices that shared memory holds: one that is multiplied, and those on their way."""
    return 3 if parts == 1 else 4


@triton.constexpr_function
def buffer_bytes(tiles, bits, warps, share):
    """Bytes of shared memory for a part of a slice, or of two warps for what they have of half their tokens."""
    size = slice_bytes(tiles, bits, share) // slice_parts(tiles, bits, share)
    return max(size, 32 * warps * 16 * tiles) if share == 2 else size


@triton.constexpr_function
def token_bytes(tiles, bits, warps, share=2):
    """Bytes of shared memory: of parts of slices, or of three warps for all they have of their tokens."""
    size = ring(slice_parts(tiles, bits, share)) * buffer_bytes(tiles, bits, warps, share)
    return size if share == 2 else max(size, 32 * warps * 32 * tiles)


@triton.jit
def _pieces(z_ptr, shared, worker, share, count, tokens, PARTS: tl.constexpr, PAIRS: tl.constexpr,
            TOKENS: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """What a thread brings of each part: sources in the first, destinations, and how many bytes a slice may begin on.

    A part is for each share, pair of runs and token 128 bytes, of every second token pieces swapped, so that eight
    lanes, of two tokens, read from all banks. Warps of a share bring what they need themselves: ``worker``, of THREADS.
    """
    SOME: tl.constexpr = PAIRS // PARTS
    sources, places, limits = (), (), ()
    for turn in tl.static_range((SOME * TOKENS * 8 + THREADS - 1) // THREADS):
        piece = worker + turn * THREADS  # of 16 bytes
        row, place = piece // 8, piece % 8
        pair, token = row // TOKENS, row % TOKENS
        byte = share * 128 + place * 16
        source = (token * PAIRS + pair).to(tl.int64) * (count * 4) + byte
        sources += (z_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + source,)
        places += (shared + (share * (SOME * TOKENS) + row) * 128 + (place ^ (token % 2)) * 16,)
        limits += (tl.where(token < tokens, count * 4 - byte, 0),)
    return sources, places, limits


@triton.jit
def _begin_part(pieces, at, number, wanted, worker, count, PART: tl.constexpr, PARTS: tl.constexpr,
                PAIRS: tl.constexpr, TOKENS: tl.constexpr, SHARE: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """Begin to bring a part of the number-th slice to a buffer ``at`` bytes on; zeros behind the last coefficients.

    Where it is not ``wanted`` nothing is brought, or written; it is a group all the same.
    """
    PIECES: tl.constexpr = PAIRS // PARTS * TOKENS * 8
    THREADS: tl.constexpr = WARPS // SHARE * 32
    begin = number * (SHARE * 128)
    for turn in tl.static_range((PIECES + THREADS - 1) // THREADS):
        source = pieces[0][turn] + (begin + PART * (PAIRS // PARTS) * (count * 4))
        some = worker * 0 + wanted.to(tl.int32)
        if (turn + 1) * THREADS > PIECES:
            some = tl.where(worker < PIECES - turn * THREADS, some, 0)
        elif WARPS % SHARE > 0:  # spare warps bring nothing
            some = tl.where(worker < THREADS, some, 0)
        copy_some_to_shared(pieces[1][turn] + at, source, (begin < pieces[2][turn]).to(tl.int32), some)
    end_of_copies(worker)


@triton.constexpr_function
def _shift(pair, bits):
    """How far words are shifted down for the pair-th two runs of coefficients."""
    return 2 * pair // mantissa_runs(bits) * mantissa_runs(bits) * bits


@triton.constexpr_function
def _chunk_text(tiles, bits, part, parts):
    """PTX of ``_chunk``, as one piece: what a warp without rows skips must be no conditional product.

    Operands: sums of 8 tiles registers, 16 words, two addresses, whether there are rows.
    """
    sums, first = 8 * tiles, ((1 << bits) - 1) * 0x00010001
    even, odd, there = f"${sums + 16}", f"${sums + 17}", f"${sums + 18}"
    text = [".reg .pred none;", f".reg .b32 a<8>, w<16>, b<{8 * tiles}>;", f"setp.eq.b32 none, {there}, 0;",
            "@none bra.uni end;"]  # fmt: skip
    text += [f"mov.b32 w{i}, ${sums + i};" for i in range(16)]
    some, done = 8 // bits // parts, 0
    for k in range(some):
        j = part * some + k
        for n in range(tiles):
            for first_b, at in ((0, even), (4, odd)):
                names = ", ".join(f"b{8 * n + first_b + i}" for i in range(4))
                text.append(f"ld.shared.v4.b32 {{{names}}}, [{at}+{(k * tiles + n) * 1024}];")
        low = mantissa_place(2 * j, bits)
        if _shift(j, bits) > done:
            text += [f"shr.u32 w{i}, w{i}, {_shift(j, bits) - done};" for i in range(16)]
            done = _shift(j, bits)
        for m in range(4):
            for i in range(4):
                text += [
                    f"and.b32 a{2 * i + e}, w{4 * i + m}, {first << (low + bits * e)};" for e in range(2)
                ]
            for n in range(tiles):
                for t in range(2):
                    acc = ", ".join(f"${4 * (t * tiles + n) + k}" for k in range(4))
                    a = ", ".join(f"a{4 * t + k}" for k in (0, 2, 1, 3))
                    b = f"b{8 * n + 2 * m}, b{8 * n + 2 * m + 1}"
                    text.append(
                        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                        f"{{{acc}}}, {{{a}}}, {{{b}}}, {{{acc}}};"
                    )
    return "{ " + " ".join(text) + " end: }"


@triton.constexpr_function
def _chunk_constraints(tiles):
    sums = 8 * tiles
    return ",".join(["=f"] * sums + ["r"] * 19 + [str(i) for i in range(sums)])


@triton.jit
def _operands(words, PAIR: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr):
    """Registers of A of four rows: the pairs of codes of their M-th words that meet a pair of runs of z."""
    first: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    low: tl.constexpr = mantissa_place(2 * PAIR, BITS)
    found = ()
    for i in tl.static_range(4):
        word = words[4 * i + M] >> (2 * PAIR * BITS - low)
        found += (word & (first << low), word & (first << (low + BITS)))
    return found


@triton.jit
def _chunk(acc, words, z_even, z_odd, there, TILES: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
           PARTS: tl.constexpr):  # fmt: skip
    """Add the products of a chunk to those of two times 16 rows and TILES times eight tokens, where there are rows.

    Or of what meets the PART-th of PARTS of a slice.
    """
    if COMPILED:
        text: tl.constexpr = _chunk_text(TILES, BITS, PART, PARTS)
        constraints: tl.constexpr = _chunk_constraints(TILES)
        # Triton knows no starred elements
        operands = words + (z_even, z_odd, there) + acc  # noqa: RUF005
        return tl.inline_asm_elementwise(
            text, constraints, operands, dtype=(tl.float32,) * (8 * TILES), is_pure=False, pack=1
        )
    SOME: tl.constexpr = 8 // BITS // PARTS
    for j in tl.static_range(SOME):
        b = ()
        for n in tl.static_range(TILES):
            b += load_shared_words(z_even, (j * TILES + n) * 1024)
            b += load_shared_words(z_odd, (j * TILES + n) * 1024)
        for m in tl.static_range(4):
            a = _operands(words, PART * SOME + j, m, BITS)
            for n in tl.static_range(TILES):
                for t in tl.static_range(2):
                    acc = replaced(acc, mma_halves(
                        four(acc, t * TILES + n), a[4 * t], a[4 * t + 2], a[4 * t + 1], a[4 * t + 3], b[8 * n + 2 * m],
                        b[8 * n + 2 * m + 1],
                    ), 4 * (t * TILES + n))  # fmt: skip
    return acc


@triton.jit
def _rotated(values, lane, BLOCK: tl.constexpr):
    """Sylvester's matrix of a block times rows: four of a lane, 8 apart, in eight lanes, 4 apart."""
    pairs = (values[0] + values[1], values[0] - values[1], values[2] + values[3], values[2] - values[3])
    if BLOCK == 32:
        pairs = (pairs[0] + pairs[2], pairs[1] + pairs[3], pairs[0] - pairs[2], pairs[1] - pairs[3])
    found = ()
    for i in tl.static_range(4):
        value = pairs[i]
        for step in tl.static_range(3):
            other = from_lane(value, lane ^ (4 << step))
            value = other + tl.where((lane >> (2 + step)) % 2 == 1, -value, value)
        found += (value,)
    return found


@triton.jit
def _token_values(sum_ptr, unit_ptr, token, tokens, PARTS: tl.constexpr):
    """A token's sum of coefficients and its unit."""
    there = token < tokens
    total = tl.load(sum_ptr + token * PARTS, mask=there, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sum_ptr + token * PARTS + part, mask=there, other=0.0)
    return total, tl.load(unit_ptr + token, mask=there, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def lane_tokens(
    codes_ptr, z_ptr, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, parts_ptr, memory_ptr,
    rows, stride, count, tokens, factor, zero, norm,
    TILES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, SLICES: tl.constexpr, SHARE: tl.constexpr, ONCE: tl.constexpr, WARPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of up to ``8 TILES`` tokens, or products in units of the tokens; see the module's text.

    Args:
        codes_ptr: bytes (rows, stride).
        z_ptr: halves (tokens, 8 / BITS, 2 count), as ``transform_triton`` writes them in PAIRS; ``count`` a multiple
            of 4.
        sum_ptr: float32 (tokens, PARTS): sums of a token's halves, over its unit. Behind them, of three warps that
            share, a zero for each 32 rows of spare warps; zeros again when all is done.
        unit_ptr: (tokens,).
        scale_ptr: scales, (rows,) or one.
        y_ptr: outputs (tokens, rows); without BLOCK float32, in units of the tokens.
        parts_ptr: float32, 256 TILES for each spare warp: room for what they have.
        memory_ptr: in place of shared memory; for the interpreter.
        factor: what makes codes of subnormal numbers, ``2**24`` over ``first_factor``.
        zero: the code that stands for 0, between two codes.
        norm: of the rotation of a block.
        SLICES: of ``64 SHARE`` bytes of a row.
        SHARE: 2, or 3, then ONCE.
        ONCE: whether one turn of all programs has all rows.
    """
    let_next_start(PDL)
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    place, quarter = lane // 4, lane % 4
    share, group = warp % SHARE, warp // SHARE
    if SHARE == 2:
        share = (warp + warp // 4) % 2  # both shares on each scheduler
    PAIRS: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = WARPS // SHARE
    CUT: tl.constexpr = slice_parts(TILES, BITS, SHARE)
    RING: tl.constexpr = ring(CUT)
    BYTES: tl.constexpr = buffer_bytes(TILES, BITS, WARPS, SHARE)
    shared = shared_memory(token_bytes(TILES, BITS, WARPS, SHARE), memory_ptr)
    first, blocks = group * tl.num_programs(0) + tl.program_id(0), tl.cdiv(rows, 32)
    turns = tl.cdiv(blocks - tl.program_id(0), GROUPS * tl.num_programs(0))
    if ONCE:
        turns = 1
    if SHARE == 3:
        spare = tl.where(
            tl.program_id(0) < tl.num_programs(0) // SHARE * SHARE, tl.program_id(0) // SHARE, blocks
        )
        first = tl.where(group == GROUPS, GROUPS * tl.num_programs(0) + spare, first)
        share = tl.where(group == GROUPS, tl.program_id(0) % SHARE, share)
    z_at = shared + share * (slice_bytes(TILES, BITS, SHARE) // CUT // SHARE)
    z_at += place * 128 + quarter * 32
    z_even, z_odd = z_at + place % 2 * 16, z_at + (1 - place % 2) * 16
    mine = share * 64 + quarter * 16
    begin = tl.program_id(0) % SLICES  # or all programs would ask for the same lines at once, which is slow
    words = ()
    for s in tl.static_range(AHEAD):
        block = first + s // SLICES * (GROUPS * tl.num_programs(0))
        block = tl.where(
            block < blocks, block, tl.program_id(0) % blocks
        )  # not all the same: that would be slow
        row_at = row_addresses(codes_ptr, block, place, rows, stride, False)
        words += first_words(row_at, mine + (s + begin) % SLICES * (64 * SHARE), stride)
    _prefetch_ends(scale_ptr, places_ptr, signs_ptr, first * 32 + lane, rows, ROW_SCALES, BLOCK)
    tl.debug_barrier()  # or the compiler moves these loads behind the wait
    worker = group * 32 + lane
    pieces = _pieces(z_ptr, shared, worker, share, count, tokens, CUT, PAIRS, 8 * TILES, 32 * GROUPS)
    wait_for_previous(PDL)
    for u in tl.static_range(RING - 1):
        _begin_part(pieces, u * BYTES, (u // CUT + begin) % SLICES, u // CUT < turns * SLICES, worker, count, u % CUT,
                    CUT, PAIRS, 8 * TILES, SHARE, WARPS)  # fmt: skip
    none = thread * 0.0
    start = ()
    for _ in tl.static_range(8 * TILES):
        start += (none,)
    acc = start
    if ONCE:
        row_at = row_addresses(codes_ptr, tl.minimum(first, blocks - 1), place, rows, stride, False)
        there = first < blocks
        for step in tl.range(0, SLICES, loop_unroll_factor=2):  # so that words stay where they are
            chunk, words = _first(words)
            acc = _step(acc, chunk, pieces, z_even, z_odd, there, step, begin, SLICES, share, worker, count, SLICES,
                        TILES, BITS, SHARE, True, WARPS)  # fmt: skip
            byte = mine + (step + AHEAD + begin) % SLICES * (64 * SHARE)
            words += chunk_words(row_at, byte, stride, there & (step + AHEAD < SLICES))
        if SHARE == 3:
            _finish_three(acc, shared, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, parts_ptr,
                          first, thread, rows, tokens, factor, zero, norm, TILES, PARTS, ROW_SCALES, BLOCK, BIAS,
                          GROUPS)  # fmt: skip
        else:
            _finish(acc, shared, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, first, thread,
                    rows, tokens, factor, zero, norm, TILES, PARTS, ROW_SCALES, BLOCK, BIAS)  # fmt: skip
    else:
        for step in tl.range(0, turns * SLICES):
            later = step + AHEAD
            block = first + later // SLICES * (GROUPS * tl.num_programs(0))
            later_at = row_addresses(codes_ptr, block, place, rows, stride, False)
            chunk, rest = _first(words)
            there = first + step // SLICES * (GROUPS * tl.num_programs(0)) < blocks
            acc = _step(acc, chunk, pieces, z_even, z_odd, there, step, begin, turns * SLICES, share, worker, count,
                        SLICES, TILES, BITS, SHARE, False, WARPS)  # fmt: skip
            byte = mine + (later + begin) % SLICES * (64 * SHARE)
            words = rest + chunk_words(later_at, byte, stride, block < blocks)
            if step % SLICES == SLICES - 1:
                block = first + step // SLICES * (GROUPS * tl.num_programs(0))
                _finish(acc, shared + step % RING * BYTES, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr,
                        bias_ptr, block, thread, rows, tokens, factor, zero, norm, TILES, PARTS, ROW_SCALES, BLOCK,
                        BIAS)  # fmt: skip
                acc = start


@triton.jit
def _step(acc, chunk, pieces, z_even, z_odd, there, step, begin, steps, share, worker, count, SLICES: tl.constexpr,
          TILES: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, APART: tl.constexpr,
          WARPS: tl.constexpr):  # fmt: skip
    """Multiply a chunk of a slice, part after part, while the next ones of ``steps`` times as many are on their way.

    Warps of a share wait for each other, APART from the other shares': not all warps of a scheduler wait at a time.
    """
    CUT: tl.constexpr = slice_parts(TILES, BITS, SHARE)
    RING: tl.constexpr = ring(CUT)
    BYTES: tl.constexpr = buffer_bytes(TILES, BITS, WARPS, SHARE)
    GROUPS: tl.constexpr = WARPS // SHARE
    for part in tl.static_range(CUT):
        wait_for_copies(worker, RING - 2)
        if APART:
            party = worker * 0 + 32 * GROUPS
            if WARPS % SHARE > 0:  # the spare warp belongs to one of the shares
                party += tl.where(share == tl.program_id(0) % SHARE, 32, 0)
            some_barrier(share + 1, party)
        else:
            tl.debug_barrier()
        number = step + (part + RING - 1) // CUT
        _begin_part(pieces, (step * CUT + part + RING - 1) % RING * BYTES, (number + begin) % SLICES, number < steps,
                    worker, count, (part + RING - 1) % CUT, CUT, 8 // BITS, 8 * TILES, SHARE, WARPS)  # fmt: skip
        now = (step * CUT + part) % RING * BYTES
        acc = _chunk(acc, chunk, z_even + now, z_odd + now, there.to(tl.int32), TILES, BITS, part, CUT)
    return acc


@triton.jit
def _prefetch_ends(
    scale_ptr, places_ptr, signs_ptr, row, rows, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr
):
    """Ask for what a warp needs of its rows in the end to come to the L2 cache: memory is far when it is needed."""
    used = (row < rows).to(tl.int32)
    if ROW_SCALES:
        prefetch_line(scale_ptr + row, used)
    if BLOCK > 0:
        prefetch_line(places_ptr + row, used)
        prefetch_line(signs_ptr + row, used)


@triton.jit
def _first(words):
    """The first chunk of a tuple of words, and the rest."""
    chunk, rest = (), ()
    for i in tl.static_range(len(words)):
        if i < 16:
            chunk += (words[i],)
        else:
            rest += (words[i],)
    return chunk, rest


@triton.jit
def _column(acc, INDEX: tl.constexpr, TILES: tl.constexpr):
    """Of a lane's INDEX-th token of two for each of TILES tiles four rows, 8 apart."""
    at: tl.constexpr = INDEX // 2 * 4 + INDEX % 2
    return acc[at], acc[at + 2], acc[at + 4 * TILES], acc[at + 4 * TILES + 2]


@triton.jit
def _bits(values):
    """Four float32 as words."""
    return (
        values[0].to(tl.int32, bitcast=True),
        values[1].to(tl.int32, bitcast=True),
        values[2].to(tl.int32, bitcast=True),
        values[3].to(tl.int32, bitcast=True),
    )


@triton.jit
def _sums(words):
    """The sums of four float32 each, 4 apart, from words, one after another."""
    found = ()
    for i in tl.static_range(4):
        total = words[i].to(tl.float32, bitcast=True)
        for part in tl.static_range(1, len(words) // 4):
            total += words[4 * part + i].to(tl.float32, bitcast=True)
        found += (total,)
    return found


@triton.jit
def _shared_out(acc, shared, thread, TILES: tl.constexpr):
    """What both warps have of the tokens of this one, added up: of each of TILES tokens four rows, 8 apart.

    Of eight tokens a warp has every second, of sixteen the first or the last eight.
    """
    second = thread // 32 % 2 == 1  # of the two warps, whatever their shares
    kept = ()
    for e in tl.static_range(TILES):
        given = ()
        for i in tl.static_range(4):
            one = acc[i // 2 * (4 * TILES) + i % 2 * 2 + e]
            other = acc[i // 2 * (4 * TILES) + i % 2 * 2 + e + (4 if TILES == 2 else 1)]
            kept += (tl.where(second, other, one),)
            given += (tl.where(second, one, other).to(tl.int32, bitcast=True),)
        store_shared_words(
            shared + (thread ^ 32) * 16 + e * 16 * thread.shape[0], given, (thread >= 0).to(tl.int32)
        )
    tl.debug_barrier()
    found = ()
    for e in tl.static_range(TILES):
        words = load_shared_words(shared + thread * 16, e * 16 * thread.shape[0])
        for i in tl.static_range(4):
            found += (kept[4 * e + i] + words[i].to(tl.float32, bitcast=True),)
    return found


@triton.jit
def _block_ends(
    scale_ptr, places_ptr, signs_ptr, block, place, rows, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr
):
    """Scales, places and signs of a lane's four rows."""
    ends = ()
    for i in tl.static_range(4):
        ends += row_ends(
            scale_ptr, places_ptr, signs_ptr, block * 32 + 8 * i + place, rows, ROW_SCALES, BLOCK
        )
    return ends


@triton.jit
def _write(products, ends, total, unit, token, used, y_ptr, bias_ptr, block, lane, rows, factor, zero, norm,
           BLOCK: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Scale, rotate and write a lane's four rows of a token, where they are ``used``."""
    values = ()
    for i in tl.static_range(4):
        values += ((products[i] * factor - total * zero) * ends[3 * i],)
    if BLOCK > 0:
        values = _rotated(values, lane, BLOCK)
    for i in tl.static_range(4):
        written = (block * 32 + 8 * i + lane // 4 < rows) & used
        value = values[i]
        if BLOCK > 0:
            value *= unit * norm * ends[3 * i + 2]
            if BIAS:
                value += tl.load(bias_ptr + ends[3 * i + 1], mask=written, other=0.0).to(tl.float32)
        at = y_ptr + token.to(tl.int64) * rows + ends[3 * i + 1]
        tl.store(at, value.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _finish(acc, shared, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, block, thread, rows,
            tokens, factor, zero, norm, TILES: tl.constexpr, PARTS: tl.constexpr, ROW_SCALES: tl.constexpr,
            BLOCK: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Add up what two warps have, scale, rotate and write 32 rows of half the tokens."""
    lane, share = thread % 32, thread // 32 % 2
    ends = _block_ends(scale_ptr, places_ptr, signs_ptr, block, lane // 4, rows, ROW_SCALES, BLOCK)
    first = 2 * (lane % 4) + (8 * share if TILES == 2 else share)
    token_values = ()
    for e in tl.static_range(TILES):
        token_values += _token_values(sum_ptr, unit_ptr, first + e, tokens, PARTS)
    tl.debug_barrier()  # what the slice was in is free
    products = _shared_out(acc, shared, thread, TILES)
    for e in tl.static_range(TILES):
        _write(four(products, e), ends, token_values[2 * e], token_values[2 * e + 1], first + e, first + e < tokens,
               y_ptr, bias_ptr, block, lane, rows, factor, zero, norm, BLOCK, BIAS)  # fmt: skip


@triton.jit
def _finish_three(acc, shared, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, parts_ptr, block,
                  thread, rows, tokens, factor, zero, norm, TILES: tl.constexpr, PARTS: tl.constexpr,
                  ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The same of three warps: of sixteen tokens two of them have four each, the third eight; of eight two have four.

    And of spare warps, whose parts go to memory, and which do not wait for the other warps.
    """
    lane, warp = thread % 32, thread // 32
    group, share = warp // 3, warp % 3
    ends = _block_ends(scale_ptr, places_ptr, signs_ptr, block, lane // 4, rows, ROW_SCALES, BLOCK)
    token_values = ()
    for i in tl.static_range(TILES):
        token = _token(share if i == 0 else share * 0 + 3, lane)
        token_values += _token_values(sum_ptr, unit_ptr, token, tokens, PARTS)
    mine = group < GROUPS
    arrived_or_all(mine.to(tl.int32))  # what slices were in is free
    unit, last = tl.program_id(0), thread * 0  # as many spare warps have parts as there are units
    has_unit = unit < (tl.cdiv(rows, 32) - GROUPS * tl.num_programs(0)) * 3
    if has_unit:
        spare = (group == GROUPS).to(tl.int32)
        for c in tl.static_range(2 * TILES):
            at = parts_ptr + ((unit * (2 * TILES) + c) * 128 + lane * 4)
            store_words_where(at, _bits(_column(acc, c, TILES)), spare)
        counter = sum_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (tokens * PARTS + unit // 3)
        last = last_to_arrive(counter, lane, spare, 3)
    for c in tl.static_range(2 * TILES):
        at = shared + (warp * (2 * TILES) + c) * 512 + lane * 16
        store_shared_words(at, _bits(_column(acc, c, TILES)), mine.to(tl.int32))
    some_barrier(group + 4, tl.where(mine, 96, 32))
    for i in tl.static_range(TILES):
        column = tl.minimum(share, 2 * TILES - 1) if i == 0 else share * 0 + 3
        at = shared + (tl.minimum(group, GROUPS - 1) * (6 * TILES) + column) * 512 + lane * 16
        words = ()
        for part in tl.static_range(3):
            words += load_shared_words(at, part * (TILES * 1024))
        token = _token(share if i == 0 else column, lane)
        used = (token < tokens) & mine & ((share < 2 * TILES) if i == 0 else (share == 2))
        _write(_sums(words), ends, token_values[2 * i], token_values[2 * i + 1], token, used, y_ptr, bias_ptr, block,
               lane, rows, factor, zero, norm, BLOCK, BIAS)  # fmt: skip
    if has_unit:
        end_of_warps(mine.to(tl.int32))
        _finish_parts(sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, parts_ptr, ends, block,
                      lane, last, rows, tokens, factor, zero, norm, TILES, PARTS, BLOCK, BIAS)  # fmt: skip


@triton.jit
def _token(column, lane):
    """The token of a lane's so many-th column of tiles."""
    return column // 2 * 8 + lane % 4 * 2 + column % 2


@triton.jit
def _finish_parts(sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, parts_ptr, ends, block, lane,
                  last, rows, tokens, factor, zero, norm, TILES: tl.constexpr, PARTS: tl.constexpr,
                  BLOCK: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Finish rows of spare warps: the ``last`` of three whose part is in memory adds up all three, writes outputs."""
    triple = tl.program_id(0) // 3
    words, token_values = (), ()
    for c in tl.static_range(2 * TILES):
        token_values += _token_values(sum_ptr, unit_ptr, _token(lane * 0 + c, lane), tokens, PARTS)
    for c in tl.static_range(2 * TILES):
        for part in tl.static_range(3):
            at = parts_ptr + (((triple * 3 + part) * (2 * TILES) + c) * 128 + lane * 4)
            words += load_words(at, last)
    for c in tl.static_range(2 * TILES):
        token = _token(lane * 0 + c, lane)
        some = ()
        for i in tl.static_range(12):
            some += (words[12 * c + i],)
        _write(_sums(some), ends, token_values[2 * c], token_values[2 * c + 1], token, (token < tokens) & (last != 0),
               y_ptr, bias_ptr, block, lane, rows, factor, zero, norm, BLOCK, BIAS)  # fmt: skip
