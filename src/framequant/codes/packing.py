"""The byte layout of every scalar code: from ``uint8`` codes to the bytes of the file, and back.

A row of codes becomes one little-endian bit stream, padded with zeros to whole bytes: bit ``t`` of the row is
bit ``t % 8`` of byte ``t // 8``. The stream consists of *words* of equal width.

* ``num_levels`` a power of two, ``2**b``: each code is one word of ``b`` bits (1 to 8).
* any other count ``n`` up to 255: each word of ``b`` bits holds ``g`` codes as the mixed-radix integer
  ``code[0] + code[1] * n + ... + code[g-1] * n**(g-1)``; the last word of a row is filled with zero codes.
  The pair ``(g, b)`` is computed, see ``word_shape``; up to 16 levels:

  ======  ===  ===  ====================  =========
  levels    g    b  bits of storage/code  log2(n)
  ======  ===  ===  ====================  =========
       3    5    8                1.6000     1.5850
       5    3    7                2.3333     2.3219
       6    5   13                2.6000     2.5850
       7    6   17                2.8333     2.8074
       9    5   16                3.2000     3.1699
      10    3   10                3.3333     3.3219
      11    2    7                3.5000     3.4594
      12    5   18                3.6000     3.5850
      13    4   15                3.7500     3.7004
      14    6   23                3.8333     3.8074
      15    1    4                4.0000     3.9069
  ======  ===  ===  ====================  =========

The layout does not depend on the device or on the byte order of the machine. This module knows nothing of
scales and imports only torch and our errors.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from framequant.errors import CheckpointError, ConfigError

_MAX_WORD_BITS = 24
_TOLERATED_EXCESS = 0.02


def word_shape(num_levels: int) -> tuple[int, int]:
    """Return how many codes share one word, and the width of that word in bits.

    Powers of two give ``(1, log2 n)``. Otherwise the narrowest word of at most 24 bits whose cost per code is
    within 2 % of ``log2 n``; where none is (15 levels), the narrowest of the cheapest.

    Args:
        num_levels: Number of code values, 2 to 256.

    Returns:
        The pair ``(g, b)``, with ``num_levels**g <= 2**b``.

    Raises:
        ConfigError: ``num_levels`` has no layout.
    """
    if num_levels not in range(2, 257):
        raise ConfigError(f"num_levels={num_levels} has no byte layout; use 2 to 256 levels.")
    if num_levels.bit_count() == 1:
        return 1, num_levels.bit_length() - 1
    shapes = [(_codes_per_word(num_levels, b), b) for b in range(2, _MAX_WORD_BITS + 1)]
    shapes = [(g, b) for g, b in shapes if g > 0]
    limit = math.log2(num_levels) * (1 + _TOLERATED_EXCESS)
    return next(((g, b) for g, b in shapes if b / g <= limit), min(shapes, key=lambda s: s[1] / s[0]))


def _codes_per_word(num_levels: int, width: int) -> int:
    """Return the largest g with ``num_levels**g <= 2**width``, in exact integers."""
    count = 0
    while num_levels ** (count + 1) <= 2**width:
        count += 1
    return count


def storage_bits(num_levels: int) -> float:
    """Return the bits of storage that one code costs, padding of the row aside.

    Args:
        num_levels: Number of code values.

    Returns:
        ``b / g`` in bits, at least ``log2(num_levels)``.

    Raises:
        ConfigError: ``num_levels`` has no layout.

    Examples:
        >>> storage_bits(4), storage_bits(3)
        (2.0, 1.6)
    """
    group, width = word_shape(num_levels)
    return width / group


def bytes_per_row(cols: int, num_levels: int) -> int:
    """Return the number of bytes of one packed row.

    Args:
        cols: Codes in the row, 0 or more.
        num_levels: Number of code values.

    Returns:
        The number of bytes, rounded up.

    Raises:
        ConfigError: ``num_levels`` has no layout, or ``cols`` is negative.

    Examples:
        >>> bytes_per_row(9, 4), bytes_per_row(5, 3)
        (3, 1)
    """
    if cols < 0:
        raise ConfigError(f"cols={cols} is negative; give the number of codes in a row.")
    group, width = word_shape(num_levels)
    return -(-(-(-cols // group) * width) // 8)


def pack_codes(codes: UInt8[Tensor, "rows cols"], num_levels: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack codes into the bytes of the file.

    Args:
        codes: The codes, each below ``num_levels``.
        num_levels: Number of code values.

    Returns:
        A new tensor of ``bytes_per_row(cols, num_levels)`` bytes a row, on the device of ``codes``.

    Raises:
        ConfigError: ``num_levels`` has no layout, ``codes`` is no uint8 matrix, or a code is too large.

    Examples:
        >>> pack_codes(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[228]], dtype=torch.uint8)
    """
    group, width = word_shape(num_levels)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ConfigError(
            f"pack_codes needs a uint8 matrix (rows, cols), got {codes.dtype} of shape {tuple(codes.shape)}."
        )
    if codes.numel() and int(codes.max()) >= num_levels:
        raise ConfigError(f"A code is {int(codes.max())}, but {num_levels} levels end at {num_levels - 1}.")
    size = bytes_per_row(codes.shape[1], num_levels)
    return _words_to_bytes(_join(codes, num_levels, group, width), width)[:, :size].contiguous()


def unpack_codes(
    packed_codes: UInt8[Tensor, "rows bytes"], num_levels: int, cols: int
) -> UInt8[Tensor, "rows cols"]:
    """Recover the codes from the bytes of the file; the inverse of ``pack_codes``.

    Args:
        packed_codes: What ``pack_codes`` returned.
        num_levels: Number of code values.
        cols: Codes in a row.

    Returns:
        A new contiguous tensor of codes, each below ``num_levels``, on the same device.

    Raises:
        ConfigError: ``num_levels`` has no layout, or ``cols`` is negative.
        CheckpointError: Not a uint8 matrix, another number of bytes a row, or a word that encodes no codes.

    Cost:
        Beside the result, one byte per code where the words have at most eight bits (less for 1 and 2 bits),
        and up to four bytes per word otherwise. Level counts that are no power of two read one scalar back
        from the device to check the words.
    """
    group, width = word_shape(num_levels)
    size = bytes_per_row(cols, num_levels)
    if packed_codes.dtype != torch.uint8 or packed_codes.ndim != 2 or packed_codes.shape[1] != size:
        raise CheckpointError(
            f"Packed codes of {cols} columns and {num_levels} levels are a uint8 matrix with {size} bytes a "
            f"row, got {packed_codes.dtype} of shape {tuple(packed_codes.shape)}; the file is truncated, or "
            "its configuration belongs to another."
        )
    words = _bytes_to_words(packed_codes, width)[:, : -(-cols // group)]
    if num_levels.bit_count() != 1 and words.numel() and int(words.max()) >= num_levels**group:
        raise CheckpointError(
            f"A word of the packed codes is {int(words.max())}, but {group} codes of {num_levels} levels end "
            f"at {num_levels**group - 1}; the file is damaged, or was packed with another number of levels."
        )
    return _split(words, num_levels, group)[:, :cols].contiguous()


def _join(codes: Tensor, num_levels: int, group: int, width: int) -> Integer[Tensor, "rows words"]:
    """Merge every ``group`` codes of a row into one mixed-radix word, the first code least significant."""
    if group == 1:
        return codes
    digits = pad(codes, (0, -codes.shape[1] % group)).unflatten(1, (-1, group)).to(_word_dtype(width))
    words = digits[..., group - 1]
    for position in range(group - 2, -1, -1):
        words = words * num_levels + digits[..., position]
    return words


def _split(words: Tensor, num_levels: int, group: int) -> UInt8[Tensor, "rows codes"]:
    """Undo ``_join``; the zero codes that filled the last word come out as well."""
    if group == 1:
        return words
    codes = torch.empty((*words.shape, group), dtype=torch.uint8, device=words.device)
    for position in range(group):
        rest = words.div(num_levels, rounding_mode="floor")
        codes[..., position] = words - rest * num_levels
        words = rest
    return codes.flatten(1)


def _word_dtype(width: int) -> torch.dtype:
    """Return the narrowest dtype in which the shifts below lose no bit of a word."""
    return torch.uint8 if width <= 8 else torch.int32


def _overlaps(width: int) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Return the period of the bit stream and which of its words and bytes share bits.

    Returns:
        Words per period, bytes per period, and the triples (word, byte, shift): the first bit of the byte is
        bit ``shift`` of the word, with ``-8 < shift < width``.
    """
    period = math.lcm(8, width)
    pairs = [(w, b, 8 * b - width * w) for w in range(period // width) for b in range(period // 8)]
    return period // width, period // 8, [pair for pair in pairs if -8 < pair[2] < width]


def _shift_left(values: Tensor, bits: int) -> Tensor:
    """Shift by a number of bits of either sign; shifting by none makes no copy."""
    if bits == 0:
        return values
    return values << bits if bits > 0 else values >> -bits


def _words_to_bytes(words: Integer[Tensor, "rows words"], width: int) -> UInt8[Tensor, "rows bytes"]:
    """Lay words of ``width`` bits end to end, whole periods of them."""
    words_per_period, bytes_per_period, overlaps = _overlaps(width)
    source = pad(words, (0, -words.shape[1] % words_per_period)).unflatten(1, (-1, words_per_period))
    out = torch.zeros((*source.shape[:2], bytes_per_period), dtype=torch.uint8, device=words.device)
    for word, byte, shift in overlaps:
        out[..., byte] |= (_shift_left(source[..., word], -shift) & 0xFF).to(torch.uint8)
    return out.flatten(1)


def _bytes_to_words(packed: UInt8[Tensor, "rows bytes"], width: int) -> Integer[Tensor, "rows words"]:
    """Cut a bit stream into words of ``width`` bits, whole periods of them."""
    words_per_period, bytes_per_period, overlaps = _overlaps(width)
    source = pad(packed, (0, -packed.shape[1] % bytes_per_period)).unflatten(1, (-1, bytes_per_period))
    dtype = _word_dtype(width)
    out = torch.empty((*source.shape[:2], words_per_period), dtype=dtype, device=packed.device)
    for word in range(words_per_period):
        parts = [_shift_left(source[..., b].to(dtype), shift) for w, b, shift in overlaps if w == word]
        total = parts[0]
        for part in parts[1:]:
            total = total | part
        torch.bitwise_and(total, 2**width - 1, out=out[..., word])
    return out.flatten(1)
