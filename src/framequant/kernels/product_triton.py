"""The product with packed codes, ``u = D̃ z``: codes become halves in registers and go to the tensor cores.

Codes lie in words, row after row: 16 bits hold ``16 / BITS`` scalar codes, 32 bits the new bits of 16 trellis
steps. Coefficients come transposed to match, ``z[token, i, word]``: the i-th codes of adjacent words stand
beside adjacent coefficients, so the loop over ``i`` takes one shift and mask for two codes and no data moves
between threads. A scalar code is or-ed into the mantissa of 1.0, giving ``1 + code / 2**BITS``, from which one
packed subtraction makes an exact multiple of the centred level. A trellis state is a window of the row's word
and the word of the tile's row above it; its level is exact too. Scales act on the float32 sums.

With few tokens the columns are split over programs (``program_id(1)``) and the partial sums are written side
by side: synthesis adds them in a fixed order. The interpreter takes plain Triton where the compiled kernel
takes inline PTX. Only ``framequant.kernels.fast`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import COMPILED, let_next_start, prefetch, wait_for_previous


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
def _trellis_text(shift, bits, multiplier, addend):
    """PTX for two states: window, congruence, sum of bytes onto the half 1024, pack, subtract 1534."""

    def one(t, word, above):
        if shift + bits <= 32:
            window = f"shr.u32 {t}, {word}, {shift};"
        else:
            window = f"shf.r.wrap.b32 {t}, {word}, {above}, {shift};"
        masked = f"and.b32 {t}, {t}, {(1 << bits) - 1}; mad.lo.u32 {t}, {t}, {multiplier}, {addend};"
        return f"{window} {masked} dp4a.u32.u32 {t}, {t}, 0x01010101, 0x6400;"

    both = f"{one('a', '$1', '$3')} {one('b', '$2', '$4')}"
    return f"{{ .reg .b32 a, b, c; {both} prmt.b32 a, a, b, 0x5410; mov.b32 c, 0x65fe65fe; sub.rn.f16x2 $0, a, c; }}"


@triton.jit
def trellis_levels(
    word, above, SHIFT: tl.constexpr, STATE_BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr
):
    """Return the levels, -510 ... 510, of the states SHIFT bits up in the 64-bit numbers ``above:word``."""
    if COMPILED:
        text: tl.constexpr = _trellis_text(SHIFT, STATE_BITS, MULTIPLIER, ADDEND)
        return tl.inline_asm_elementwise(
            text, "=r,r,r,r,r", [word, above], dtype=tl.float16, is_pure=True, pack=2
        )
    both = (above.to(tl.uint32).to(tl.uint64) << 32) | word.to(tl.uint32).to(tl.uint64)
    state = (both >> SHIFT) & ((1 << STATE_BITS) - 1)
    h = (state * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    total = (h & 255) + ((h >> 8) & 255) + ((h >> 16) & 255) + (h >> 24)
    return (total.to(tl.int32) - 510).to(tl.float16)


@triton.jit(do_not_specialize=["tokens"])
def product(
    words_ptr, z_ptr, scale_ptr, u_ptr,
    rows, words, stride, span, tokens, factor,
    TRELLIS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    CENTRED: tl.constexpr, ROW_SCALES: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One block of rows, one span of words, one block of tokens; see the module's text.

    Args:
        words_ptr: int16 (or int32, trellis) (rows, stride); ``words`` of a row are codes.
        z_ptr: halves (tokens, 16 / BITS or 16, words).
        scale_ptr: scales, (rows,) or one.
        u_ptr: float32 (splits, tokens, rows).
        span: words of a row that one program takes; best a multiple of BK.
        factor: value of a unit of the levels that are multiplied.
    """
    let_next_start(PDL)
    codes: tl.constexpr = 16 if TRELLIS else 16 // BITS
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, words)  # the last step may reach into the next program's words
    k = start + tl.arange(0, BK)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    if PREFETCH > 0:
        prefetch(words_ptr + tl.minimum(r, rows - 1).to(tl.int64) * stride + start, PREFETCH)
    r = tl.minimum(r, rows - 1)
    w_at = words_ptr + (r.to(tl.int64) * stride)[:, None] + k[None, :]
    if TRELLIS:
        above = (r & -16) | ((r - 1) & 15)
        a_at = words_ptr + (above.to(tl.int64) * stride)[:, None] + k[None, :]
    z_at = z_ptr + (n.to(tl.int64) * (codes * words))[None, :] + k[:, None]
    few = n[None, :] < tokens
    wait_for_previous(PDL)
    acc = tl.zeros([BR, BN], tl.float32)
    for done in tl.range(0, span, BK, num_stages=STAGES):
        inside = few & (k[:, None] + done < stop)
        there = (k[None, :] + done < stride) & (r >= 0)[:, None]
        w = tl.load(w_at + done, mask=there, other=0)
        if TRELLIS:
            a = tl.load(a_at + done, mask=there, other=0)
        for i in tl.static_range(codes):
            if TRELLIS:
                levels = trellis_levels(w, a, 30 - 2 * i, BITS, MULTIPLIER, ADDEND)
            else:
                levels = scalar_levels(w, i, BITS, CENTRED)
            z = tl.load(z_at + (i * words + done), mask=inside, other=0.0)
            acc = tl.dot(levels, z, acc)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if ROW_SCALES:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32) * factor
    else:
        scale = tl.load(scale_ptr + r * 0).to(tl.float32) * factor
    acc *= scale[:, None]
    u_at = u_ptr + ((tl.program_id(1) * tokens + n).to(tl.int64) * rows)[None, :] + r[:, None]
    tl.store(u_at, acc.to(u_ptr.dtype.element_ty), mask=few & (r < rows)[:, None])


@triton.jit
def dequantize(
    words_ptr, scale_ptr, panel_ptr, rows, words, stride, factor,
    TRELLIS: tl.constexpr, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
    ROW_SCALES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write coefficients as halves (rows, 16 / BITS or 16, words), the order in which analysis writes z."""
    codes: tl.constexpr = 16 if TRELLIS else 16 // BITS
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (r < rows)[:, None] & (k < words)[None, :]
    w = tl.load(words_ptr + (r.to(tl.int64) * stride)[:, None] + k[None, :], mask=inside, other=0)
    if TRELLIS:
        above = ((r & -16) | ((r - 1) & 15)).to(tl.int64)
        a = tl.load(words_ptr + (above * stride)[:, None] + k[None, :], mask=inside, other=0)
    if ROW_SCALES:
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0).to(tl.float32) * factor
    else:
        scale = tl.load(scale_ptr + r * 0).to(tl.float32) * factor
    for i in tl.static_range(codes):
        if TRELLIS:
            levels = trellis_levels(w, a, 30 - 2 * i, BITS, MULTIPLIER, ADDEND)
        else:
            levels = scalar_levels(w, i, BITS, True)
        values = (levels.to(tl.float32) * scale[:, None]).to(panel_ptr.dtype.element_ty)
        place = panel_ptr + ((r.to(tl.int64) * codes + i) * words)[:, None] + k[None, :]
        tl.store(place, values, mask=inside)
