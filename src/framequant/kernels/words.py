"""Stored codes as the words that the product kernels read: one pass over the bytes on their device, at load.

Only the arrangement changes: rows are padded to whole 32-byte sectors, and the words of a trellis tile, half as many
as a row of it has bits, stand one below the other, so that words of adjacent tiles are adjacent. The result replaces
the stored bytes in memory; ``stored_bytes`` gives them back for saving. Must not import layers; imports no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from framequant.codes.grid import GridSpec, ZeroPoint
from framequant.codes.packing import bytes_per_row, word_shape
from framequant.codes.trellis import TrellisSpec
from framequant.kernels.packed_words import from_planes, to_planes
from framequant.spec import LinearSpec

SECTOR = 32  # bytes; rows start at a multiple of it
#: The digit of a weight that has no new bits, as the one before it, in the same state, has them: no rate.
SAME_STATE = 9


@dataclass(frozen=True)
class WordLayout:
    """How a coefficient matrix lies in words.

    Attributes:
        trellis: whether a row of words holds words of adjacent tiles.
        bits: bits of a scalar code, or of several that are one number; state bits of a trellis.
        codes_per_word: coefficients of one word, unit of planes, or tile, in one row.
        words: words of a row, or of a plane of a row.
        stride: words from one row, or plane, to the next, padding included.
        multiplier: of the trellis codebook.
        addend: of the trellis codebook.
        pattern: rates of a trellis' weights, one hexadecimal digit each, the first one's lowest (``digits``).
        tile_words: rows of words for sixteen rows of coefficients, of a trellis.
        levels: of a scalar code.
        planes: words of a unit of scalar codes (``packed_words``).
        factor: value of one level, before the stored scale.
        per_state: weights of a trellis' state; 0 for scalar codes.
    """

    trellis: bool
    bits: int
    codes_per_word: int
    words: int
    stride: int
    multiplier: int = 0
    addend: int = 0
    pattern: int = 0
    tile_words: int = 16
    levels: int = 0
    planes: int = 1
    factor: float = 1.0
    per_state: int = 0

    @property
    def in_lanes(self) -> bool:
        """Whether the kernel of one token through registers alone knows the code."""
        if self.per_state == 2:
            return self.bits == 16 and self.pattern == 16 * SAME_STATE + 4
        return self.pattern == 2 if self.trellis else self.planes == 1

    @property
    def is_two_bits(self) -> bool:
        """Whether codes are scalar, of four levels."""
        return not self.trellis and self.planes == 1 and self.levels == 4

    @property
    def length(self) -> int:
        """Words of a row, or of a plane, that meet coefficients.

        Those of a trellis and of planes include what fills up: zeros, which keep the coefficients of adjacent words,
        too, at multiples of 16 bytes.
        """
        return self.stride if self.trellis or self.planes > 1 else self.words

    def rows(self, words: int) -> int:
        """Rows of coefficients, padding included, that so many rows of words hold."""
        return words * 16 // self.tile_words


def word_layout(spec: LinearSpec) -> WordLayout | None:
    """Return the layout for a linear's codes, or None where the kernels do not cover them.

    Covered: uniform grids of 3, 5 and ``2**b`` levels, symmetric, one scale a row or a tensor, and trellises with tiles
    of 16 columns and 16 rows, of all rates of one weight a state and of multiples of 1/8 bit of two.
    """
    cols, code = spec.coefficient_shape[1], spec.code
    if isinstance(code, GridSpec):
        uniform = code.is_uniform and code.zero_point is ZeroPoint.SYMMETRIC and code.group_size is None
        return _scalar_layout(code.num_levels, cols) if uniform else None
    if not isinstance(code, TrellisSpec) or (code.tile_rows, code.tile_cols) != (16, 16):
        return None
    if len(code.rates) * code.per_state > 8:  # longer than half a row, or a tile is no whole words
        return None
    words, book = -(-cols // 16), code.book
    return WordLayout(
        True, code.state_bits, 16, words, _padded(words, 4), book.multiplier, book.addend,
        pattern=digits(code),
        tile_words=code.bytes_per_tile // 4, factor=book.scale, per_state=code.per_state,
    )  # fmt: skip


def digits(code: TrellisSpec) -> int:
    """The rates of a trellis' weights, one hexadecimal digit each, the first one's lowest, as kernels take them.

    Examples:
        >>> hex(digits(TrellisSpec(12, (2, 3)))), hex(digits(TrellisSpec(16, (4,), codebook="bytepair-1")))
        ('0x32', '0x94')
    """
    rates = [digit for rate in code.rates for digit in (rate, SAME_STATE)[: code.per_state]]
    return sum(digit << (4 * place) for place, digit in enumerate(rates))


def _scalar_layout(levels: int, cols: int) -> WordLayout | None:
    codes, bits = word_shape(levels)
    if levels in (2, 4, 16):
        words = -(-cols * bits // 16)
        return WordLayout(
            False, bits, 16 // bits, words, _padded(words, 2), levels=levels, factor=float(levels)
        )
    if codes > 1 and levels not in (3, 5):
        return None
    words = -(-cols // (16 * codes))
    stride = -(-words // 8) * 8  # planes begin at multiples of 16 bytes: for 5 levels a sector is 768 weights
    factor = float(levels) if codes == 1 else 8.0
    return WordLayout(False, bits, 16 * codes, words, stride, levels=levels, planes=bits, factor=factor)


def _padded(words: int, size: int) -> int:
    per_sector = SECTOR // size
    return -(-words // per_sector) * per_sector


def to_words(packed: UInt8[Tensor, ...], spec: LinearSpec, layout: WordLayout) -> Int[Tensor, "rows stride"]:
    """Arrange stored bytes as words.

    Args:
        packed: the stored ``packed_codes``.
        spec: the linear's spec.
        layout: ``word_layout(spec)``.

    Returns:
        A new tensor on the same device: int16 for scalar codes; int32 for a trellis, ``tile_words`` rows for each row
        of tiles.
    """
    if layout.planes > 1:
        return to_planes(packed, layout.bits, layout.stride)
    if not layout.trellis:
        bytes_ = torch.zeros((packed.shape[0], 2 * layout.stride), dtype=torch.uint8, device=packed.device)
        bytes_[:, : packed.shape[1]] = packed
        return bytes_.view(torch.int16)
    down, height = packed.shape[0], layout.tile_words
    tiles = packed.contiguous().view(torch.int32).view(down, layout.words, height)
    words = torch.zeros((down, height, layout.stride), dtype=torch.int32, device=packed.device)
    words[:, :, : layout.words] = tiles.transpose(1, 2)
    return words.view(down * height, layout.stride)


def row_shifts(layout: WordLayout, device: torch.device | str) -> Int[Tensor, " 16"] | None:
    """Where each of a tile's sixteen rows has its lowest bit within a word, int32; None for scalar codes."""
    if not layout.trellis:
        return None
    lowest = 2 * layout.tile_words * torch.arange(15, -1, -1, dtype=torch.int32)
    return (lowest % 32).to(device)


def stored_bytes(
    words: Int[Tensor, "rows stride"], spec: LinearSpec, layout: WordLayout
) -> UInt8[Tensor, ...]:
    """Give the stored bytes back; the inverse of ``to_words``, bit for bit."""
    if not layout.trellis:
        size = bytes_per_row(spec.coefficient_shape[1], spec.code.num_levels)
        if layout.planes > 1:
            return from_planes(words, layout.bits, layout.stride, size)
        return words.view(torch.uint8)[:, :size].contiguous()
    down = len(words) // layout.tile_words
    tiles = words.view(down, layout.tile_words, layout.stride)[:, :, : layout.words].transpose(1, 2)
    return tiles.contiguous().view(down, -1).view(torch.uint8)
