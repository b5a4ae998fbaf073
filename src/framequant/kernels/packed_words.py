"""Scalar codes in words of 3, 5 ... bits as 16-bit words that no code straddles, and back: a permutation of bits.

The bits of a row are a stream of b-bit words (``codes/packing.py``), each one code or several digits. Sixteen of them
are a *unit* of b 16-bit words: each of these holds ``16 // b`` whole b-bit words, one above the other, and in the bits
that are left at its top one bit of each of the last ``16 % b`` b-bit words. So all but those are cut out by one shift
and one mask, of two 16-bit words at a time. The first words of all units of a row lie side by side, then the second
ones, and so on: planes.

Imports torch alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

ROWS_AT_A_TIME = 1024  # a bit takes a byte while it is moved


def source_bits(bits: int) -> list[tuple[int, int]]:
    """For every bit of a unit, plane by plane and lowest first, the b-bit word and the bit of it that it holds.

    Examples:
        >>> source_bits(7)[12:16]
        [(1, 5), (1, 6), (14, 0), (15, 0)]
    """
    whole = 16 // bits
    return [
        (plane * whole + place // bits, place % bits)
        if place < whole * bits
        else (bits * whole + place - bits * whole, plane)
        for plane in range(bits)
        for place in range(16)
    ]


def to_planes(packed: UInt8[Tensor, "rows bytes"], bits: int, stride: int) -> Int[Tensor, "rows words"]:
    """Arrange the bytes of rows as planes.

    Args:
        packed: the stored bytes.
        bits: b, of a word of the stream; no divisor of 16 but 8.
        stride: 16-bit words of a plane, units and what fills them up.

    Returns:
        A new int16 tensor (rows, bits * stride) on the same device; what fills up is 0.
    """
    order = torch.tensor([word * bits + bit for word, bit in source_bits(bits)], device=packed.device)
    parts = [_moved(part, bits, stride, order) for part in packed.split(ROWS_AT_A_TIME)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _moved(packed: Tensor, bits: int, stride: int, order: Tensor) -> Tensor:
    stream = torch.zeros((len(packed), stride * bits * 2), dtype=torch.uint8, device=packed.device)
    stream[:, : packed.shape[1]] = packed
    units = _apart(stream).view(len(packed), stride, 16 * bits)[:, :, order]
    planes = units.view(len(packed), stride, bits, 16).transpose(1, 2)
    return _together(planes.reshape(len(packed), -1)).view(torch.int16)


def from_planes(
    words: Int[Tensor, "rows words"], bits: int, stride: int, size: int
) -> UInt8[Tensor, "rows bytes"]:
    """Give the first ``size`` stored bytes of each row back; the inverse of ``to_planes``."""
    order = torch.tensor([word * bits + bit for word, bit in source_bits(bits)], device=words.device)
    inverse = torch.argsort(order)
    parts = []
    for part in words.split(ROWS_AT_A_TIME):
        planes = _apart(part.contiguous().view(torch.uint8)).view(len(part), bits, stride, 16)
        units = planes.transpose(1, 2).reshape(len(part), stride, 16 * bits)[:, :, inverse]
        parts.append(_together(units.reshape(len(part), -1))[:, :size])
    return torch.cat(parts).contiguous()


def _apart(bytes_: Tensor) -> Tensor:
    """The bits of bytes, lowest first, a byte each."""
    places = torch.arange(8, dtype=torch.uint8, device=bytes_.device)
    return (bytes_[..., None] >> places & 1).flatten(-2)


def _together(bits: Tensor) -> Tensor:
    """The bytes of bits, the inverse of ``_apart``."""
    worth = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * worth).sum(-1, dtype=torch.uint8)
