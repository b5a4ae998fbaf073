"""Stored codes as the words that the product kernels read: one pass over the bytes on their device, at load.

Only the arrangement changes: rows are padded to whole 32-byte sectors, and the words of a trellis tile are dealt
out to the tile's rows. The result replaces the stored bytes in memory; ``stored_bytes`` gives them back for
saving. Must not import layers; imports no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from framequant.codes.grid import GridSpec, ZeroPoint
from framequant.codes.packing import bytes_per_row
from framequant.codes.trellis import TrellisSpec
from framequant.codes.trellis_codebook import codebook
from framequant.spec import LinearSpec

SECTOR = 32  # bytes; rows start at a multiple of it


@dataclass(frozen=True)
class WordLayout:
    """How a coefficient matrix lies in words.

    Attributes:
        trellis: whether a word holds trellis steps, and the word above is needed too.
        bits: bits of a scalar code; state bits of a trellis.
        codes_per_word: coefficients of one word, in one row.
        words: words of a row.
        stride: words from one row to the next, padding included.
        multiplier: of the trellis codebook.
        addend: of the trellis codebook.
        factor: value of one level, before the stored scale.
    """

    trellis: bool
    bits: int
    codes_per_word: int
    words: int
    stride: int
    multiplier: int = 0
    addend: int = 0
    factor: float = 1.0


def word_layout(spec: LinearSpec) -> WordLayout | None:
    """Return the layout for a linear's codes, or None where the kernels do not cover them.

    Covered: uniform grids of 2, 4, 16 levels, symmetric, one scale a row or a tensor, and trellises of two
    bits a weight with tiles of 16 columns and 16 rows.
    """
    cols, code = spec.coefficient_shape[1], spec.code
    if isinstance(code, GridSpec):
        uniform = code.is_uniform and code.zero_point is ZeroPoint.SYMMETRIC and code.group_size is None
        if not uniform or code.num_levels not in (2, 4, 16):
            return None
        bits = code.num_levels.bit_length() - 1
        words = -(-cols * bits // 16)
        return WordLayout(False, bits, 16 // bits, words, _padded(words, 2), factor=float(code.num_levels))
    if not isinstance(code, TrellisSpec) or code.row_factors:
        return None
    if set(code.rates) != {2} or (code.tile_rows, code.tile_cols) != (16, 16):
        return None
    words, book = -(-cols // 16), codebook(code.state_bits)
    return WordLayout(
        True, code.state_bits, 16, words, _padded(words, 4), book.multiplier, book.addend, book.scale
    )


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
        A new tensor on the same device: int16 for scalar codes, int32 for a trellis, whose padding rows are kept.
    """
    if not layout.trellis:
        bytes_ = torch.zeros((packed.shape[0], 2 * layout.stride), dtype=torch.uint8, device=packed.device)
        bytes_[:, : packed.shape[1]] = packed
        return bytes_.view(torch.int16)
    down, across = packed.shape[0], layout.words
    tiles = packed.contiguous().view(torch.int32).view(down, across, 16)
    words = torch.zeros((down, 16, layout.stride), dtype=torch.int32, device=packed.device)
    words[:, :, :across] = tiles.flip(2).transpose(1, 2)
    return words.view(down * 16, layout.stride)


def stored_bytes(
    words: Int[Tensor, "rows stride"], spec: LinearSpec, layout: WordLayout
) -> UInt8[Tensor, ...]:
    """Give the stored bytes back; the inverse of ``to_words``, bit for bit."""
    if not layout.trellis:
        size = bytes_per_row(spec.coefficient_shape[1], spec.code.num_levels)
        return words.view(torch.uint8)[:, :size].contiguous()
    rows = words.shape[0]
    tiles = words.view(rows // 16, 16, layout.stride)[:, :, : layout.words].transpose(1, 2).flip(2)
    return tiles.contiguous().view(rows // 16, layout.words * 16).view(torch.uint8)
