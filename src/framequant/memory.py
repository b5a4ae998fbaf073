"""Hand memory back to the system; imports nothing of ours."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
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
    """Bytes that can still be allocated on a device; on a CPU, what the system has available."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 32
