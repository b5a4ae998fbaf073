import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framequant.codes.trellis import (
    TrellisSpec,
    codebook_values,
    decode_states,
    decode_tiles,
    matrix_from_tiles,
    pack_states,
    rate_pattern,
    tiles_from_matrix,
    unpack_states,
)
from framequant.codes.trellis_codebook import codebook
from framequant.errors import ConfigError

PATTERNS = [(1,), (2,), (8,), (1, 2), (2, 2, 2, 3), (3, 2), (1, 3, 8), (2, 3, 2, 2, 3, 2, 2, 3), (7, 1)]


def random_path(spec: TrellisSpec, tiles: int, seed: int = 0) -> torch.Tensor:
    """States of random bits, straight from the definition: Python integers, one step at a time."""
    generator = torch.Generator().manual_seed(seed)
    pattern = spec.rates * (spec.steps // len(spec.rates))
    rows = []
    for _ in range(tiles):
        bits = torch.randint(2, (spec.bits_per_tile,), generator=generator).tolist()
        ring = bits * 17
        ends = torch.tensor(pattern).cumsum(0).tolist()
        start = 16 * spec.bits_per_tile
        windows = [ring[start + end - spec.state_bits : start + end] for end in ends]
        rows.append([int("".join(map(str, window)), 2) for window in windows])
    return torch.tensor(rows, dtype=torch.int32)


def spec_for(rates: tuple[int, ...], state_bits: int, groups: int = 3) -> TrellisSpec:
    while sum(rates) * groups < state_bits:
        groups += 1
    return TrellisSpec(state_bits, rates, groups, len(rates))


@pytest.mark.parametrize("rates", PATTERNS)
@pytest.mark.parametrize("state_bits", [8, 11, 16])
def test_unpack_inverts_pack(rates: tuple[int, ...], state_bits: int) -> None:
    spec = spec_for(rates, state_bits)
    states = random_path(spec, 5)
    packed = pack_states(states, spec)
    assert packed.dtype == torch.uint8
    assert packed.numel() == 5 * spec.bytes_per_tile
    assert torch.equal(unpack_states(packed, spec, 5), states)
    assert torch.equal(decode_tiles(packed, spec, 5), decode_states(states, state_bits))


@given(st.binary(min_size=18, max_size=18))
def test_all_bytes_are_codes(data: bytes) -> None:
    spec = TrellisSpec(12, (2, 2, 2, 3), 8, 4)  # 72 bits: no padding, so every string of bytes is a tile
    packed = torch.tensor(list(data), dtype=torch.uint8)
    assert torch.equal(pack_states(unpack_states(packed, spec, 2), spec), packed)


def test_states_are_the_rotated_integer() -> None:
    spec = TrellisSpec(10, (2, 3), 4, 3)
    packed = pack_states(random_path(spec, 1), spec)
    number, bits = int.from_bytes(bytes(packed.tolist()), "little"), spec.bits_per_tile
    expected = [((number >> at) | (number << (bits - at))) & 1023 for at in spec.offsets]
    assert unpack_states(packed, spec, 1)[0].tolist() == expected


def test_golden_bytes() -> None:
    spec = TrellisSpec(8, (2, 2, 2, 3), 2, 4)  # 18 bits in three bytes
    steps = [1, 2, 3, 5, 0, 1, 2, 6]  # the new bits: 01 10 11 101 00 01 10 110
    bits = "011011101000110110"
    states = [int((bits * 3)[18 + e - 8 : 18 + e], 2) for e in (2, 4, 6, 9, 11, 13, 15, 18)]
    assert [s & (7 if i % 4 == 3 else 3) for i, s in enumerate(states)] == steps
    packed = pack_states(torch.tensor([states], dtype=torch.int32), spec)
    assert packed.tolist() == list(int(bits, 2).to_bytes(3, "little")) == [0x36, 0xBA, 0x01]


def test_golden_levels() -> None:
    """The meaning of stored codes: constants must never change under the same identifier."""
    assert {bits: _digest(bits, "bytesum-1") for bits in range(8, 17)} == GOLDEN_LEVELS
    assert {bits: _digest(bits, "bytepair-1") for bits in range(8, 17)} == GOLDEN_PAIRS


def _digest(bits: int, identifier: str) -> int:
    levels = codebook(bits, identifier).levels(torch.arange(1 << bits)).to(torch.int64).flatten()
    return int((levels * (torch.arange(len(levels)) % 1009 + 1)).sum())


GOLDEN_LEVELS = {
    8: -148155,
    9: 108885,
    10: -126597,
    11: -54778,
    12: 50219,
    13: 431873,
    14: 57700,
    15: 569234,
    16: -3956974,
}

GOLDEN_PAIRS = {
    8: -102260,
    9: 517630,
    10: -2148262,
    11: 506916,
    12: -1127858,
    13: 1843776,
    14: 50193,
    15: -931581,
    16: -2106868,
}


@pytest.mark.parametrize(("identifier", "reach"), [("bytesum-1", 510), ("bytepair-1", 255)])
@pytest.mark.parametrize("state_bits", range(8, 17))
def test_codebook_is_odd_and_normalised(state_bits: int, identifier: str, reach: int) -> None:
    values = codebook_values(state_bits, identifier=identifier).double()
    assert values.shape == (1 << state_bits, 510 // reach)
    assert torch.equal(values, -values.flip(0))
    assert abs(values.square().mean().item() - 1) < 1e-6
    assert values.abs().max() > 2.2
    assert codebook(state_bits, identifier).levels(torch.arange(1 << state_bits)).abs().max() <= reach


def test_pairs_by_hand() -> None:
    book = codebook(16, "bytepair-1")
    state = 0xA51C
    word = ((state * book.multiplier + book.addend) % 2**32).to_bytes(4, "little")
    levels = [word[0] + word[1] - 255, word[2] + word[3] - 255]
    assert book.levels(torch.tensor([state])).tolist() == [levels]
    values = decode_states(torch.tensor([state]), 16, identifier="bytepair-1")
    assert values.tolist() == (torch.tensor(levels) * torch.tensor(book.scale)).tolist()


def test_a_tile_of_pairs_has_its_bytes_and_its_order() -> None:
    spec = TrellisSpec(12, (4, 5), 4, 8, "bytepair-1")
    assert (spec.weights, spec.steps, spec.rate, spec.bits_per_tile) == (32, 16, 2.25, 72)
    states = random_path(spec, 3)
    packed = pack_states(states, spec)
    assert packed.numel() == 3 * 9
    tiles = decode_tiles(packed, spec, 3)
    table = codebook_values(12, identifier="bytepair-1")
    assert torch.equal(tiles[:, 0::2], table[states.long(), 0])
    assert torch.equal(tiles[:, 1::2], table[states.long(), 1])
    assert torch.equal(tiles_from_matrix(matrix_from_tiles(tiles, 4, 24, spec), spec), tiles)
    with pytest.raises(ConfigError, match="two adjacent weights"):
        TrellisSpec(12, (4,), 4, 3, "bytepair-1")
    with pytest.raises(ConfigError, match="from 1 to 4, with two weights a state"):
        rate_pattern(4.5, 2)


def test_codebook_by_hand() -> None:
    book = codebook(12)
    state = 1234
    word = (state * book.multiplier + book.addend) % 2**32
    level = sum(word.to_bytes(4, "little")) - 510
    assert book.levels(torch.tensor([state, state + 4096])).tolist() == [[level], [level]]
    assert decode_states(torch.tensor([state]), 12).item() == torch.tensor(level * book.scale).item()


@pytest.mark.parametrize(
    ("bits", "pattern"),
    [
        (1.0, (1,)),
        (1.5, (1, 2)),
        (1.75, (1, 2, 2, 2)),
        (2.0, (2,)),
        (2.25, (2, 2, 2, 3)),
        (2.5, (2, 3)),
        (2.375, (2, 2, 3, 2, 2, 3, 2, 3)),
        (8, (8,)),
    ],
)
def test_rate_pattern(bits: float, pattern: tuple[int, ...]) -> None:
    assert rate_pattern(bits) == pattern
    assert sum(pattern) / len(pattern) == bits


def test_every_eighth_is_a_rate() -> None:
    for eighths in range(8, 65):
        rates = rate_pattern(eighths / 8)
        spec = TrellisSpec(12, rates, 16, 16)
        assert spec.bits_per_coefficient == eighths / 8
        assert spec.bytes_per_tile % 4 == 0
        assert max(rates) - min(rates) <= 1


@pytest.mark.parametrize("bits", [0.5, 0.875, 2.1, 8.125, float("1e-3")])
def test_rate_pattern_refuses(bits: float) -> None:
    with pytest.raises(ConfigError, match="multiple of 1/8"):
        rate_pattern(bits)


@pytest.mark.parametrize(
    "fields",
    [
        {"state_bits": 7},
        {"state_bits": 17},
        {"rates": ()},
        {"rates": (0,)},
        {"rates": (9,)},
        {"rates": (2,) * 9},
        {"rates": (2, 2, 3)},
        {"tile_rows": 0},
        {"tile_rows": 1, "tile_cols": 4, "rates": (2,)},
        {"codebook": "bytesum-2"},
    ],
)
def test_spec_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TrellisSpec.from_dict(fields)


def test_spec_round_trip_and_unknown_key() -> None:
    spec = TrellisSpec(16, (2, 3), 64, 4)
    assert TrellisSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="Did you mean 'state_bits'"):
        TrellisSpec.from_dict({"statebits": 12})
    with pytest.raises(ConfigError, match="wrong type"):
        TrellisSpec.from_dict({"rates": 2})


def test_gain_interpolates() -> None:
    gains = [TrellisSpec(12, rate_pattern(bits)).gain for bits in (1, 1.25, 2, 2.25, 4, 8)]
    assert gains == pytest.approx([0.88, 0.93, 1.03, 1.04, 1.12, 1.2])


def test_spec_sizes() -> None:
    spec = TrellisSpec(12, (2, 2, 2, 3), 16, 16)
    assert (spec.steps, spec.bits_per_tile, spec.bytes_per_tile) == (256, 576, 72)
    assert spec.bits_per_coefficient == 2.25
    assert spec.matrix_bytes(17, 16) == 2 * 72
    padded = TrellisSpec(8, (1, 2), 3, 2)
    assert (padded.bits_per_tile, padded.bytes_per_tile) == (9, 2)
    assert padded.bits_per_coefficient == 16 / 6


@pytest.mark.parametrize("shape", [(16, 8), (17, 9), (1, 1), (5, 30)])
def test_tiles_invert(shape: tuple[int, int]) -> None:
    spec = TrellisSpec(8, (2,), 4, 8)
    matrix = torch.arange(1.0, shape[0] * shape[1] + 1).reshape(shape)
    tiles = tiles_from_matrix(matrix, spec)
    down, across = spec.grid(*shape)
    assert tiles.shape == (down * across, 32)
    assert tiles.sum() == matrix.sum()
    assert torch.equal(matrix_from_tiles(tiles, *shape, spec), matrix)


def test_tile_order_is_row_major() -> None:
    spec = TrellisSpec(8, (2,), 2, 4)
    tiles = tiles_from_matrix(torch.arange(32.0).reshape(4, 8), spec)
    assert tiles[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_wrong_shapes_are_refused() -> None:
    spec = TrellisSpec(8, (2,), 4, 8)
    with pytest.raises(ConfigError, match="do not fit tiles"):
        pack_states(torch.zeros(2, 31, dtype=torch.int32), spec)
    with pytest.raises(ConfigError, match="bytes are not"):
        unpack_states(torch.zeros(7, dtype=torch.uint8), spec, 1)
    with pytest.raises(ConfigError, match="matrix"):
        matrix_from_tiles(torch.zeros(3, 32), 4, 8, spec)
    with pytest.raises(ConfigError, match="from a matrix"):
        tiles_from_matrix(torch.zeros(3), spec)
    with pytest.raises(ConfigError, match="not a tail-biting path"):
        pack_states(torch.arange(32, dtype=torch.int32)[None], spec)


def test_empty_batch() -> None:
    spec = TrellisSpec(8, (2,), 4, 8)
    packed = pack_states(torch.zeros(0, 32, dtype=torch.int32), spec)
    assert packed.shape == (0,)
    assert decode_tiles(packed, spec, 0).shape == (0, 32)


def test_import_is_light() -> None:
    code = (
        "import sys; import framequant.codes.trellis, framequant.kernels.viterbi;"
        "assert not {'triton', 'numba', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
