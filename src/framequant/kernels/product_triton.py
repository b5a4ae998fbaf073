"""The product with packed codes, ``u = D̃ z``: codes become halves in registers and go to the tensor cores.

Codes lie in words (``words.py``): 16 bits hold ``16 / BITS`` scalar codes of a row, of other widths BITS planes of
16-bit words hold units, and the 32-bit words of adjacent trellis tiles lie side by side. Coefficients come transposed
to match, ``z[token, i, word]``: the i-th codes of adjacent words, units or tiles stand beside adjacent coefficients,
and the loop over ``i`` takes one shift and mask for two codes and no data moves between threads. A scalar code is or-
ed into the mantissa of 1.0, giving ``1 + code / 2**BITS``, from which one packed subtraction makes an exact multiple
of the centred level. How codes come out of units is told in ``packed_triton.py``, how trellis states are cut out of
words in ``trellis_triton.py``; their levels are exact too. Scales act on the float32 sums.

With few tokens the columns are split over programs (``program_id(1)``) and the partial sums are written side
by side: synthesis adds them in a fixed order. The interpreter takes plain Triton where the compiled kernel
takes inline PTX. Only ``framequant.kernels.triton_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import block_constants, rotated, store_outputs
from framequant.kernels.packed_triton import is_plain, num_planes, packed_levels, unit_codes
from framequant.kernels.trellis_triton import (
    byte_places,
    centre,
    is_aligned,
    levels,
    loaded_words,
    moved,
    moved_words,
    offset,
    partner,
    per_state,
    run_place,
    tile_words,
    window,
    word_around,
)
from framequant.kernels.triton_support import (
    COMPILED,
    let_next_start,
    prefetch,
    wait_for_previous,
)


@triton.constexpr_function
def _scalar_text(shift, bits, centre):
    """PTX for two 16-bit words at once: shift, mask and or, subtract the centre."""
    mask = ((1 << 10) - (1 << (10 - bits))) * 0x10001
    move = f"shr.b32 t, $1, {shift};" if shift > 0 else f"shl.b32 t, $1, {-shift};"
    text = f"{{ .reg .b32 t, c; {move} lop3.b32 t, t, {mask}, 0x3c003c00, 0xea; "
    if centre:
        return text + f"mov.b32 c, {centre * 0x10001}; sub.rn.f16x2 $0, t, c; }}"
    return text + "mov.b32 $0, t; }"


@triton.constexpr_function
def _half_bits(value):
    """The bits of a half in [1, 2) that is a multiple of 2**-10."""
    return 0x3C00 + int((value - 1.0) * 1024)


@triton.jit
def scalar_levels(words, INDEX: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr):
    """Return ``(code - (2**BITS - 1) / 2) / 2**BITS`` of the INDEX-th codes as halves; without CENTRED plus 1.5.

    (The constant is ``1 + (2**BITS - 1) / 2**(BITS + 1)``.)
    """
    shift: tl.constexpr = BITS * INDEX - (10 - BITS)
    centre: tl.constexpr = _half_bits(1.0 + ((1 << BITS) - 1) / (2 << BITS))
    if COMPILED:
        text: tl.constexpr = _scalar_text(shift, BITS, centre if CENTRED else 0)
        return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    code = (words.to(tl.int32) >> (BITS * INDEX)) & ((1 << BITS) - 1)
    level = ((code << (10 - BITS)) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    if CENTRED:
        level -= 1.0 + ((1 << BITS) - 1) / (2 << BITS)
    return level.to(tl.float16)


@triton.jit
def _add_states(
    piece, w, z_at, inside, words, STEP: tl.constexpr, TOP: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, PATTERN: tl.constexpr,
):  # fmt: skip
    """Add the products of the weights of a step's state and, where one lies at the TOP of its window, of another's."""
    found = window(w, offset(PATTERN, STEPS, STEP), BITS if TOP < 0 else 32)
    for j in tl.static_range(per_state(PATTERN)):
        z = tl.load(z_at + (STEP + j) * words, mask=inside, other=0.0)
        level = levels(found, BITS, False, MULTIPLIER, ADDEND, byte_places(per_state(PATTERN), j))
        piece = tl.dot(level, z, piece)
        if TOP >= 0:
            z = tl.load(z_at + (TOP + j) * words, mask=inside, other=0.0)
            level = levels(found, BITS, True, MULTIPLIER, ADDEND, byte_places(per_state(PATTERN), j))
            piece = tl.dot(level, z, piece)
    return piece


@triton.jit(do_not_specialize=["tokens"])
def product(
    words_ptr, z_ptr, sum_ptr, scale_ptr, shift_ptr, u_ptr,
    rows, words, stride, span, tokens, factor,
    PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
    TRELLIS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    PATTERN: tl.constexpr, LEVELS: tl.constexpr, CENTRED: tl.constexpr, ROW_SCALES: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
    unit_ptr=None, top_ptr=None, places_ptr=None, signs_ptr=None, matrix_ptr=None, bias_ptr=None, shrink=1.0,
    norm=1.0, BLOCK: tl.constexpr = 0, GROUPS: tl.constexpr = 1, BIAS: tl.constexpr = False,
):  # fmt: skip
    """One block of rows, one span of words, one block of tokens; see the module's text.

    With BLOCK (one span only) ``u`` are the outputs, (tokens, rows) of any float dtype: blocks of so many rows times
    ``matrix``, ``signs``, ``unit`` of the token and ``norm``, plus the bias, at their ``places``; ``top`` is a power of
    two above all scales, ``shrink`` one that keeps products within halves. Each step is GROUPS times BK words, in as
    many warps.

    Args:
        words_ptr: int16 (rows, planes, stride); int32 (words of a tile * tiles down, stride) for a trellis. ``words``
            of a row, or of a plane of it, meet coefficients; see ``WordLayout.length``.
        z_ptr: halves (tokens, codes of a word, unit or row of a tile, words).
        sum_ptr: float32 (tokens, parts): sums of a token's halves; read without CENTRED only.
        scale_ptr: scales, (rows,) or one.
        shift_ptr: int32 (16,), ``words.row_shifts`` of a trellis. Only what is loaded is moved to the threads that the
            tensor cores want by itself; what is computed takes all that depends on it through shared memory.
        u_ptr: float32 (splits, tokens, rows).
        span: words of a row that one program takes; best a multiple of BK.
        factor: value of a unit of the levels that are multiplied.
    """
    let_next_start(PDL)
    block, split, column_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    codes: tl.constexpr = 16 if TRELLIS else unit_codes(LEVELS, BITS)
    stride = stride // 8 * 8  # as it is anyway; so the compiler knows that vectors can be loaded
    if TRELLIS or not is_plain(BITS):
        words = words // 8 * 8
    r = block * BR + tl.arange(0, BR)
    start = split * span
    stop = tl.minimum(start + span, words)  # the last step may reach into the next program's words
    k = start + tl.arange(0, BK)
    n = column_block * BN + tl.arange(0, BN)
    if BLOCK > 0:
        matrix, over_top, places, signs, bias = block_constants(
            block * BR + tl.arange(0, BR),
            rows,
            matrix_ptr,
            top_ptr,
            places_ptr,
            signs_ptr,
            bias_ptr,
            norm,
            BLOCK,
            BIAS,
        )
    if PREFETCH > 0 and not TRELLIS:
        prefetch(words_ptr + tl.minimum(r, rows - 1).to(tl.int64) * stride + start, PREFETCH)
    r = tl.minimum(r, rows - 1)
    row, every = r.to(tl.int64)[:, None], (r >= 0)[:, None]
    word, coefficient, column = k[None, :], k[:, None], n[None, :]
    if TRELLIS:
        first, shift = run_place(r % 16, PATTERN, codes)
        if not is_aligned(PATTERN, codes):
            shift = tl.load(shift_ptr + r % 16)
        first, shift = first[:, None], shift[:, None]
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)[:, None, None] * BK
        row, every, column = row[None], every[None], column[None]
        word, coefficient = word[None] + group, coefficient[None] + group
        if TRELLIS:
            first, shift = first[None], shift[None]
    w_at = ()
    if TRELLIS:
        for i in tl.static_range(loaded_words(PATTERN, codes, BITS)):
            place = row // 16 * tile_words(PATTERN) + word_around(first, i, PATTERN)
            w_at += (words_ptr + place * stride + word,)
    else:
        for i in tl.static_range(num_planes(BITS)):
            w_at += (words_ptr + (row * num_planes(BITS) + i) * stride + word,)
    z_at = z_ptr + column.to(tl.int64) * (codes * words) + coefficient
    few = column < tokens
    wait_for_previous(PDL)
    if BLOCK > 0:
        unit = tl.load(unit_ptr + n, mask=n < tokens, other=0.0)
    if GROUPS > 1:
        acc = tl.zeros([GROUPS, BR, BN], tl.float32)
    else:
        acc = tl.zeros([BR, BN], tl.float32)
    for done in tl.range(0, span, GROUPS * BK, num_stages=STAGES):
        inside = few & (coefficient + done < stop)
        there = (word + done < stride) & every
        w = ()
        for i in tl.static_range(len(w_at)):
            w += (tl.load(w_at[i] + done, mask=there, other=0),)
        if TRELLIS:
            w = moved(w, shift, moved_words(PATTERN, codes, BITS), is_aligned(PATTERN, codes))
        piece = tl.zeros_like(acc)  # tensor cores cut off what they add, so chains are kept short
        for i in tl.static_range(codes if TRELLIS or is_plain(BITS) else 16):
            if not TRELLIS and not is_plain(BITS):
                several = packed_levels(w, i, LEVELS, BITS)
                for j in tl.static_range(len(several)):
                    code = len(several) * (i + 1) - 1 - j
                    z = tl.load(z_at + (code * words + done), mask=inside, other=0.0)
                    piece = tl.dot(several[j], z, piece)
            elif not TRELLIS:
                z = tl.load(z_at + (i * words + done), mask=inside, other=0.0)
                piece = tl.dot(scalar_levels(w[0], i, BITS, CENTRED), z, piece)
            elif partner(PATTERN, codes, BITS, i) != -2:
                piece = _add_states(piece, w, z_at + done, inside, words, i, partner(PATTERN, codes, BITS, i), codes,
                                    BITS, MULTIPLIER, ADDEND, PATTERN)  # fmt: skip
        acc += piece
    if GROUPS > 1:
        acc = tl.sum(acc, axis=0)
    if not CENTRED and split == 0:
        part = tl.arange(0, PADDED_PARTS)
        summed = (n < tokens)[:, None] & (part < PARTS)[None, :]
        totals = tl.load(sum_ptr + n[:, None] * PARTS + part[None, :], mask=summed, other=0.0)
        zero: tl.constexpr = 1024.0 + centre(PATTERN) if TRELLIS else 1.0 + ((1 << BITS) - 1) / (2 << BITS)
        acc -= (zero * tl.sum(totals, axis=1))[None, :]
    r = block * BR + tl.arange(0, BR)
    if ROW_SCALES:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32) * factor
    else:
        scale = tl.load(scale_ptr + r * 0).to(tl.float32) * factor
    if BLOCK > 0:
        acc = rotated(acc * (scale * (over_top * shrink))[:, None], matrix, BR, BN, BLOCK)
        store_outputs(acc, unit, places, signs, bias, r, n, rows, tokens, u_ptr, BIAS)
    else:
        acc *= scale[:, None]
        u_at = u_ptr + ((split * tokens + n).to(tl.int64) * rows)[None, :] + r[:, None]
        tl.store(u_at, acc.to(u_ptr.dtype.element_ty), mask=(n < tokens)[None, :] & (r < rows)[:, None])
