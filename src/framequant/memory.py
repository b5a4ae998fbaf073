"""How much memory is free, and handing some of it back; imports nothing of ours."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def return_freed_memory() -> None:
    """Hand freed memory back to the system where the C library offers it (glibc).

    Activations of every layer are allocated and freed in other sizes; glibc keeps the holes, and a walk or an
    evaluation would come to hold ten times the memory that it uses. Cost: milliseconds.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU, what the system and this process's limits leave."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - used  # torch holds it, and will give it out again
        allowed = int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total) - used
        return max(min(free + cached, allowed), 0)
    return max(min(_available(), *_limits()), 0)


@contextmanager
def capped(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """Let torch hold no more than so many bytes of a GPU for a while; it gives back what it only keeps for later."""
    import torch

    if num_bytes is None or device.type != "cuda":
        yield
        return
    index = _index(device)
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, before), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


def _available() -> int:
    """Memory of the system that is free or holds what can be dropped; all free memory where that is not told."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 32


def _limits() -> list[int]:
    """What control groups (containers, ``systemd-run``) and ``ulimit -v`` leave to this process."""
    found = [1 << 62]
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind in ("", "memory"):
                found += _group_limits(Path("/sys/fs/cgroup") / kind, path.strip("/"))
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            found.append(soft - size)
    return found


def _group_limits(root: Path, path: str) -> list[int]:
    """What a control group and those above it leave; files that were read count as free."""
    found = []
    group = root / path
    for folder in (group, *group.parents):
        if root != folder and root not in folder.parents:
            break
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # not in this version, or "max"
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                rows = (folder / "memory.stat").read_text().splitlines()
                held = sum(int(row.split()[1]) for row in rows if row.split()[0] == cached)
                found.append(most - used + held)
    return found
