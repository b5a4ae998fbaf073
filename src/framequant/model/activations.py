"""Where the outputs of one block wait for the next: on the device, in host memory, or in memory-mapped files.

One store holds one value per calibration batch. A value is whatever a block returns: a tensor, or tuples, lists
and mappings of tensors. Placing it elsewhere changes no bit of it.

Must not import layers or quantizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framequant.errors import CalibrationError


class Place(StrEnum):
    """Where activations are kept between two blocks."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """Where a store keeps its values.

    Attributes:
        place: on the device that computes, in host memory, or on disk.
        device: the device that computes.
        directory: of the files of ``Place.DISK``.
        pinned: whether host memory is locked, so that a GPU copies it by itself: many times as fast. It may take
            twice the size, since it comes in powers of two.
    """

    place: Place = Place.DEVICE
    device: torch.device | None = None
    directory: Path | None = None
    pinned: bool = False


class Activations:
    """One value per batch.

    Args:
        placement: where to; as they come if not given.
        name: of the files on disk; no two stores of a directory may share it.
    """

    def __init__(self, placement: Placement | None = None, name: str = "activations") -> None:
        self._placement, self._name = placement or Placement(), name
        self._values: dict[int, Any] = {}
        self._locked: dict[tuple[int, int], Tensor] = {}

    @property
    def resident(self) -> bool:
        """Whether values stay on the device, so that holding on to them costs nothing more."""
        return self._placement.place is Place.DEVICE

    def put(self, number: int, value: Any) -> None:
        """Keep the value of a batch, in place of the one before."""
        if self.resident:
            self._values[number] = value
            return
        parts = itertools.count()
        send = self._to_host if self._placement.place is Place.HOST else self._to_disk
        self._values[number] = map_tensors(value, lambda tensor: send(tensor.detach(), number, next(parts)))

    def get(self, number: int) -> Any:
        """The value of a batch, on the device; None if there is none."""
        value = self._values.get(number)
        if self.resident or value is None:
            return value
        place = self._placement.device or "cpu"
        return map_tensors(value, lambda tensor: tensor.to(place, non_blocking=tensor.is_pinned()))

    def _to_host(self, tensor: Tensor, number: int, part: int) -> Tensor:
        if not (self._placement.pinned and tensor.is_cuda):
            return tensor.to("cpu")
        held = self._locked.get((number, part))
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._locked[number, part] = held
        # The device's queue keeps the order of copies: what is read from here was asked for before.
        return held.copy_(tensor, non_blocking=True)

    def _to_disk(self, tensor: Tensor, number: int, part: int) -> Tensor:
        assert self._placement.directory is not None
        path = self._placement.directory / f"{self._name}-{number:05d}-{part}.bin"
        size = tensor.numel() * tensor.element_size()
        if not path.exists() or path.stat().st_size != size:
            path.unlink(missing_ok=True)  # a mapping of the old file stays valid
            _reserve(path, size)
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)


def _reserve(path: Path, size: int) -> None:
    """Make a file of a size whose blocks exist, since a mapping of a hole kills the process when the disk is full."""
    import os

    with path.open("wb") as file:
        if size == 0:
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise CalibrationError(
                f"activations do not fit on the disk of {path.parent}: {error.strerror}. Free {size} bytes a batch, "
                "use fewer samples, or raise --max-memory so that they stay in memory."
            ) from error


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested tuples, lists and mappings; other values stay as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(entry, change) for key, entry in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, change) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(entry, change) for entry in value)
    return value


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors of a value."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(value, count)
    return total
