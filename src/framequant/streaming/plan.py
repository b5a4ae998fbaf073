"""How much memory a run may use, and what that decides: streaming or not, and where activations wait.

Sizes are bytes; a GB is 10⁹ of them, a GiB 2³⁰.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from framequant.errors import ConfigError
from framequant.memory import free_bytes
from framequant.model.activations import Place, Placement
from framequant.model.discovery import linears

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS.update({"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40})
#: A model in memory takes its weights, a float block, a decoded one, and what rounding works with.
IN_MEMORY_FACTOR = 1.3
#: Copies in float64 of a Hessian and of a weight that rounding holds at its peak, at a redundancy of 1.125: by scalar
#: codes, whose rows are rounded in pieces, and by others.
ROUNDING_COPIES = {True: (2.0, 4.0), False: (3.5, 7.0)}
#: Held back for libraries and for what is allocated in other sizes than it was freed.
RESERVE = {"cpu": 10**9, "cuda": 2 * 10**9}


@dataclass(frozen=True)
class MemoryLimits:
    """What a run may use.

    Attributes:
        host: bytes of host memory.
        device: bytes of the device's memory; the same as ``host`` on a CPU.
        cap: what the user allows of a GPU's memory; None for all of it.
    """

    host: int
    device: int
    cap: int | None = None


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GB``, ``512 MiB`` or ``1e9``.

    Raises:
        ConfigError: no size.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?I?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit += "B" if unit and not unit.endswith("B") else ""
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[unit])
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{text!r} is no size; write for example 8GB, 512MiB or cuda=40GB,cpu=8GB."
        ) from error


def memory_limits(
    max_memory: str | int | Mapping[str, str | int] | None, device: torch.device
) -> MemoryLimits:
    """The limits that ``--max-memory`` and the machine set; the smaller of both.

    Args:
        max_memory: of the host, as a size; or sizes by "cpu" and "cuda", as a mapping or ``cuda=40GB,cpu=8GB``.
        device: that computes.

    Raises:
        ConfigError: no size, or of another place than these.
    """
    given = dict(_given(max_memory))
    unknown = sorted(set(given) - {"cpu", "cuda"})
    if unknown:
        raise ConfigError(f"max_memory: {unknown[0]!r} is neither cpu nor cuda.")
    host = min(given.get("cpu", 1 << 62), free_bytes(torch.device("cpu")))
    if device.type != "cuda":
        return MemoryLimits(host, host)
    return MemoryLimits(host, min(given.get("cuda", 1 << 62), free_bytes(device)), given.get("cuda"))


def _given(max_memory: str | int | Mapping[str, str | int] | None) -> dict[str, int]:
    if max_memory is None:
        return {}
    if isinstance(max_memory, str) and "=" in max_memory:
        parts = (part.partition("=") for part in max_memory.split(","))
        max_memory = {place.strip(): size for place, _, size in parts}
    if not isinstance(max_memory, Mapping):
        max_memory = {"cpu": max_memory}
    return {
        place: parse_size(size) if isinstance(size, str) else int(size) for place, size in max_memory.items()
    }


def fits_in_memory(num_bytes: int, limits: MemoryLimits, device: torch.device) -> bool:
    """Whether a model of so many bytes can be quantized in memory."""
    wanted = int(num_bytes * IN_MEMORY_FACTOR) + RESERVE[device.type]
    return wanted <= limits.host and (device.type == "cpu" or wanted <= limits.device)


def block_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a block's parameters."""
    return sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize


def rounding_bytes(block: nn.Module, scalar: bool) -> int:
    """Bytes that rounding the largest linear of a block takes, about; ``scalar``: to a scalar code."""
    hessians, weights = ROUNDING_COPIES[scalar]
    sizes = [0]
    for module in linears(block).values():
        rows, columns = module.weight.shape
        sizes.append(int(8 * (hessians * max(rows, columns) ** 2 + weights * rows * columns)))
    return max(sizes)


@dataclass(frozen=True)
class MemoryPlan:
    """Where activations wait, and how many of a float block may be kept.

    Attributes:
        placement: of the streams between two blocks.
        float_cache_bytes: of one float block's activations.
        activation_bytes: of all streams together.
    """

    placement: Placement
    float_cache_bytes: int
    activation_bytes: int


def plan_memory(
    activation_bytes: int,
    working_bytes: int,
    host_bytes: int,
    limits: MemoryLimits,
    device: torch.device,
    scratch: Path,
) -> MemoryPlan:
    """Choose the nearest place that has room for the activations.

    Args:
        activation_bytes: of all streams.
        working_bytes: of the device, that the blocks and their rounding take.
        host_bytes: of the host, that reading and writing a block takes.
        limits: what may be used.
        device: that computes.
        scratch: directory of activations on disk.
    """
    on_device = limits.device - working_bytes - RESERVE[device.type]
    on_host = limits.host - host_bytes - RESERVE["cpu"]
    if activation_bytes <= on_device // 2:  # what stays between others of many sizes leaves holes among them
        place, left = Place.DEVICE, on_device - activation_bytes
    elif device.type == "cuda" and activation_bytes <= on_host:
        place, left = Place.HOST, on_device
    else:
        place, left = Place.DISK, on_device
    cached = {"cpu": 2 << 30, "cuda": 8 << 30}[device.type]
    placement = Placement(place, device, scratch, pinned=2 * activation_bytes <= on_host)
    return MemoryPlan(placement, max(min(cached, left // 4), 0), activation_bytes)
