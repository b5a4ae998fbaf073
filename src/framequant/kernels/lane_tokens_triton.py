"""The product of 5 to 16 tokens where codes go from memory to the tensor cores through registers alone.

As in ``lane_product_triton`` a lane loads 16 bytes of four rows, which are its own operands of ``mma.m16n8k16`` once
they are masked: a code among the bits of a half's mantissa is a subnormal number, the code times a power of two, which
tensor cores multiply exactly; coefficients are over these powers. Two warps share 32 rows of all tokens and go through
their columns, one of them a chunk ahead; coefficients come to shared memory a *slice* at a time, two slices ahead. Then
each of the two adds up what both have of its tokens, rotates blocks of rows, within and between lanes, and writes
outputs. Four warps a scheduler hide what each of them waits for. Only ``lane_ops`` imports this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_product_triton import (
    chunk_words,
    first_words,
    four,
    replaced,
    row_addresses,
    row_ends,
)
from framequant.kernels.lanes_triton import (
    copy_to_shared,
    end_of_copies,
    from_lane,
    load_shared_words,
    mma_halves,
    shared_memory,
    store_shared_words,
    wait_for_copies,
)
from framequant.kernels.transform_triton import mantissa_place, mantissa_runs
from framequant.kernels.triton_support import COMPILED, let_next_start, wait_for_previous

#: Warps that share rows; of a row each takes 64 bytes of a slice. And slices of codes that are on their way.
SHARE, AHEAD = tl.constexpr(2), tl.constexpr(2)


@triton.constexpr_function
def slice_bytes(tiles, bits):
    """Bytes of shared memory for a slice of coefficients of ``8 tiles`` tokens."""
    return 2 * (16 // bits) * 8 * tiles * 64


@triton.constexpr_function
def buffer_bytes(tiles, bits, warps):
    """Bytes of shared memory for a slice, or for what warps have of half their tokens."""
    return max(slice_bytes(tiles, bits), 32 * warps * 16 * tiles)


@triton.constexpr_function
def token_bytes(tiles, bits, warps):
    """Bytes of shared memory: a slice that is multiplied, and two on their way."""
    return 3 * buffer_bytes(tiles, bits, warps)


@triton.jit
def _begin_slice(z_ptr, shared, number, thread, count, tokens, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
                 THREADS: tl.constexpr):  # fmt: skip
    """Begin to bring a slice: for each warp, pair of runs and token 128 bytes, of every second token pieces swapped.

    So that eight lanes, of two tokens, read from all banks.
    """
    PIECES: tl.constexpr = SHARE * PAIRS * TOKENS * 8  # of 16 bytes
    for turn in tl.static_range((PIECES + THREADS - 1) // THREADS):
        piece = (thread + turn * THREADS) % PIECES  # some threads bring what another one brings, too
        row, place = piece // 8, piece % 8
        pair, token, share = row // TOKENS % PAIRS, row % TOKENS, row // (PAIRS * TOKENS)
        byte = (number * SHARE + share) * 128 + place * 16
        there = (byte < count * 4) & (token < tokens)
        source = z_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + tl.where(
            there, (token * PAIRS + pair) * (count * 4) + byte, 0
        )
        copy_to_shared(shared + row * 128 + (place ^ (token % 2)) * 16, source, there.to(tl.int32))
    end_of_copies(thread)


@triton.constexpr_function
def _chunk_text(tiles, bits):
    """PTX of ``_chunk``, as one piece: what a warp without rows skips must be no conditional product.

    Operands: sums of 8 tiles registers, 16 words, two addresses, whether there are rows.
    """
    sums, first = 8 * tiles, ((1 << bits) - 1) * 0x00010001
    even, odd, there = f"${sums + 16}", f"${sums + 17}", f"${sums + 18}"
    text = [".reg .pred none;", f".reg .b32 a<8>, w<16>, b<{8 * tiles}>;", f"setp.eq.b32 none, {there}, 0;",
            "@none bra.uni end;"]  # fmt: skip
    text += [f"mov.b32 w{i}, ${sums + i};" for i in range(16)]
    for j in range(8 // bits):
        for n in range(tiles):
            for k, at in ((0, even), (4, odd)):
                names = ", ".join(f"b{8 * n + k + i}" for i in range(4))
                text.append(f"ld.shared.v4.b32 {{{names}}}, [{at}+{(j * tiles + n) * 1024}];")
        low = mantissa_place(2 * j, bits)
        if j and not low:
            text += [f"shr.u32 w{i}, w{i}, {mantissa_runs(bits) * bits};" for i in range(16)]
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
def _chunk(acc, words, z_even, z_odd, there, TILES: tl.constexpr, BITS: tl.constexpr):
    """Add the products of a chunk to those of two times 16 rows and TILES times eight tokens, where there are rows."""
    if COMPILED:
        text: tl.constexpr = _chunk_text(TILES, BITS)
        constraints: tl.constexpr = _chunk_constraints(TILES)
        # Triton knows no starred elements
        operands = words + (z_even, z_odd, there) + acc  # noqa: RUF005
        return tl.inline_asm_elementwise(
            text, constraints, operands, dtype=(tl.float32,) * (8 * TILES), is_pure=False, pack=1
        )
    for j in tl.static_range(8 // BITS):
        b = ()
        for n in tl.static_range(TILES):
            b += load_shared_words(z_even, (j * TILES + n) * 1024)
            b += load_shared_words(z_odd, (j * TILES + n) * 1024)
        for m in tl.static_range(4):
            a = _operands(words, j, m, BITS)
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
    total = token * 0.0
    for part in tl.static_range(PARTS):
        total += tl.load(sum_ptr + token * PARTS + part, mask=there, other=0.0)
    return total, tl.load(unit_ptr + token, mask=there, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def lane_tokens(
    codes_ptr, z_ptr, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, memory_ptr,
    rows, stride, count, tokens, factor, zero, norm,
    TILES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, SLICES: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of up to ``8 TILES`` tokens, or products in units of the tokens; see the module's text.

    Args:
        codes_ptr: bytes (rows, stride).
        z_ptr: halves (tokens, 8 / BITS, 2 count), as ``transform_triton`` writes them in PAIRS; ``count`` a multiple
            of 4.
        sum_ptr: float32 (tokens, PARTS): sums of a token's halves, over its unit.
        unit_ptr: (tokens,).
        scale_ptr: scales, (rows,) or one.
        y_ptr: outputs (tokens, rows); without BLOCK float32, in units of the tokens.
        memory_ptr: in place of shared memory; for the interpreter.
        factor: what makes codes of subnormal numbers, ``2**24`` over ``first_factor``.
        zero: the code that stands for 0, between two codes.
        norm: of the rotation of a block.
        SLICES: of ``64 SHARE`` bytes of a row.
    """
    let_next_start(PDL)
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    place, quarter = lane // 4, lane % 4
    share, group = warp % SHARE, warp // SHARE
    PAIRS: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = WARPS // SHARE
    BYTES: tl.constexpr = buffer_bytes(TILES, BITS, WARPS)
    shared = shared_memory(token_bytes(TILES, BITS, WARPS), memory_ptr)
    z_at = shared + share * (slice_bytes(TILES, BITS) // SHARE) + place * 128 + quarter * 32
    z_even, z_odd = z_at + place % 2 * 16, z_at + (1 - place % 2) * 16
    first, blocks = group * tl.num_programs(0) + tl.program_id(0), tl.cdiv(rows, 32)
    turns = tl.cdiv(blocks - tl.program_id(0), GROUPS * tl.num_programs(0))
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
    tl.debug_barrier()  # or the compiler moves these loads behind the wait
    wait_for_previous(PDL)
    for s in tl.static_range(2):
        _begin_slice(z_ptr, shared + s * BYTES, (s + begin) % SLICES, thread, count, tokens, PAIRS, 8 * TILES,
                     32 * WARPS)  # fmt: skip
    none = thread * 0.0
    start = ()
    for _ in tl.static_range(8 * TILES):
        start += (none,)
    acc = start
    for step in tl.range(0, turns * SLICES):
        later = step + AHEAD
        block = first + later // SLICES * (GROUPS * tl.num_programs(0))
        later_at = row_addresses(codes_ptr, block, place, rows, stride, False)
        wait_for_copies(thread, 1)
        tl.debug_barrier()
        _begin_slice(z_ptr, shared + (step + 2) % 3 * BYTES, (step + 2 + begin) % SLICES, thread, count, tokens, PAIRS,
                     8 * TILES, 32 * WARPS)  # fmt: skip
        now = step % 3 * BYTES
        chunk, rest = _first(words)
        there = (first + step // SLICES * (GROUPS * tl.num_programs(0)) < blocks).to(tl.int32)
        acc = _chunk(acc, chunk, z_even + now, z_odd + now, there, TILES, BITS)
        byte = mine + (later + begin) % SLICES * (64 * SHARE)
        words = rest + chunk_words(later_at, byte, stride, block < blocks)
        if step % SLICES == SLICES - 1:
            block = first + step // SLICES * (GROUPS * tl.num_programs(0))
            tl.debug_barrier()  # what the slice was in is free
            _finish(acc, shared + now, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, block,
                    thread, rows, tokens, factor, zero, norm, TILES, PARTS, ROW_SCALES, BLOCK, BIAS)  # fmt: skip
            acc = start


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
def _shared_out(acc, shared, thread, TILES: tl.constexpr):
    """What both warps have of the tokens of this one, added up: of each of TILES tokens four rows, 8 apart.

    Of eight tokens a warp has every second, of sixteen the first or the last eight.
    """
    second = thread // 32 % SHARE == 1
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
def _finish(acc, shared, sum_ptr, unit_ptr, scale_ptr, y_ptr, places_ptr, signs_ptr, bias_ptr, block, thread, rows,
            tokens, factor, zero, norm, TILES: tl.constexpr, PARTS: tl.constexpr, ROW_SCALES: tl.constexpr,
            BLOCK: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Add up what two warps have, scale, rotate and write 32 rows of half the tokens."""
    lane, share = thread % 32, thread // 32 % SHARE
    place, quarter = lane // 4, lane % 4
    ends, token_values = (), ()
    for i in tl.static_range(4):
        ends += row_ends(
            scale_ptr, places_ptr, signs_ptr, block * 32 + 8 * i + place, rows, ROW_SCALES, BLOCK
        )
    first = 2 * quarter + (8 * share if TILES == 2 else share)
    for e in tl.static_range(TILES):
        token_values += _token_values(sum_ptr, unit_ptr, first + e, tokens, PARTS)
    products = _shared_out(acc, shared, thread, TILES)
    for e in tl.static_range(TILES):
        total, unit, token = token_values[2 * e], token_values[2 * e + 1], first + e
        values = ()
        for i in tl.static_range(4):
            values += ((products[4 * e + i] * factor - total * zero) * ends[3 * i],)
        if BLOCK > 0:
            values = _rotated(values, lane, BLOCK)
        for i in tl.static_range(4):
            row = block * 32 + 8 * i + place
            written = (row < rows) & (token < tokens)
            value = values[i]
            if BLOCK > 0:
                value *= unit * norm * ends[3 * i + 2]
                if BIAS:
                    value += tl.load(bias_ptr + ends[3 * i + 1], mask=written, other=0.0).to(tl.float32)
            at = y_ptr + token.to(tl.int64) * rows + ends[3 * i + 1]
            tl.store(at, value.to(y_ptr.dtype.element_ty), mask=written)
