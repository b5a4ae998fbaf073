import itertools
import sys

import pytest
import torch

from framequant.codes.trellis import (
    TrellisSpec,
    codebook_values,
    decode_states,
    decode_tiles,
    pack_states,
    rate_pattern,
)
from framequant.errors import ConfigError, NumericalError
from framequant.kernels import viterbi
from framequant.kernels.viterbi import encode_tiles, search

PATTERNS = [(1,), (2,), (3,), (4,), (1, 2), (2, 1), (2, 2, 2, 3), (2, 3), (3, 4)]
ODD_PATTERNS = [(1, 3), (5,), (1, 6, 2), (8,), (6, 1)]


def problem(
    tiles: int, steps: int, state_bits: int, seed: int = 0, each: int = 1
) -> tuple[torch.Tensor, ...]:
    """Values and weights of paths, and a table of ``each`` values a state."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tiles, steps * each, generator=generator)
    weights = torch.rand(tiles, steps * each, generator=generator) + 0.1
    return values, weights, torch.randn(1 << state_bits, each, generator=generator)


def cost(
    values: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    return (weights.double() * (values.double() - table.double()[states.long()].flatten(1)) ** 2).sum(1)


def is_path(states: torch.Tensor, rates: tuple[int, ...], state_bits: int, ring: bool) -> bool:
    pattern = torch.tensor(rates * (states.shape[1] // len(rates)))
    before = states.roll(1, 1)
    expected = (before << pattern | states & ((1 << pattern) - 1)) & ((1 << state_bits) - 1)
    return torch.equal(expected if ring else expected[:, 1:], states if ring else states[:, 1:])


def exhaustive(
    values: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, rates: tuple[int, ...], ring: bool
) -> torch.Tensor:
    """The least cost of each sequence over every string of bits, by trying all of them."""
    state_bits = len(table).bit_length() - 1
    pattern = rates * (values.shape[1] // (len(rates) * table.shape[1]))
    choices = [range(1 << k) for k in pattern]
    starts = [None] if ring else range(1 << (state_bits - pattern[0]))
    best = torch.full((len(values),), torch.inf, dtype=torch.float64)
    for start, bits in itertools.product(starts, itertools.product(*choices)):
        node = start or 0
        if ring:
            for b, k in zip(bits, pattern, strict=True):
                node = (node << k | b) & ((1 << state_bits) - 1)
            node &= (1 << (state_bits - pattern[0])) - 1
        path = []
        for b, k in zip(bits, pattern, strict=True):
            node = (node << k | b) & ((1 << state_bits) - 1)
            path.append(node)
        states = torch.tensor(path).expand(len(values), -1)
        best = torch.minimum(best, cost(values, weights, table, states))
    return best


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(("rates", "steps", "state_bits"), [((2,), 5, 4), ((1, 2), 6, 5), ((1,), 8, 4)])
def test_free_ends_are_optimal(
    backend: str, each: int, rates: tuple[int, ...], steps: int, state_bits: int
) -> None:
    values, weights, table = problem(2, steps, state_bits, each=each)
    states = search(values, table, rates, weights=weights, backend=backend)
    assert is_path(states, rates, state_bits, ring=False)
    best = exhaustive(values, weights, table, rates, ring=False)
    torch.testing.assert_close(cost(values, weights, table, states), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(("rates", "steps", "state_bits"), [((2,), 6, 4), ((1, 2), 8, 5), ((1,), 10, 4)])
def test_rings_are_optimal(
    backend: str, each: int, rates: tuple[int, ...], steps: int, state_bits: int
) -> None:
    values, weights, table = problem(2, steps, state_bits, each=each)
    costs = []
    for overlap in range(1 << (state_bits - rates[0])):
        ends = torch.full((2,), overlap)
        states = search(values, table, rates, overlap=ends, weights=weights, backend=backend)
        assert is_path(states, rates, state_bits, ring=True)
        assert torch.equal(states[:, 0] >> rates[0], ends.int())
        costs.append(cost(values, weights, table, states))
    best = exhaustive(values, weights, table, rates, ring=True)
    torch.testing.assert_close(torch.stack(costs).amin(0), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(
    ("rates", "state_bits", "each"),
    [(r, 8, 1) for r in PATTERNS + ODD_PATTERNS]
    + [((2,), 11, 1), ((4,), 11, 2), ((3, 4), 10, 2), ((4, 5), 10, 2), ((2,), 8, 2)],
)
def test_cpu_agrees_with_torch(rates: tuple[int, ...], state_bits: int, each: int, ring: bool) -> None:
    values, weights, table = problem(5, 24 // len(rates) * len(rates), state_bits, each=each)
    overlap = torch.arange(5) % (1 << (state_bits - rates[0])) if ring else None
    costs = []
    for backend in ("torch", "cpu"):
        states = search(values, table, rates, overlap=overlap, weights=weights, backend=backend)
        assert is_path(states, rates, state_bits, ring)
        costs.append(cost(values, weights, table, states))
    torch.testing.assert_close(*costs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("bits", "state_bits", "codebook"),
    [(bits, state_bits, "bytesum-1") for bits, state_bits in ((2, 8), (2.25, 10), (1.5, 9), (4, 10), (3, 9))]
    + [(bits, state_bits, "bytepair-1") for bits, state_bits in ((2, 10), (2.25, 12), (1.5, 9), (3, 12))],
)
def test_encode_pack_decode(bits: float, state_bits: int, codebook: str) -> None:
    per_state = 2 if codebook == "bytepair-1" else 1
    spec = TrellisSpec(state_bits, rate_pattern(bits, per_state), 8, 8, codebook)
    values = problem(6, 64, 2)[0]
    states = encode_tiles(values, spec)
    assert states.dtype == torch.int32
    packed = pack_states(states, spec)  # refuses anything but a ring
    decoded = decode_tiles(packed, spec, 6)
    assert torch.equal(decoded, decode_states(states, state_bits, identifier=codebook))
    assert ((values - decoded) ** 2).mean() < 3 * 4.0**-bits


def test_gaussian_error_of_rings() -> None:
    """L = 8 at two bits: 0.0846 for tiles of 256; a random table has 0.087 even with free ends."""
    spec = TrellisSpec(8, (2,), 16, 16)
    values = problem(256, 256, 2)[0]
    states = encode_tiles(values, spec)
    error = ((values - decode_states(states, 8)) ** 2).mean() / (values**2).mean()
    assert 0.0625 < error < 0.0870


def test_seam_is_near_the_optimum_and_refinement_never_hurts() -> None:
    spec = TrellisSpec(8, (2,), 8, 8)
    values, table = problem(32, 64, 2)[0], codebook_values(8)
    ones = torch.ones_like(values)
    rings = [search(values, table, (2,), overlap=torch.full((32,), end)) for end in range(64)]
    best = torch.stack([cost(values, ones, table, states) for states in rings]).amin(0)
    plain = cost(values, ones, table, encode_tiles(values, spec))
    refined = cost(values, ones, table, encode_tiles(values, spec, refine=1))
    assert (refined <= plain + 1e-4).all()
    assert (best <= refined + 1e-4).all()
    assert plain.sum() < 1.01 * best.sum()


def test_weights_move_the_error() -> None:
    spec = TrellisSpec(8, (2,), 8, 8)
    values = problem(16, 64, 2)[0]
    weights = torch.ones(16, 64)
    weights[:, ::2] = 0.0
    error = (values - decode_states(encode_tiles(values, spec, weights=weights), 8)) ** 2
    plain = (values - decode_states(encode_tiles(values, spec), 8)) ** 2
    assert error[:, 1::2].mean() < 0.5 * plain.mean()
    scaled = encode_tiles(values, spec, weights=7.0 * weights)
    assert torch.equal(scaled, encode_tiles(values, spec, weights=weights))


def test_empty_batch() -> None:
    spec = TrellisSpec(8, (2,), 8, 8)
    for backend in ("torch", "cpu"):
        assert encode_tiles(torch.zeros(0, 64), spec, backend).shape == (0, 64)


def test_threads_do_not_change_the_states() -> None:
    values, _, table = problem(37, 16, 8)
    together = search(values, table, (2,), backend="cpu")
    assert torch.equal(together, torch.cat([search(row[None], table, (2,), backend="cpu") for row in values]))


def test_errors() -> None:
    spec = TrellisSpec(8, (2,), 8, 8)
    good = torch.zeros(1, 64)
    with pytest.raises(ConfigError, match="do not fit"):
        encode_tiles(torch.zeros(1, 63), spec)
    with pytest.raises(ConfigError, match="Did you mean 'torch'"):
        encode_tiles(good, spec, backend="torhc")
    with pytest.raises(ConfigError, match="shape of values"):
        encode_tiles(good, spec, weights=torch.ones(1, 1))
    with pytest.raises(ConfigError, match="negative"):
        encode_tiles(good, spec, weights=-torch.ones(1, 64))
    with pytest.raises(NumericalError, match="values that are not finite"):
        encode_tiles(good + torch.nan, spec)
    with pytest.raises(ConfigError, match="do not make a trellis"):
        search(good, torch.zeros(255), (2,))
    with pytest.raises(ConfigError, match="on the CPU"):
        viterbi.choose_backend("cpu", torch.device("meta"))


def test_without_numba_it_warns_and_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(viterbi.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="numba is not installed"):
        assert viterbi.choose_backend("auto", torch.device("cpu")) == "torch"
