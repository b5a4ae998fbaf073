"""Scalar codes out of planes of 16-bit words (``packed_words.py``): of 3, 5 to 8 bits, and digits of 3 or 5 levels.

A b-bit word goes into the mantissa of a half, two at a time. A code of ``2**b`` levels is then made like those of
``product_triton.scalar_levels``. Digits of an odd number n of levels are balanced: less the middle of all numbers, the
word is a sum of centred digits times powers of n, and the highest digit is the quotient by its power, rounded to
nearest. One multiply-add onto 192, a half whose last bit is 1/8, a digit's unit, rounds so; another leaves the rest.
All are exact.

Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import COMPILED


@triton.constexpr_function
def is_plain(bits):
    """Whether 16-bit words are simply full of codes."""
    return bits == 1 or bits == 2 or bits == 4


@triton.constexpr_function
def num_planes(bits):
    """16-bit words of a unit."""
    return 1 if is_plain(bits) else bits


@triton.constexpr_function
def num_digits(levels, bits):
    """Codes in a word of so many bits."""
    count = 0
    while levels ** (count + 1) <= 1 << bits:
        count += 1
    return count


@triton.constexpr_function
def unit_codes(levels, bits):
    """Coefficients that meet one 16-bit word, or one unit of several."""
    return 16 // bits if is_plain(bits) else 16 * num_digits(levels, bits)


@triton.constexpr_function
def _moved_text(word, shift, mask, onto):
    """PTX that adds ``mask`` of two 16-bit lanes, moved down by ``shift``, to ``t``."""
    move = f"shr.b32 s, {word}, {shift};" if shift >= 0 else f"shl.b32 s, {word}, {-shift};"
    return f"{move} lop3.b32 t, s, {mask * 0x10001}, {onto}, 0xea;"


@triton.constexpr_function
def _field_text(bits, index, low, base):
    """PTX from the planes of two units to their ``index``-th words, ``low`` bits up in halves of bits ``base``."""
    whole = 16 // bits
    place = bits * (index % whole) if index < bits * whole else index
    if index < bits * whole:
        mask = ((1 << bits) - 1) << low
        lines = [_moved_text(f"${1 + index // whole}", place - low, mask, base * 0x10001)]
    else:  # a bit of every plane
        onto = [base * 0x10001] + ["t"] * (bits - 1)
        lines = [_moved_text(f"${1 + i}", place - i - low, 1 << (i + low), onto[i]) for i in range(bits)]
    return f"{{ .reg .b32 s, t; {' '.join(lines)} mov.b32 $0, t; }}"


@triton.constexpr_function
def _constraints(count):
    return "=r" + ",r" * count


@triton.constexpr_function
def is_whole(bits, index):
    """Whether a word of a unit lies in one plane."""
    return index < bits * (16 // bits)


@triton.jit
def packed_fields(planes, INDEX: tl.constexpr, BITS: tl.constexpr):
    """The INDEX-th words of units as integers, int32; plain Triton."""
    whole: tl.constexpr = 16 // BITS
    if is_whole(BITS, INDEX):
        return (planes[INDEX // whole].to(tl.int32) >> (BITS * (INDEX % whole))) & ((1 << BITS) - 1)
    field = planes[0].to(tl.int32) * 0
    for i in tl.static_range(BITS):
        field |= ((planes[i].to(tl.int32) >> INDEX) & 1) << i
    return field


@triton.jit
def _onto(planes, INDEX: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, BASE: tl.constexpr):
    """Halves of bits BASE with the INDEX-th words of units LOW bits up in their mantissas."""
    if COMPILED:
        text: tl.constexpr = _field_text(BITS, INDEX, LOW, BASE)
        constraints: tl.constexpr = _constraints(BITS)
        return tl.inline_asm_elementwise(text, constraints, planes, dtype=tl.float16, is_pure=True, pack=2)
    bits = (packed_fields(planes, INDEX, BITS) << LOW) | BASE
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def half_bits(value):
    """The bits of the half nearest to a number."""
    size, exponent = abs(value), 15
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    return (0x8000 if value < 0 else 0) + (exponent << 10) + round((size - 1) * 1024)


@triton.constexpr_function
def _digit_text(power):
    """PTX that rounds two numbers over ``power`` to whole digits."""
    factor, onto = half_bits(1 / power) * 0x10001, half_bits(192.0) * 0x10001
    return (
        f"{{ .reg .b32 t, k, c; mov.b32 k, {factor}; mov.b32 c, {onto}; "
        "fma.rn.f16x2 t, $1, k, c; sub.rn.f16x2 $0, t, c; }"
    )


@triton.constexpr_function
def _affine_text(factor, onto):
    """PTX for two halves times ``factor`` plus ``onto``, a number or the second input."""
    third = "$2" if onto is None else "c"
    constant = "" if onto is None else f" mov.b32 c, {half_bits(onto) * 0x10001};"
    return f"{{ .reg .b32 k, c; mov.b32 k, {half_bits(factor) * 0x10001};{constant} fma.rn.f16x2 $0, $1, k, {third}; }}"


@triton.jit
def _digits_over(number, POWER: tl.constexpr):
    if COMPILED:
        text: tl.constexpr = _digit_text(POWER)
        return tl.inline_asm_elementwise(text, "=r,r", [number], dtype=tl.float16, is_pure=True, pack=2)
    return (tl.floor(number.to(tl.float32) * (8.0 / POWER) + 0.5) * 0.125).to(tl.float16)


@triton.jit
def _less(number, digit, POWER: tl.constexpr):
    if COMPILED:
        text: tl.constexpr = _affine_text(-POWER, None)
        return tl.inline_asm_elementwise(
            text, "=r,r,r", [digit, number], dtype=tl.float16, is_pure=True, pack=2
        )
    return (number.to(tl.float32) - POWER * digit.to(tl.float32)).to(tl.float16)


@triton.jit
def _plus(number, FACTOR: tl.constexpr, ONTO: tl.constexpr):
    if COMPILED:
        text: tl.constexpr = _affine_text(FACTOR, ONTO)
        return tl.inline_asm_elementwise(text, "=r,r", [number], dtype=tl.float16, is_pure=True, pack=2)
    return (number.to(tl.float32) * FACTOR + ONTO).to(tl.float16)


@triton.jit
def packed_levels(planes, INDEX: tl.constexpr, LEVELS: tl.constexpr, BITS: tl.constexpr):
    """Centred levels of the codes in the INDEX-th words of units, halves: a tuple, the last code first.

    One code a word: over ``2**BITS``. Digits: in units of 1/8.
    """
    count: tl.constexpr = num_digits(LEVELS, BITS)
    if count == 1:
        return (_plus(_onto(planes, INDEX, BITS, 10 - BITS, 0x3C00), 1.0, -1.0 - (LEVELS - 1) / (2 << BITS)),)
    rest = _plus(_onto(planes, INDEX, BITS, 0, 0x6400), 0.125, -(1024 + (LEVELS**count - 1) // 2) / 8)
    found = ()
    for i in tl.static_range(count - 1):
        digit = _digits_over(rest, LEVELS ** (count - 1 - i))
        rest = _less(rest, digit, LEVELS ** (count - 1 - i))
        found += (digit,)
    found += (rest,)
    return found
