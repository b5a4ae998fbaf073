"""The product with packed codes, ``u = D̃ z``: codes become halves in registers and go to the tensor cores.

Codes lie in words, row after row: 16 bits hold ``16 / BITS`` scalar codes, 32 bits the new bits of 16 trellis
steps. Coefficients come transposed to match, ``z[token, i, word]``: the i-th codes of adjacent words stand
beside adjacent coefficients, so the loop over ``i`` takes one shift and mask for two codes and no data moves
between threads. A scalar code is or-ed into the mantissa of 1.0, giving ``1 + code / 2**BITS``, from which one
packed subtraction makes an exact multiple of the centred level. A trellis state is a window of the row's word
and the word of the tile's row above it; its level is exact too. Scales act on the float32 sums.

With few tokens the columns are split over programs (``program_id(1)``) and the partial sums are written side
by side: synthesis adds them in a fixed order. The interpreter takes plain Triton where the compiled kernel
takes inline PTX. Only ``framequant.kernels.triton_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.block_triton import block_constants, rotated, store_outputs
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


@triton.constexpr_function
def _window_text(shift, bits):
    """PTX that moves windows, at least ``bits`` bits of each input's words, to the low end of a and b."""
    lines = []
    for name, word, above in (("a", "$I0", "$I2"), ("b", "$I1", "$I3")):
        lines.append(
            f"shr.u32 {name}, {word}, {shift};"
            if shift + bits <= 32
            else f"shf.r.wrap.b32 {name}, {word}, {above}, {shift};"
        )
    return " ".join(lines)


@triton.constexpr_function
def _levels_text(out, multiplier, addend, centre):
    """PTX from states in a and b to two packed levels: congruence, sum of bytes onto the half 1024, less 1534."""
    one = [
        f"mad.lo.u32 {t}, {t}, {multiplier}, {addend}; dp4a.u32.u32 {t}, {t}, 0x01010101, 0x6400;"
        for t in "ab"
    ]
    if not centre:
        return f"{one[0]} {one[1]} prmt.b32 {out}, a, b, 0x5410;"
    return f"{one[0]} {one[1]} prmt.b32 a, a, b, 0x5410; sub.rn.f16x2 {out}, a, k;"


@triton.constexpr_function
def _trellis_text(shift, bits, multiplier, addend, centre, pair):
    """PTX for two words: the states ``shift`` bits up and, with ``pair``, those at the top of the same window."""
    window, mask = _window_text(shift, bits + (32 - bits if pair else 0)), (1 << bits) - 1
    low = f"and.b32 a, a, {mask}; and.b32 b, b, {mask};"
    if not pair:
        text = f"{window} {low} {_levels_text('$0', multiplier, addend, centre)}"
    else:
        top = f"shr.u32 c, a, {32 - bits}; shr.u32 d, b, {32 - bits};"
        text = f"{window} {top} {low} {_levels_text('$0', multiplier, addend, centre)} mov.b32 a, c; mov.b32 b, d; "
        text += _levels_text("$1", multiplier, addend, centre)
    first = 2 if pair else 1
    for i in range(4):
        text = text.replace(f"$I{i}", f"${first + i}")
    return f"{{ .reg .b32 a, b, c, d, k; mov.b32 k, 0x65fe65fe; {text} }}"


@triton.constexpr_function
def has_partner(shift, bits):
    """Whether the state ``32 - bits`` bits further up is taken out of the same 32 bits."""
    distance = 32 - bits
    return distance % 2 == 0 and shift // distance % 2 == 0 and shift + distance <= 30


@triton.constexpr_function
def is_partner(shift, bits):
    """Whether the state comes with another one."""
    distance = 32 - bits
    return distance % 2 == 0 and shift // distance % 2 == 1


@triton.jit
def trellis_levels(
    word, above, SHIFT: tl.constexpr, STATE_BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """Return the levels, -510 ... 510, of the states SHIFT bits up in ``above:word``; without CENTRED plus 1534."""
    if COMPILED:
        text: tl.constexpr = _trellis_text(SHIFT, STATE_BITS, MULTIPLIER, ADDEND, CENTRED, False)
        return tl.inline_asm_elementwise(
            text, "=r,r,r,r,r", [word, above], dtype=tl.float16, is_pure=True, pack=2
        )
    both = (above.to(tl.uint32).to(tl.uint64) << 32) | word.to(tl.uint32).to(tl.uint64)
    state = (both >> SHIFT) & ((1 << STATE_BITS) - 1)
    h = (state * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    total = (h & 255) + ((h >> 8) & 255) + ((h >> 16) & 255) + (h >> 24)
    return (total.to(tl.int32) + (-510 if CENTRED else 1024)).to(tl.float16)


@triton.jit
def paired_levels(
    word, above, SHIFT: tl.constexpr, STATE_BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """Return the levels of the states SHIFT and ``SHIFT + 32 - STATE_BITS`` bits up, cut out of one window."""
    if COMPILED:
        text: tl.constexpr = _trellis_text(SHIFT, STATE_BITS, MULTIPLIER, ADDEND, CENTRED, True)
        return tl.inline_asm_elementwise(
            text, "=r,=r,r,r,r,r", [word, above], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return (
        trellis_levels(word, above, SHIFT, STATE_BITS, MULTIPLIER, ADDEND, CENTRED),
        trellis_levels(word, above, SHIFT + 32 - STATE_BITS, STATE_BITS, MULTIPLIER, ADDEND, CENTRED),
    )


@triton.jit(do_not_specialize=["tokens"])
def product(
    words_ptr, z_ptr, sum_ptr, scale_ptr, u_ptr,
    rows, words, stride, span, tokens, factor,
    PARTS: tl.constexpr, PADDED_PARTS: tl.constexpr,
    TRELLIS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    CENTRED: tl.constexpr, ROW_SCALES: tl.constexpr,
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
        words_ptr: int16 (or int32, trellis) (rows, stride); ``words`` of a row are codes.
        z_ptr: halves (tokens, 16 / BITS or 16, words).
        sum_ptr: float32 (tokens, parts): sums of a token's halves; read without CENTRED only.
        scale_ptr: scales, (rows,) or one.
        u_ptr: float32 (splits, tokens, rows).
        span: words of a row that one program takes; best a multiple of BK.
        factor: value of a unit of the levels that are multiplied.
    """
    let_next_start(PDL)
    block, split, column_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    codes: tl.constexpr = 16 if TRELLIS else 16 // BITS
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
    if PREFETCH > 0:
        prefetch(words_ptr + tl.minimum(r, rows - 1).to(tl.int64) * stride + start, PREFETCH)
    r = tl.minimum(r, rows - 1)
    above = (r & -16) | ((r - 1) & 15)
    row, row_above, every = r.to(tl.int64)[:, None], above.to(tl.int64)[:, None], (r >= 0)[:, None]
    word, coefficient, column = k[None, :], k[:, None], n[None, :]
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)[:, None, None] * BK
        row, row_above, every, column = row[None], row_above[None], every[None], column[None]
        word, coefficient = word[None] + group, coefficient[None] + group
    w_at = words_ptr + row * stride + word
    if TRELLIS:
        a_at = words_ptr + row_above * stride + word
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
        w = tl.load(w_at + done, mask=there, other=0)
        if TRELLIS:
            a = tl.load(a_at + done, mask=there, other=0)
        piece = tl.zeros_like(acc)  # tensor cores cut off what they add, so chains are kept short
        for i in tl.static_range(codes):
            if not TRELLIS:
                z = tl.load(z_at + (i * words + done), mask=inside, other=0.0)
                piece = tl.dot(scalar_levels(w, i, BITS, CENTRED), z, piece)
            elif has_partner(30 - 2 * i, BITS):
                z = tl.load(z_at + (i * words + done), mask=inside, other=0.0)
                z_other = tl.load(z_at + ((i - (32 - BITS) // 2) * words + done), mask=inside, other=0.0)
                low, top = paired_levels(w, a, 30 - 2 * i, BITS, MULTIPLIER, ADDEND, CENTRED)
                piece = tl.dot(low, z, piece)
                piece = tl.dot(top, z_other, piece)
            elif not is_partner(30 - 2 * i, BITS):
                z = tl.load(z_at + (i * words + done), mask=inside, other=0.0)
                piece = tl.dot(trellis_levels(w, a, 30 - 2 * i, BITS, MULTIPLIER, ADDEND, CENTRED), z, piece)
        acc += piece
    if GROUPS > 1:
        acc = tl.sum(acc, axis=0)
    if not CENTRED and split == 0:
        part = tl.arange(0, PADDED_PARTS)
        summed = (n < tokens)[:, None] & (part < PARTS)[None, :]
        totals = tl.load(sum_ptr + n[:, None] * PARTS + part[None, :], mask=summed, other=0.0)
        centre: tl.constexpr = 1534.0 if TRELLIS else 1.0 + ((1 << BITS) - 1) / (2 << BITS)
        acc -= (centre * tl.sum(totals, axis=1))[None, :]
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
