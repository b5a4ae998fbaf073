"""Trellis codes in a kernel: from the words of a tile to levels, for every pattern of rates.

The bits of a tile of 16 × 16 weights are a ring of 32-bit words, the oldest bits highest (``codes/trellis.py``). A
*run*, here 16 steps (a row of the tile) or 8, owns as many bits as its rates add up to, so its lowest bit lies at a
place that only the run tells. A kernel loads the words that hold a run and the state bits before it, around the ring,
and moves them down by a funnel shift, by an amount for each row; from there on the state of every step is a window at a
place that the pattern fixes at compile time. Runs of whole words, as at two or four bits, need no move.

Two states that are ``32 - BITS`` bits apart come out of one window, the one by a mask, the other by a shift. Levels
keep the constant 1024 + ``centre``, which makes them halves in [1024, 2048) without a subtraction.

A *step* here is a weight; the second of two weights of one state has no new bits. PATTERN holds the rates as
hexadecimal digits, the first step's lowest (``words.digits``). Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import COMPILED
from framequant.kernels.words import SAME_STATE


@triton.constexpr_function
def run_rates(pattern, steps):
    """The rates of the steps of a run; the digit SAME_STATE stands for none."""
    digits = [int(digit, 16) for digit in reversed(f"{pattern:x}")]
    rates = [0 if digit == SAME_STATE else digit for digit in digits]
    return rates * (steps // len(rates))


@triton.constexpr_function
def per_state(pattern):
    """Weights of a state."""
    return 2 if f"{SAME_STATE:x}" in f"{pattern:x}" else 1


@triton.constexpr_function
def centre(pattern):
    """What is to be taken off the sum of a weight's bytes."""
    return 510 // per_state(pattern)


@triton.constexpr_function
def byte_places(each, number):
    """A byte 1 for each of the bytes of a state's number that make its NUMBER-th weight of ``each``."""
    return 0x01010101 if each == 1 else 0x0101 << (16 * number)


@triton.constexpr_function
def tile_words(pattern):
    """Words of a tile."""
    return sum(run_rates(pattern, 16)) // 2


@triton.constexpr_function
def offset(pattern, steps, step):
    """Place of a step's state above the lowest bit of its run."""
    return sum(run_rates(pattern, steps)[step + 1 :])


@triton.constexpr_function
def is_aligned(pattern, steps):
    """Whether every run begins with a word."""
    return sum(run_rates(pattern, steps)) % 32 == 0


@triton.constexpr_function
def moved_words(pattern, steps, bits):
    """Words that hold a run and the state bits before it, once they are moved into place."""
    return -(-(offset(pattern, steps, 0) + bits) // 32)


@triton.constexpr_function
def loaded_words(pattern, steps, bits):
    """Words that hold them wherever a run begins."""
    size = sum(run_rates(pattern, steps))
    furthest = 32 - min(size & -size, 32)  # runs begin at multiples of the power of two in their size
    return -(-(furthest + offset(pattern, steps, 0) + bits) // 32)


@triton.constexpr_function
def partner(pattern, steps, bits, step):
    """The step whose state lies at the top of the 32 bits that begin with this one's; -1: none; -2: this is one.

    Of two steps of a state the first stands for both; the second is one that there is none for.
    """
    each = per_state(pattern)
    offsets = [offset(pattern, steps, i) for i in range(steps)]
    found, taken = -1 if step % each == 0 else -2, set()
    for low in reversed(range(0, steps, each)):
        top = offsets.index(offsets[low] + 32 - bits) if offsets[low] + 32 - bits in offsets else -1
        if low in taken:
            top = -2
        elif top >= 0:
            taken.add(top)
        if low == step:
            found = top
    return found


@triton.jit
def run_place(run, PATTERN: tl.constexpr, RUN: tl.constexpr):
    """Word and bit of a tile where its runs of RUN steps, counted from the oldest, have their lowest bit."""
    bits: tl.constexpr = tile_words(PATTERN) * RUN // 8
    lowest = bits * (256 // RUN - 1 - run)
    return lowest >> 5, lowest & 31


@triton.jit
def word_around(word, NUMBER: tl.constexpr, PATTERN: tl.constexpr):
    """The NUMBER-th word after one, around a tile's ring."""
    words: tl.constexpr = tile_words(PATTERN)
    following = word + NUMBER
    return tl.where(following >= words, following - words, following)


@triton.jit
def funnel(low, high, shift):
    """The low word of ``high:low`` moved down, int32."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    both = (high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)
    return (both >> shift.to(tl.uint64)).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def moved(words, shift, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """COUNT words of runs in place, from those that were loaded."""
    found = ()
    for i in tl.static_range(COUNT):
        if ALIGNED:
            found += (words[i],)
        elif i + 1 < len(words):
            found += (funnel(words[i], words[i + 1], shift),)
        else:  # what is above is not looked at
            found += (funnel(words[i], words[i], shift),)
    return found


@triton.constexpr_function
def _window_text(shift, bits):
    """PTX that moves ``$2:$1`` down, so that at least ``bits`` bits are right."""
    return f"shr.u32 $0, $1, {shift};" if shift + bits <= 32 else f"shf.r.wrap.b32 $0, $1, $2, {shift};"


@triton.jit
def window(words, OFFSET: tl.constexpr, BITS: tl.constexpr):
    """At least BITS bits, int32, from OFFSET on in runs that are in place."""
    first: tl.constexpr = OFFSET // 32
    shift: tl.constexpr = OFFSET % 32
    second: tl.constexpr = first + 1 if shift + BITS > 32 else first
    if shift == 0:
        return words[first]
    if COMPILED:
        text: tl.constexpr = _window_text(shift, BITS)
        return tl.inline_asm_elementwise(
            text, "=r,r,r", [words[first], words[second]], dtype=tl.int32, is_pure=True, pack=1
        )
    both = (words[second].to(tl.uint32).to(tl.uint64) << 32) | words[first].to(tl.uint32).to(tl.uint64)
    return (both >> shift).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.constexpr_function
def _take(bits, top):
    return ("shr.u32", 32 - bits) if top else ("and.b32", (1 << bits) - 1)


@triton.constexpr_function
def _two_sums(take, multiplier, addend, places, one):
    """PTX from two windows to ``a`` and ``b``: states, congruence, sum of bytes onto a half."""
    return " ".join(
        f"{take[0]} {t}, ${number}, {take[1]}; mad.lo.u32 {t}, {t}, {multiplier}, {addend}; "
        f"dp4a.u32.u32 {t}, {t}, {places}, {one};"
        for number, t in ((1, "a"), (2, "b"))
    )


@triton.constexpr_function
def _level_text(take, multiplier, addend, places):
    """PTX from two windows to two packed halves, sums onto 1024."""
    sums = _two_sums(take, multiplier, addend, places, "0x6400")
    return f"{{ .reg .b32 a, b; {sums} prmt.b32 $0, a, b, 0x5410; }}"


@triton.constexpr_function
def _pair_text(bits, multiplier, addend):
    """PTX from two windows, places of bytes and a half to two packed halves."""
    sums = _two_sums(_take(bits, False), multiplier, addend, "$3", "$4")
    return f"{{ .reg .b32 a, b; {sums} prmt.b32 $0, a, b, 0x5410; }}"


@triton.jit
def level_pair(
    first, second, places, one, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr
):
    """A power of two and, in units of 2**-10 of it, the sums of bytes of the states at the low end of two windows.

    Exact halves, as a word. ``places``, of ``byte_places``, says which bytes; ``one`` is the half of that power.
    """
    if COMPILED:
        text: tl.constexpr = _pair_text(BITS, MULTIPLIER, ADDEND)
        return tl.inline_asm_elementwise(
            text, "=r,r,r,r,r", [first, second, places, one], dtype=tl.int32, is_pure=True, pack=1
        )
    found = ()
    for number in tl.static_range(2):
        state = (first if number == 0 else second).to(tl.uint32, bitcast=True).to(tl.uint64) & (
            (1 << BITS) - 1
        )
        total = byte_sum((state * MULTIPLIER + ADDEND) & 0xFFFFFFFF, places.to(tl.uint64))
        found += (total.to(tl.int32) + one,)
    return found[0] | (found[1] << 16)


@triton.jit
def byte_sum(h, places):
    """The sum of those bytes of uint64, below 2**32, that ``places`` has a 1 for; for the interpreter."""
    total = h * 0
    for i in tl.static_range(4):
        total += ((h >> (8 * i)) & 255) * ((places >> (8 * i)) & 1)
    return total


@triton.jit
def levels(window, BITS: tl.constexpr, TOP: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr,
           PLACES: tl.constexpr):  # fmt: skip
    """1024 and the sum of bytes of the states at the low end of windows or, with TOP, at their top; halves.

    PLACES, from ``byte_places``, says which bytes.
    """
    if COMPILED:
        text: tl.constexpr = _level_text(_take(BITS, TOP), MULTIPLIER, ADDEND, PLACES)
        return tl.inline_asm_elementwise(text, "=r,r,r", [window], dtype=tl.float16, is_pure=True, pack=2)
    state = window.to(tl.uint32, bitcast=True).to(tl.uint64)
    state = state >> (32 - BITS) if TOP else state & ((1 << BITS) - 1)
    total = byte_sum((state * MULTIPLIER + ADDEND) & 0xFFFFFFFF, PLACES)
    return (total.to(tl.int32) + 1024).to(tl.float16)
