"""How transformers makes a model's tensors of those in its files, as pieces: the library's own conversions, traced.

transformers 5 renames keys on loading, and stacks, joins, transposes and splits tensors (``WeightConverter``). Its own
code is run here on stand-ins that take note of what is done with them, so no list of models is kept and nothing is
read. A conversion that does more than move numbers about is not understood, and its tensors have no piece.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from framequant.checkpoint import Header
from framequant.errors import ModelSourceError
from framequant.streaming import pieces
from framequant.streaming.pieces import Piece, PiecesError, stored


@dataclass
class Conversions:
    """What the files hold of a model's state.

    Attributes:
        pieces: by key of the state.
        unknown: keys of the state whose making was not understood, with the operations.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass
class _Target:
    """The stored tensors of one key of the state (of several, where a tensor is split), by the pattern they match."""

    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)


def convert(model: nn.Module, state: Mapping[str, Any], header: Header) -> Conversions:
    """Describe a model's tensors by those in its files, as ``from_pretrained`` would make them.

    Args:
        model: of transformers, on any device, its experts fused.
        state: its state's tensors.
        header: shape and dtype of every tensor of the files.

    Raises:
        ModelSourceError: tensors of one expert or several are missing, or shapes do not fit; keys are named.
    """
    found = Conversions()
    for name, target in _targets(model, state, header).items():
        if target.converter is None:
            key = next(iter(target.sources))
            found.pieces[name] = stored(key, header[key][0])
        else:
            _trace(name, target, model, state, header, found)
    return found


def _targets(model: nn.Module, state: Mapping[str, Any], header: Header) -> dict[str, _Target]:
    """Which stored tensors each key of the state is made of."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        changes = get_model_conversion_mapping(model)
    except (
        ImportError,
        TypeError,
        AttributeError,
    ):  # a transformers that does this otherwise: names as they are
        return {key: _Target(sources={key: [key]}) for key in header if key in state}
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    owners = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = getattr(model, "base_model_prefix", ""), dict(state)
    targets: dict[str, _Target] = {}
    for key in sorted(header, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in state and key in state:
            name, pattern = key, None
        if name in state:
            target = targets.setdefault(name, _Target(owners.get(pattern)))
            target.sources.setdefault(pattern or key, []).append(key)
    return targets


def _trace(
    name: str,
    target: _Target,
    model: nn.Module,
    state: Mapping[str, Any],
    header: Header,
    found: Conversions,
) -> None:
    """Run a conversion on stand-ins; ``found`` gets what comes out of it."""
    converter = copy.deepcopy(target.converter)
    for pattern, keys in target.sources.items():
        for key in keys:
            converter.add_tensor(name, key, pattern, _Traced(stored(key, header[key][0])))
    wanted = tuple(state[name].shape)
    try:
        results = converter.convert(name, model=model, config=getattr(model, "config", None))
        made = {key: _piece(value) for key, value in results.items()}
    except Exception as error:  # whatever an operation of the library raises on what it does not expect
        _require_all(name, target, wanted)
        if isinstance(error, PiecesError):
            raise ModelSourceError(
                f"{name} cannot be put together: {error}. A file of the float model is damaged or belongs to "
                "another model; fetch it again."
            ) from error
        found.unknown[name] = ", ".join(type(step).__name__ for step in converter.operations)
        return
    if name in made and made[name].shape != wanted:
        _require_all(name, target, wanted)
    found.pieces |= made


def _piece(value: Any) -> Piece:
    return (value[0] if isinstance(value, list) else value).piece


def _require_all(name: str, target: _Target, wanted: Sequence[int]) -> None:
    """Check that none of the numbered tensors that a stack is made of is missing.

    Raises:
        ModelSourceError: one is; it is named.
    """
    count = wanted[0] if len(wanted) == 3 else 0
    families = {pattern: _numbered(keys) for pattern, keys in target.sources.items() if "*" in pattern}
    numbers = {number for by_number in families.values() for number in by_number} | set(range(count))
    absent = []
    for pattern, by_number in families.items():
        if not by_number:
            continue
        some, key = next(iter(by_number.items()))
        absent += [_with(key, some, number) for number in sorted(numbers - set(by_number))]
        others = [other for other in target.converter.source_patterns if other not in families]
        absent += [_tail(key, pattern, other) for other in others]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ModelSourceError(
            f"the files hold no {', '.join(absent[:3])}{more}, of which {name} is made with others: the download is "
            "incomplete, or config.json belongs to another model. Fetch the float model again."
        )


def _numbered(keys: Sequence[str]) -> dict[int, str]:
    """Keys by the number in them that tells them apart; of a single one, the last number."""
    split = [key.split(".") for key in keys]
    places = [
        place
        for place, parts in enumerate(zip(*split, strict=False))
        if all(part.isdigit() for part in parts) and (len(keys) == 1 or len(set(parts)) > 1)
    ]
    return {int(parts[places[-1]]): key for parts, key in zip(split, keys, strict=True)} if places else {}


def _with(key: str, number: int, other: int) -> str:
    """A key with another number in place of its last ``number``."""
    before, _, behind = key.rpartition(f".{number}.")
    return f"{before}.{other}.{behind}"


def _tail(key: str, pattern: str, other: str) -> str:
    """A key that matches one pattern, changed to match another: what follows their asterisks is exchanged."""
    own, wanted = (text.rpartition("*")[2].replace("\\", "") for text in (pattern, other))
    return key.removesuffix(own) + wanted


class _Traced:
    """Stands for a tensor in a conversion, and knows the piece that it is."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.piece.shape)

    @property
    def ndim(self) -> int:
        return len(self.piece.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def contiguous(self) -> _Traced:
        return self

    def transpose(self, dim0: int, dim1: int) -> _Traced:
        return _transpose(self, dim0, dim1)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[_Traced, ...]:
        return _chunk(self, chunks, dim)

    def split(self, sizes: Any, dim: int = 0) -> tuple[_Traced, ...]:
        return _split(self, sizes, dim)

    def unbind(self, dim: int = 0) -> tuple[_Traced, ...]:
        return _unbind(self, dim)

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _UNDERSTOOD:
            raise TypeError(f"{func.__name__} does more than to move numbers about, or is not known here")
        return _UNDERSTOOD[func](*args, **(kwargs or {}))


def _stack(tensors: Iterable[_Traced], dim: int = 0) -> _Traced:
    return _Traced(pieces.stack([tensor.piece for tensor in tensors], dim))


def _cat(tensors: Iterable[_Traced], dim: int = 0) -> _Traced:
    return _Traced(pieces.cat([tensor.piece for tensor in tensors], dim))


def _transpose(tensor: _Traced, dim0: int, dim1: int) -> _Traced:
    return _Traced(pieces.transpose(tensor.piece, dim0, dim1))


def _split(tensor: _Traced, split_size_or_sections: Any, dim: int = 0) -> tuple[_Traced, ...]:
    length, sizes, parts = tensor.shape[dim], split_size_or_sections, []
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    start = 0
    for size in sizes:
        parts.append(_Traced(pieces.narrow(tensor.piece, dim, start, start + size)))
        start += size
    return tuple(parts)


def _chunk(tensor: _Traced, chunks: int, dim: int = 0) -> tuple[_Traced, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _unbind(tensor: _Traced, dim: int = 0) -> tuple[_Traced, ...]:
    return tuple(_Traced(pieces.select(tensor.piece, dim, i)) for i in range(tensor.shape[dim]))


_UNDERSTOOD: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.transpose: _transpose,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.unbind: _unbind,
}
