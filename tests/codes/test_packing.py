"""The byte layout: golden bytes, pack and unpack as inverses, damaged input refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.packing import bytes_per_row, pack_codes, storage_bits, unpack_codes, word_shape
from framequant.errors import CheckpointError, ConfigError

ALL_COUNTS = [*range(2, 17), 18, 32, 46, 64, 100, 128, 254, 256]

# Bytes of the row i * 7 % n for i = 0 ... 10, then the top code. They are in files: they never change.
GOLDEN = {
    2: "aa0a",
    4: "6c6cec",
    8: "b8cb29b80f",
    16: "705e3c1af8f6",
    32: "e0b8ca878af89b0f",
    64: "c0e154dca8c6f86ffc",
    128: "8083a3c219a962b89ff10f",
    256: "00070e151c232a31383f46ff",
    3: "664107",
    5: "6ec8eb0c",
    6: "1637218a00",
    7: "0000d41303",
}


def golden_codes(num_levels: int) -> torch.Tensor:
    return torch.tensor([[i * 7 % num_levels for i in range(11)] + [num_levels - 1]], dtype=torch.uint8)


def definition(codes: list[int], num_levels: int) -> list[int]:
    """The bytes of one row as the module's text defines them, by way of one large integer."""
    group, width = word_shape(num_levels)
    codes = codes + [0] * (-len(codes) % group)
    words = len(codes) // group
    stream = 0
    for index in range(words):
        digits = codes[index * group : (index + 1) * group]
        stream |= sum(digit * num_levels**j for j, digit in enumerate(digits)) << (index * width)
    return list(stream.to_bytes(-(-words * width // 8), "little"))


def random_codes(rows: int, cols: int, num_levels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_levels, (rows, cols), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("num_levels", GOLDEN)
def test_golden_bytes(num_levels: int) -> None:
    codes = golden_codes(num_levels)
    packed = pack_codes(codes, num_levels)
    assert bytes(packed[0].tolist()).hex() == GOLDEN[num_levels]
    assert torch.equal(unpack_codes(packed, num_levels, 12), codes)


@settings(deadline=None, max_examples=150)
@given(
    num_levels=st.sampled_from(ALL_COUNTS),
    rows=st.integers(0, 4),
    cols=st.integers(0, 70),
    seed=st.integers(0, 2**31),
    top=st.booleans(),
)
def test_unpack_inverts_pack(num_levels: int, rows: int, cols: int, seed: int, top: bool) -> None:
    codes = random_codes(rows, cols, num_levels, seed)
    if top:
        codes.fill_(num_levels - 1)
    packed = pack_codes(codes, num_levels)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (rows, bytes_per_row(cols, num_levels))
    assert packed.tolist() == [definition(row, num_levels) for row in codes.tolist()]
    restored = unpack_codes(packed, num_levels, cols)
    assert restored.is_contiguous()
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("num_levels", ALL_COUNTS)
def test_results_share_no_memory_with_arguments(num_levels: int) -> None:
    codes = random_codes(2, 48, num_levels, 1)
    packed = pack_codes(codes, num_levels)
    restored = unpack_codes(packed, num_levels, 48)
    storages = {t.untyped_storage().data_ptr() for t in (codes, packed, restored)}
    assert len(storages) == 3


def test_strided_input_packs_like_its_copy() -> None:
    codes = random_codes(12, 10, 5, 0).T[::2]
    assert torch.equal(pack_codes(codes, 5), pack_codes(codes.contiguous(), 5))
    packed = pack_codes(codes, 5)
    strided = packed.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(unpack_codes(strided, 5, 12), codes)


@pytest.mark.parametrize("num_levels", ALL_COUNTS)
def test_words_hold_their_codes_at_little_waste(num_levels: int) -> None:
    group, width = word_shape(num_levels)
    assert num_levels**group <= 2**width
    assert storage_bits(num_levels) == width / group
    excess = storage_bits(num_levels) / math.log2(num_levels) - 1
    assert 0 <= excess <= (0.05 if num_levels > 16 else 0.025 if num_levels == 15 else 0.02)


def test_word_shapes_are_part_of_the_format() -> None:
    assert {n: word_shape(n) for n in range(3, 16) if n.bit_count() > 1} == {
        3: (5, 8),
        5: (3, 7),
        6: (5, 13),
        7: (6, 17),
        9: (5, 16),
        10: (3, 10),
        11: (2, 7),
        12: (5, 18),
        13: (4, 15),
        14: (6, 23),
        15: (1, 4),
    }


@pytest.mark.parametrize("num_levels", [-1, 0, 1, 257, 512])
def test_counts_without_layout_are_refused(num_levels: int) -> None:
    with pytest.raises(ConfigError, match="num_levels"):
        word_shape(num_levels)


@pytest.mark.parametrize("num_levels", [n for n in ALL_COUNTS if n < 256])
def test_code_beyond_the_levels_is_refused(num_levels: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    codes[1, 2] = num_levels
    with pytest.raises(ConfigError, match=f"{num_levels} levels end at {num_levels - 1}"):
        pack_codes(codes, num_levels)


@pytest.mark.parametrize("codes", [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.uint8)])
def test_pack_refuses_other_dtypes_and_shapes(codes: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="uint8 matrix"):
        pack_codes(codes, 4)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 4, dtype=torch.int8),
    ],
)
def test_unpack_refuses_other_dtypes_and_sizes(packed: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="uint8 matrix with 4 bytes"):
        unpack_codes(packed, 4, 16)


@pytest.mark.parametrize("num_levels", [n for n in range(3, 16) if n.bit_count() > 1])
def test_word_that_encodes_no_codes_is_refused(num_levels: int) -> None:
    group, _ = word_shape(num_levels)
    packed = torch.full((1, bytes_per_row(group, num_levels)), 255, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="damaged"):
        unpack_codes(packed, num_levels, group)


def test_negative_column_count_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        bytes_per_row(-1, 4)
