"""Trellis codes: what the bits of a tile mean, at any multiple of 1/8 bit per weight.

A tile of ``tile_rows * tile_cols`` weights (row-major) is coded by a path through a bit-shift trellis with ``2**L``
states: step t appends ``k_t`` new bits, ``s_t = ((s_{t-1} << k_t) | b_t) mod 2**L``, and its weight, or its two
adjacent ones, are the computed codebook's values of ``s_t``: there are as many steps as weights, or half as many. The
rates ``k_t`` repeat a pattern. The path is a ring (tail-biting): the bits before the first step are the last ones of
the tile, so a tile takes exactly ``sum(k_t)`` bits.

**Byte layout.** The n bits of a tile form one integer ``N``, oldest bits highest: ``N = sum_t b_t <<
offset_t`` with ``offset_t = n - (k_0 + ... + k_t)``. It is stored little-endian in ``ceil(n / 8)`` bytes,
unused top bits zero; tiles follow one another, row-major over the grid of tiles. The state of step t is the
low L bits of ``N`` rotated right by ``offset_t``: a window at a place fixed by the pattern, read by one
funnel shift of two neighbouring words. For T a multiple of 256 a tile is a whole number of 32-bit words at
every rate, and the rotation is by words.

Encoding is ``framequant.kernels.viterbi.encode_tiles``. Imports torch, the codebook and the errors; no
kernels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from framequant.codes.trellis_codebook import (
    CODEBOOK_ID,
    PAIR_ID,
    PER_STATE,
    Codebook,
    codebook,
    codebook_values,
    decode_states,
)
from framequant.errors import ConfigError, nearest

__all__ = [
    "PAIR_ID",
    "TrellisSpec",
    "codebook_values",
    "decode_states",
    "decode_tiles",
    "matrix_from_tiles",
    "pack_states",
    "rate_pattern",
    "tiles_from_matrix",
    "unpack_states",
]

# Weights of a state: (bits, gain).
_GAINS = {
    1: ((1.0, 0.88), (1.5, 0.98), (2.0, 1.03), (2.5, 1.05), (3.0, 1.07), (4.0, 1.12), (8.0, 1.2)),
    2: ((1.0, 0.88), (1.5, 0.99), (2.0, 1.06), (2.5, 1.12), (3.0, 1.24), (4.0, 1.25)),
}

#: Mean squared error of a unit Gaussian times 4**bits, tail-biting tiles of 256, L = 12, by weights of a state.
_EXCESS = {
    1: (
        (1.0, 1.09),
        (1.5, 1.13),
        (2.0, 1.15),
        (2.5, 1.18),
        (3.0, 1.20),
        (4.0, 1.26),
        (5.0, 1.35),
        (6.0, 1.55),
        (8.0, 3.07),
    ),
    2: ((1.0, 1.10), (1.5, 1.14), (2.0, 1.19), (2.5, 1.25), (3.0, 1.39), (4.0, 1.71)),
}


def _interpolate(table: tuple[tuple[float, float], ...], bits: float) -> float:
    (low, below), (high, above) = next(pair for pair in pairwise(table) if pair[0][0] <= bits <= pair[1][0])
    return below + (above - below) * (bits - low) / (high - low)


def gaussian_error(bits: float, per_state: int = 1) -> float:
    """Mean squared error of the trellis code on a unit Gaussian, measured at 2**12 states.

    Args:
        bits: per coefficient, 1 to 8, of two weights a state to 4.
        per_state: weights of a state.
    """
    return _interpolate(_EXCESS[per_state], bits) / 4**bits


def rate_pattern(bits: float, per_state: int = 1) -> tuple[int, ...]:
    """Return the shortest pattern of step rates whose mean is ``bits`` a weight, the larger ones spread evenly.

    Args:
        bits: per weight, a multiple of 1/8 from 1 to 8, of two weights a state to 4.
        per_state: weights of a state.

    Raises:
        ConfigError: for any other number.

    Examples:
        >>> rate_pattern(2.25), rate_pattern(1.5), rate_pattern(3)
        ((2, 2, 2, 3), (1, 2), (3,))
        >>> rate_pattern(2.25, per_state=2)
        (4, 5)
    """
    most, exact = 8 // per_state, Fraction(bits)
    if not 1 <= exact <= most or 8 % exact.denominator:
        states = ", with two weights a state" if per_state == 2 else ""
        raise ConfigError(f"a trellis rate is a multiple of 1/8 bit from 1 to {most}{states}, not {bits}")
    exact *= per_state
    sums = [int(exact * step) for step in range(exact.denominator + 1)]
    return tuple(after - before for before, after in pairwise(sums))


@dataclass(frozen=True)
class TrellisSpec:
    """A trellis code for tiles of one shape.

    Attributes:
        state_bits: L, 8 to 16; search costs ``2**L`` a weight, decoding does not depend on it.
        rates: new bits of each step, repeated over the tile: up to eight integers 1..8, at most L. A step has two
            weights where the codebook has.
        tile_rows: rows of a tile.
        tile_cols: columns of a tile.
        codebook: the identifier of the computed codebook, with its version.
        row_factors: whether every row of the matrix has a factor of its own beside the matrix's scale.

    Raises:
        ConfigError: if the fields do not make a code.
    """

    state_bits: int = 12
    rates: tuple[int, ...] = (2,)
    tile_rows: int = 16
    tile_cols: int = 16
    codebook: str = CODEBOOK_ID
    row_factors: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))
        if not 8 <= self.state_bits <= 16:
            raise ConfigError(f"state_bits must be 8 to 16, not {self.state_bits}")
        if not 1 <= len(self.rates) <= 8 or not all(1 <= k <= 8 for k in self.rates):
            raise ConfigError(f"rates must be one to eight integers from 1 to 8, not {self.rates}")
        if min(self.tile_rows, self.tile_cols) < 1:
            raise ConfigError(f"a tile of {self.tile_rows} x {self.tile_cols} is empty")
        if self.codebook not in PER_STATE:
            raise ConfigError(f"unknown codebook {self.codebook!r}.{nearest(self.codebook, list(PER_STATE))}")
        if self.tile_cols % self.per_state:
            raise ConfigError(
                f"tile_cols = {self.tile_cols}: a state of {self.codebook} has two adjacent weights"
            )
        if self.steps % len(self.rates):
            raise ConfigError(f"{self.steps} steps a tile are not a multiple of the pattern {self.rates}")
        if self.bits_per_tile < self.state_bits:
            raise ConfigError(
                f"a tile of {self.bits_per_tile} bits is shorter than its state of {self.state_bits} bits: "
                "use larger tiles or fewer state bits"
            )
        if not isinstance(self.row_factors, bool):
            raise ConfigError(f"row_factors must be true or false, not {self.row_factors!r}")

    @property
    def book(self) -> Codebook:
        """The constants of the codebook."""
        return codebook(self.state_bits, self.codebook)

    @property
    def per_state(self) -> int:
        """Weights of a state: 1 or 2."""
        return PER_STATE[self.codebook]

    @property
    def weights(self) -> int:
        """Weights of a tile."""
        return self.tile_rows * self.tile_cols

    @property
    def steps(self) -> int:
        """States of a tile, T."""
        return self.weights // self.per_state

    @property
    def bits_per_tile(self) -> int:
        """Bits of a tile before padding to bytes, n."""
        return sum(self.rates) * (self.steps // len(self.rates))

    @property
    def bytes_per_tile(self) -> int:
        """Stored bytes of a tile."""
        return -(-self.bits_per_tile // 8)

    @property
    def bits_per_coefficient(self) -> float:
        """Stored bits per coefficient of a full tile, byte padding included."""
        return 8 * self.bytes_per_tile / self.weights

    @property
    def gain(self) -> float:
        """Best scale of the codebook for a unit Gaussian: encode ``x / gain``, multiply the values by it.

        Below 1 at one bit, where the best reproduction has less variance than the source; above 1 from two
        bits on, where the codebook's short tails (3.45 deviations) matter. Measured at L = 12 and 16: it
        takes 2 % off the error at 1 and 3 bits, 5 % at 4, nothing at 2. Of two weights a state, whose tails are
        shorter still (2.45 deviations), 1 % at 2 bits and 13 % at 3. Fold it into the row scales.
        """
        return _interpolate(_GAINS[self.per_state], self.rate)

    @property
    def rate(self) -> float:
        """Bits per coefficient, byte padding left out."""
        return sum(self.rates) / (len(self.rates) * self.per_state)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Place of the lowest bit of each step's state in the tile's integer."""
        pattern = self.rates * (self.steps // len(self.rates))
        return tuple(self.bits_per_tile - end for end in accumulate(pattern))

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Return how many tiles cover a matrix, down and across."""
        return -(-rows // self.tile_rows), -(-cols // self.tile_cols)

    def matrix_bytes(self, rows: int, cols: int) -> int:
        """Return the bytes of a coded matrix, the padding of its last tiles included."""
        down, across = self.grid(rows, cols)
        return down * across * self.bytes_per_tile

    def to_dict(self) -> dict[str, object]:
        """Return a plain dictionary, fit for JSON; ``row_factors`` only where there are some."""
        data = {**asdict(self), "rates": list(self.rates)}
        return data if self.row_factors else {k: v for k, v in data.items() if k != "row_factors"}

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> TrellisSpec:
        """Read what ``to_dict`` wrote.

        Raises:
            ConfigError: for an unknown key (with a suggestion), a value of the wrong type, or one out of
            range.
        """
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(f"unknown trellis setting {key!r}.{nearest(key, known)}")
        try:
            return cls(**data)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"trellis settings of the wrong type: {data}") from error


def _split(spec: TrellisSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return byte index and bit shift of every step's lowest bit."""
    offsets = torch.tensor(spec.offsets, dtype=torch.int64, device=device)
    return offsets // 8, offsets % 8


def pack_states(states: Int[Tensor, "tiles steps"], spec: TrellisSpec) -> UInt8[Tensor, " bytes"]:
    """Pack the paths of tiles into bytes; see the module's text for the layout.

    Args:
        states: tail-biting paths, as ``encode_tiles`` returns them.
        spec: the trellis.

    Returns:
        ``(B * spec.bytes_per_tile,)`` uint8, new, on the device of ``states``.

    Raises:
        ConfigError: if the shape does not fit, or the states are not a tail-biting path of this trellis.
    """
    if states.ndim != 2 or states.shape[1] != spec.steps:
        raise ConfigError(f"states of shape {tuple(states.shape)} do not fit tiles of {spec.steps} steps")
    index, shift = _split(spec, states.device)
    rates = torch.tensor(spec.rates * (spec.steps // len(spec.rates)), device=states.device)
    fresh = (states & ((1 << rates) - 1)).to(torch.int64) << shift
    data = torch.zeros((len(states), spec.bytes_per_tile + 1), dtype=torch.int64, device=states.device)
    data.index_add_(1, index, fresh & 255)
    data.index_add_(1, index + 1, fresh >> 8)
    packed = data[:, :-1].to(torch.uint8).flatten()
    if not torch.equal(unpack_states(packed, spec, len(states)), states.to(torch.int32)):
        raise ConfigError("these states are not a tail-biting path of the trellis: they cannot be packed")
    return packed


def unpack_states(
    packed: UInt8[Tensor, " bytes"], spec: TrellisSpec, num_tiles: int
) -> Int[Tensor, "tiles steps"]:
    """Return the states of packed tiles, int32; the inverse of ``pack_states``.

    Raises:
        ConfigError: if the number of bytes is not that of ``num_tiles`` tiles.
    """
    if packed.numel() != num_tiles * spec.bytes_per_tile:
        raise ConfigError(
            f"{packed.numel()} bytes are not {num_tiles} tiles of {spec.bytes_per_tile} bytes each"
        )
    mask = (1 << spec.state_bits) - 1
    ring = torch.zeros((num_tiles, spec.bytes_per_tile + 4), dtype=torch.int32, device=packed.device)
    ring[:, : spec.bytes_per_tile] = packed.reshape(num_tiles, spec.bytes_per_tile)
    whole, rest = divmod(spec.bits_per_tile, 8)
    repeat = (
        (ring[:, 0] | ring[:, 1] << 8 | ring[:, 2] << 16) & mask
    ) << rest  # the low bits again, above the top
    for i in range(3):
        ring[:, whole + i] |= repeat >> (8 * i) & 255
    index, shift = _split(spec, packed.device)
    window = ring[:, index] | ring[:, index + 1] << 8 | ring[:, index + 2] << 16
    return (window >> shift.to(torch.int32)) & mask


def decode_tiles(
    packed: UInt8[Tensor, " bytes"], spec: TrellisSpec, num_tiles: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "tiles weights"]:
    """Return the values of packed tiles: ``decode_states(unpack_states(...))``, bit for bit on every device.

    Raises:
        ConfigError: if the number of bytes does not fit.
    """
    return decode_states(unpack_states(packed, spec, num_tiles), spec.state_bits, dtype, spec.codebook)


def tiles_from_matrix(
    matrix: Float[Tensor, "rows cols"], spec: TrellisSpec
) -> Float[Tensor, "tiles weights"]:
    """Cut a matrix into tiles, row-major over the grid and within a tile; pad the last ones with zeros.

    Raises:
        ConfigError: if ``matrix`` is not two-dimensional.
    """
    if matrix.ndim != 2:
        raise ConfigError(f"tiles are cut from a matrix, not from shape {tuple(matrix.shape)}")
    down, across = spec.grid(*matrix.shape)
    padded = matrix.new_zeros((down * spec.tile_rows, across * spec.tile_cols))
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = padded.reshape(down, spec.tile_rows, across, spec.tile_cols).transpose(1, 2)
    return blocks.reshape(down * across, spec.weights)


def matrix_from_tiles(
    tiles: Float[Tensor, "tiles weights"], rows: int, cols: int, spec: TrellisSpec
) -> Float[Tensor, "rows cols"]:
    """Put tiles together again and drop the padding; the inverse of ``tiles_from_matrix``.

    Raises:
        ConfigError: if the tiles do not cover a ``rows x cols`` matrix.
    """
    down, across = spec.grid(rows, cols)
    if tiles.shape != (down * across, spec.weights):
        raise ConfigError(f"tiles of shape {tuple(tiles.shape)} do not make a {rows} x {cols} matrix")
    blocks = tiles.reshape(down, across, spec.tile_rows, spec.tile_cols).transpose(1, 2)
    return blocks.reshape(down * spec.tile_rows, across * spec.tile_cols)[:rows, :cols]
