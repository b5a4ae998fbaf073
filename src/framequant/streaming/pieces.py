"""A model's tensors as pieces of stored ones: which parts of which tensors of the files, put together how.

A ``Piece`` is a description; nothing is read before ``read``, and then only the bytes that it names. ``select`` and
``narrow`` of a description are pushed down to what is stored, so one expert of a stack costs one expert's bytes.

Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


class PiecesError(ValueError):
    """Pieces that do not fit together; the message names their keys and shapes."""


@dataclass(frozen=True)
class Stored:
    """A part of a stored tensor.

    Attributes:
        key: in the files.
        window: for each axis of the stored tensor a range (start, stop), or one index, which takes the axis away.
        whole: shape of the stored tensor.
    """

    key: str
    window: tuple[int | tuple[int, int], ...]
    whole: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(part[1] - part[0] for part in self.window if isinstance(part, tuple))

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the stored tensor."""
        return self.window == tuple((0, size) for size in self.whole)

    @property
    def index(self) -> tuple[int | slice, ...]:
        """What to index the stored tensor with."""
        return tuple(slice(*part) if isinstance(part, tuple) else part for part in self.window)


@dataclass(frozen=True)
class Joined:
    """Pieces one after the other along an axis; along a new one if ``new``."""

    parts: tuple[Piece, ...]
    axis: int
    new: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permuted:
    """A piece with its axes in another order: axis i is axis ``order[i]`` of ``source``."""

    source: Piece
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the new order."""
        return tuple(self.source.shape[axis] for axis in self.order)


Piece = Stored | Joined | Permuted


def stored(key: str, shape: Sequence[int]) -> Stored:
    """A whole tensor of the files."""
    return Stored(key, tuple((0, size) for size in shape), tuple(shape))


def stack(parts: Sequence[Piece], axis: int = 0) -> Piece:
    """``torch.stack``.

    Raises:
        PiecesError: shapes differ, or there is nothing to stack.
    """
    first = _alike(parts, None)
    axis %= len(first) + 1
    return Joined(tuple(parts), axis, True, (*first[:axis], len(parts), *first[axis:]))


def cat(parts: Sequence[Piece], axis: int = 0) -> Piece:
    """``torch.cat``.

    Raises:
        PiecesError: shapes differ elsewhere than along the axis, or there is nothing to join.
    """
    first = _alike(parts, axis)
    axis %= len(first)
    total = sum(part.shape[axis] for part in parts)
    return Joined(tuple(parts), axis, False, (*first[:axis], total, *first[axis + 1 :]))


def _alike(parts: Sequence[Piece], free: int | None) -> tuple[int, ...]:
    """The first piece's shape; the others' may differ from it along the axis ``free``."""
    if not parts:
        raise PiecesError("no tensors to put together")
    first = parts[0].shape
    for part in parts[1:]:
        same = len(part.shape) == len(first) and all(
            a == b
            for axis, (a, b) in enumerate(zip(first, part.shape, strict=True))
            if free is None or axis != free % len(first)
        )
        if not same:
            raise PiecesError(f"{_name(part)} is {part.shape}, and {_name(parts[0])} is {first}")
    return first


def _name(piece: Piece) -> str:
    names = list(dict.fromkeys(keys(piece)))
    return names[0] if len(names) == 1 else f"{names[0]} with {len(names) - 1} others"


def permute(piece: Piece, order: Sequence[int]) -> Piece:
    """``Tensor.permute``."""
    if isinstance(piece, Permuted):
        piece, order = piece.source, [piece.order[axis] for axis in order]
    return piece if list(order) == sorted(order) else Permuted(piece, tuple(order))


def transpose(piece: Piece, one: int, other: int) -> Piece:
    """``torch.transpose``."""
    order = list(range(len(piece.shape)))
    order[one], order[other] = order[other], order[one]
    return permute(piece, order)


def narrow(piece: Piece, axis: int, start: int, stop: int) -> Piece:
    """Entries ``start`` to ``stop`` along an axis."""
    axis %= len(piece.shape)
    if isinstance(piece, Permuted):
        return permute(narrow(piece.source, piece.order[axis], start, stop), piece.order)
    if isinstance(piece, Stored):
        window = list(piece.window)
        at, first = _axis_of(piece, axis)
        window[at] = first + start, first + stop
        return Stored(piece.key, tuple(window), piece.whole)
    if piece.axis != axis:
        inner = axis - (piece.new and axis > piece.axis)
        parts = [narrow(part, inner, start, stop) for part in piece.parts]
        return stack(parts, piece.axis) if piece.new else cat(parts, piece.axis)
    if piece.new:
        return stack(piece.parts[start:stop], axis)
    found = [
        narrow(part, axis, max(start - begin, 0), min(stop, end) - begin)
        for part, begin, end in _bounds(piece)
        if start < end and stop > begin
    ]
    return found[0] if len(found) == 1 else cat(found, axis)


def select(piece: Piece, axis: int, index: int) -> Piece:
    """One entry along an axis, which goes away."""
    axis %= len(piece.shape)
    if isinstance(piece, Permuted):
        gone = piece.order[axis]
        rest = [other - (other > gone) for other in piece.order if other != gone]
        return permute(select(piece.source, gone, index), rest)
    if isinstance(piece, Stored):
        window = list(piece.window)
        at, first = _axis_of(piece, axis)
        window[at] = first + index
        return Stored(piece.key, tuple(window), piece.whole)
    if piece.axis == axis:
        if piece.new:
            return piece.parts[index]
        part, begin = next((part, begin) for part, begin, end in _bounds(piece) if begin <= index < end)
        return select(part, axis, index - begin)
    inner = axis - (piece.new and axis > piece.axis)
    parts = [select(part, inner, index) for part in piece.parts]
    left = piece.axis - (axis < piece.axis)
    return stack(parts, left) if piece.new else cat(parts, left)


def _axis_of(piece: Stored, axis: int) -> tuple[int, int]:
    """Where an axis of a part is in the stored tensor, and where the part begins there."""
    there = [(at, part[0]) for at, part in enumerate(piece.window) if isinstance(part, tuple)]
    return there[axis]


def _bounds(piece: Joined) -> Iterator[tuple[Piece, int, int]]:
    """The parts of a concatenation, and where each begins and ends."""
    ends = list(accumulate(part.shape[piece.axis] for part in piece.parts))
    return zip(piece.parts, [0, *ends], ends, strict=False)


def leaves(piece: Piece) -> Iterator[Stored]:
    """The stored parts that a piece is made of, in order."""
    if isinstance(piece, Stored):
        yield piece
    else:
        for part in piece.parts if isinstance(piece, Joined) else (piece.source,):
            yield from leaves(part)


def keys(piece: Piece) -> Iterator[str]:
    """Keys of the stored parts, in order."""
    return (leaf.key for leaf in leaves(piece))


def read(piece: Piece, fetch: Callable[[Stored], Tensor]) -> Tensor:
    """The tensor that a piece describes, contiguous.

    Args:
        piece: what to read.
        fetch: reads a part of a stored tensor, onto whatever device the rest is to be done.
    """
    if isinstance(piece, Stored):
        return fetch(piece).contiguous()
    if isinstance(piece, Permuted):
        return read(piece.source, fetch).permute(piece.order).contiguous()
    parts = [read(part, fetch) for part in piece.parts]
    return torch.stack(parts, piece.axis) if piece.new else torch.cat(parts, piece.axis)
