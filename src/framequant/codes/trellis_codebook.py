"""The computed codebooks of the trellis code: a state's value from three integer instructions, no table.

With ``h = multiplier * state + addend (mod 2**32)`` the level of a state is the sum of the four bytes of
``h`` minus 510, an integer in [-510, 510], and its value is ``level * scale``: one float32 product, the same
bits in torch, numba and Triton. Each byte is a linear congruence of the state, so consecutive states (the
branches that leave one node) are spread evenly, and a sum of four such uniforms is nearly Gaussian. The
addend is chosen so that ``h(~state) = ~h(state)``: the codebook is exactly odd, ``level(~state) =
-level(state)``, hence of mean zero. The multipliers were searched for by ``benchmarks/codebook.py``, which
also prints their Gaussian errors beside those of a random table.

That is ``bytesum-1``, one weight a state. ``bytepair-1`` gives two: bytes 0 and 1 of ``h`` make the first, bytes 2 and
3 the second, each less 255. A state's error is larger at the same L, but half as many states are to be cut out of the
bits, multiplied and summed: at L = 16 and two bits a linear takes two thirds of the time that it takes with
``bytesum-1``, at a smaller error than that has at L = 12 (``benchmarks/README.md``).

For a kernel: mask, multiply-add, ``dp4a`` with 0x01010101; ``0x6400 + sum`` are the bits of the half ``1024 +
sum``, so one packed half subtraction of 1534 turns two sums into two exact levels; ``scale`` belongs to the
row scale. Imports torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.errors import ConfigError, nearest

CODEBOOK_ID, PAIR_ID = "bytesum-1", "bytepair-1"
#: Weights of a state, by the codebook's identifier.
PER_STATE = {CODEBOOK_ID: 1, PAIR_ID: 2}
_WORD = (1 << 32) - 1


@dataclass(frozen=True)
class Codebook:
    """The constants of the codebook for one number of state bits.

    Attributes:
        state_bits: L.
        multiplier: odd, below 2**32.
        addend: below 2**32.
        per_state: weights of a state, 1 or 2.
    """

    state_bits: int
    multiplier: int
    addend: int
    per_state: int = 1

    @property
    def centre(self) -> int:
        """Half the largest sum of a weight's bytes."""
        return 510 // self.per_state

    @property
    def scale(self) -> float:
        """Value of one level: the float32 reciprocal of the levels' standard deviation over all states' weights."""
        return _scale(self)

    def levels(self, states: Int[Tensor, "*n"]) -> Int[Tensor, "*n weights"]:
        """Return the levels of each state's weights, int32, in [-centre, centre]; bits above the state are ignored."""
        masked = states.to(torch.int64) & ((1 << self.state_bits) - 1)
        word = (masked * self.multiplier + self.addend) & _WORD
        halves = [(word & 255) + (word >> 8 & 255), (word >> 16 & 255) + (word >> 24)]
        totals = [halves[0] + halves[1]] if self.per_state == 1 else halves
        return (torch.stack(totals, dim=-1) - self.centre).to(torch.int32)


@cache
def _scale(codebook: Codebook) -> float:
    levels = codebook.levels(torch.arange(1 << codebook.state_bits)).to(torch.int64)
    variance = int((levels * levels).sum()) / levels.numel()
    return float(torch.tensor(1.0 / math.sqrt(variance), dtype=torch.float32))


def symmetric_codebook(state_bits: int, multiplier: int, upper: bool, per_state: int = 1) -> Codebook:
    """Return the codebook with the addend that makes it odd under complement of the state.

    ``h(~s) = ~h(s)`` asks for ``multiplier * (2**L - 1) + 2 * addend + 1 = 0 (mod 2**32)``, which an odd
    multiplier meets with two addends, 2**31 apart; ``upper`` picks the second.
    """
    addend = -(multiplier * ((1 << state_bits) - 1) + 1) // 2 + ((1 << 31) if upper else 0)
    return Codebook(state_bits, multiplier, addend & _WORD, per_state)


# weights of a state and state bits: (multiplier, upper), found by `benchmarks/codebook.py --search`.
_CONSTANTS = {
    1: {
        8: (1403794319, False),
        9: (1403794319, False),
        10: (1390430795, False),
        11: (1264282711, True),
        12: (2087730737, False),
        13: (856912307, True),
        14: (2191735769, True),
        15: (1164054201, False),
        16: (1567861309, True),
    },
    2: {
        8: (1780933313, True),
        9: (3973889183, False),
        10: (3682523327, True),
        11: (2893663081, True),
        12: (2219916897, False),
        13: (526952373, True),
        14: (965891941, False),
        15: (1586579865, True),
        16: (1780933313, True),
    },
}


@cache
def codebook(state_bits: int, identifier: str = CODEBOOK_ID) -> Codebook:
    """Return the constants for ``state_bits`` in 8..16.

    Raises:
        ConfigError: if there is no codebook of that size, or of that name.
    """
    if identifier not in PER_STATE:
        raise ConfigError(f"unknown codebook {identifier!r}.{nearest(identifier, list(PER_STATE))}")
    per_state = PER_STATE[identifier]
    if state_bits not in _CONSTANTS[per_state]:
        raise ConfigError(f"a trellis has 8 to 16 state bits, not {state_bits}")
    multiplier, upper = _CONSTANTS[per_state][state_bits]
    return symmetric_codebook(state_bits, multiplier, upper, per_state)


def decode_states(
    states: Int[Tensor, "*n steps"],
    state_bits: int,
    dtype: torch.dtype = torch.float32,
    identifier: str = CODEBOOK_ID,
) -> Float[Tensor, "*n weights"]:
    """Return the values of states' weights, those of a state side by side: zero mean, unit variance over all states.

    Args:
        states: integers in ``[0, 2**state_bits)``, at least one-dimensional.
        state_bits: L, 8..16.
        dtype: of the result; the float32 product is rounded once more if it is narrower.
        identifier: of the codebook.

    Raises:
        ConfigError: if there is no such codebook.
    """
    book = codebook(state_bits, identifier)
    return (book.levels(states).flatten(-2).to(torch.float32) * book.scale).to(dtype)


def codebook_values(
    state_bits: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    identifier: str = CODEBOOK_ID,
) -> Float[Tensor, "states weights"]:
    """Return the values of all ``2**state_bits`` states in order, (states, 1 or 2).

    Examples:
        >>> values = codebook_values(8)
        >>> bool((values == -values.flip(0)).all())
        True
    """
    states = torch.arange(1 << state_bits, device=device)[:, None]
    return decode_states(states, state_bits, dtype, identifier)
