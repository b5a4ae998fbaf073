"""The Sigma-Delta recursion: against the definition, the backends against each other, stability."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.errors import ConfigError
from framequant.kernels.sigma_delta import quantize_sequences

BINOMIALS = {0: (), 1: (1,), 2: (2, -1), 3: (3, -3, 1)}


def by_definition(c: np.ndarray, step: float, levels: int, order: int) -> tuple[list[int], list[float]]:
    """One vector, number by number, with the nearest level of the alphabet."""
    alphabet = [(j - (levels - 1) / 2) * step for j in range(levels)]
    states, codes = [0.0] * 3, []
    for value in c:
        v = value + sum(b * u for b, u in zip(BINOMIALS[order], reversed(states), strict=False))
        code = min(range(levels), key=lambda j: abs(v - alphabet[j]))
        codes.append(code)
        states.append(v - alphabet[code])
    return codes, states[3:]


@pytest.mark.parametrize(
    ("order", "levels"), [(0, 2), (0, 6), (1, 2), (1, 10), (2, 4), (2, 2), (3, 8), (3, 256)]
)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_backend_is_the_definition(order: int, levels: int, backend: str) -> None:
    rng = np.random.default_rng(order * 1000 + levels)
    c, steps = rng.standard_normal((11, 53)), rng.uniform(0.3, 2, 11)
    found = quantize_sequences(torch.from_numpy(c), torch.from_numpy(steps), levels, order, backend)
    for line in range(11):
        codes, states = by_definition(c[line], steps[line], levels, order)
        assert found.codes[line].tolist() == codes
        scaled = np.abs(states) / steps[line]
        assert found.peaks[line] == pytest.approx(scaled.max(), rel=1e-9)
        assert found.energies[line] == pytest.approx((scaled**2).sum(), rel=1e-9)
        assert found.overloads[line] == (scaled > 0.5 + 1e-9).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3), st.integers(1, 128), st.integers(0, 2**31))
def test_compiled_equals_torch_bit_for_bit(vectors: int, size: int, order: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(vectors, size, generator=generator, dtype=torch.float64)
    steps = torch.rand(vectors, generator=generator, dtype=torch.float64) + 0.01
    slow, fast = (quantize_sequences(c, steps, 2 * half, order, backend) for backend in ("torch", "cpu"))
    assert all(torch.equal(one, two) for one, two in zip(slow, fast, strict=True))


@pytest.mark.parametrize(("order", "levels"), [(1, 2), (1, 4), (2, 4), (2, 8), (3, 8), (3, 12)])
def test_stable_inputs_never_overload(order: int, levels: int) -> None:
    gain = levels / 2 - (2**order - 1) / 2
    generator = torch.Generator().manual_seed(0)
    c = (2 * torch.rand(2000, 400, generator=generator, dtype=torch.float64) - 1) * gain
    c[:50] = gain * c[:50].sign()  # the extremes themselves
    found = quantize_sequences(c, torch.ones(2000, dtype=torch.float64), levels, order)
    assert int(found.overloads.sum()) == 0
    assert float(found.peaks.max()) <= 0.5 + 1e-9


def test_inputs_beyond_the_stable_range_overload() -> None:
    c = torch.full((3, 100), 0.75, dtype=torch.float64)
    found = quantize_sequences(c, torch.ones(3, dtype=torch.float64), 2, 1)
    assert bool((found.overloads > 90).all())


def test_empty_and_refused() -> None:
    one = torch.ones(0, dtype=torch.float64)
    assert quantize_sequences(torch.empty(0, 5, dtype=torch.float64), one, 2, 1).codes.shape == (0, 5)
    with pytest.raises(ConfigError, match="order 4"):
        quantize_sequences(torch.zeros(1, 2), torch.ones(1), 2, 4)
    with pytest.raises(ConfigError, match="unknown"):
        quantize_sequences(torch.zeros(1, 2), torch.ones(1), 2, 1, "gpu")
