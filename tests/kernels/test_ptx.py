"""The pieces of PTX in the kernels' loops, interpreted, against the formats of the codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framequant.codes.packing import pack_codes
from framequant.codes.trellis import TrellisSpec, rate_pattern, unpack_states
from framequant.codes.trellis_codebook import codebook
from framequant.kernels.packed_words import to_planes
from framequant.kernels.words import digits
from tests.kernels.ptx import halves, interpret

pytest.importorskip("triton")


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    ("rate", "each"), [(rate, 1) for rate in (1, 1.5, 2, 2.25, 3, 3.875, 8)] + [(2, 2), (2.25, 2), (1.125, 2)]
)
def test_trellis_states_and_levels(bits: int, rate: float, each: int) -> None:
    from framequant.kernels import trellis_triton as kernel

    name = {1: "bytesum-1", 2: "bytepair-1"}[each]
    code, book = TrellisSpec(bits, rate_pattern(rate, each), codebook=name), codebook(bits, name)
    pattern = digits(code)
    assert (kernel.per_state(pattern), kernel.centre(pattern)) == (each, book.centre)
    tiles = torch.randint(0, 256, (2, code.bytes_per_tile), dtype=torch.uint8)
    expected = book.levels(unpack_states(tiles.flatten(), code, 2)).reshape(2, 16, 16)
    words = tiles.view(torch.int32).numpy().view(np.uint32).astype(object)
    count, size = kernel.moved_words(pattern, 16, bits), kernel.tile_words(pattern)
    seen = set()
    for row in range(16):
        lowest = 2 * size * (15 - row)
        loaded = [
            [int(tile[(lowest // 32 + i) % size]) for i in range(kernel.loaded_words(pattern, 16, bits))]
            for tile in words
        ]
        funnel = "shf.r.wrap.b32 $0, $1, $2, $3;"
        places = [
            [interpret(funnel, tile[i], tile[min(i + 1, len(tile) - 1)], lowest % 32) for i in range(count)]
            for tile in loaded
        ]
        for step in range(16):
            top = kernel.partner(pattern, 16, bits, step)
            if top == -2:
                continue
            first, shift = divmod(kernel.offset(pattern, 16, step), 32)
            text = kernel._window_text(shift, bits if top < 0 else 32) if shift else "mov.b32 $0, $1;"
            windows = [interpret(text, *[*place, 0][first : first + 2]) for place in places]
            for found, at_top in ((step, False), (top, True)) if top >= 0 else ((step, False),):
                for weight in range(each):
                    chosen = kernel.byte_places(each, weight)
                    piece = kernel._level_text(
                        kernel._take(bits, at_top), book.multiplier, book.addend, chosen
                    )
                    level = halves(interpret(piece, *windows)) - 1024 - book.centre
                    assert level.tolist() == expected[:, row, found + weight].tolist(), (row, step, at_top)
                    seen.add((row, found + weight))
    assert len(seen) == 256


def test_bytes_of_states_and_their_coefficients() -> None:
    from framequant.kernels import lanes_triton as kernel

    word = 0x44332211
    halves_of = [interpret(kernel._half_text(byte), word) for byte in range(3)]
    assert halves_of == [0x2211, 0x3322, 0x4433]
    assert [interpret(kernel._doubled_text(upper), word) for upper in (0, 1)] == [0x22221111, 0x44443333]


@pytest.mark.parametrize(("levels", "bits"), [(8, 3), (32, 5), (64, 6), (128, 7), (256, 8), (5, 7), (3, 8)])
def test_scalar_codes_in_planes(levels: int, bits: int) -> None:
    from framequant.kernels import packed_triton as kernel

    digits = kernel.num_digits(levels, bits)
    codes = torch.randint(0, levels, (1, 2 * 16 * digits), dtype=torch.uint8)
    planes = to_planes(pack_codes(codes, levels), bits, 2).view(bits, 2).numpy().view(np.uint16)
    packed = [int(low) | int(high) << 16 for low, high in planes]  # two units, as a thread holds them
    centred = codes.view(2, 16, digits).numpy() - (levels - 1) / 2
    for index in range(16):
        if digits == 1:
            word = interpret(kernel._field_text(bits, index, 10 - bits, 0x3C00), *packed)
            word = interpret(kernel._affine_text(1.0, -1.0 - (levels - 1) / (2 << bits)), word)
            assert (halves(word) * levels).tolist() == centred[:, index, 0].tolist()
            continue
        word = interpret(kernel._field_text(bits, index, 0, 0x6400), *packed)
        rest = interpret(kernel._affine_text(0.125, -(1024 + (levels**digits - 1) // 2) / 8), word)
        for place in range(digits - 1, 0, -1):
            digit = interpret(kernel._digit_text(levels**place), rest)
            rest = interpret(kernel._affine_text(-(levels**place), None), digit, rest)
            assert (halves(digit) * 8).tolist() == centred[:, index, place].tolist()
        assert (halves(rest) * 8).tolist() == centred[:, index, 0].tolist()
