"""The OpenMP threads that torch keeps, for compiled kernels that share out their work.

A pool of Python threads takes as long to wake as the product of a small model's linear, and threads of one's own that
wait for work stand in the way of torch's, which do so, too. So kernels ask torch's own runtime: libgomp is asked to
run a function on its threads by one call, whose address is found here.
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

import torch


@cache
def fork_address() -> int:
    """Address of ``GOMP_parallel`` in the libgomp that this process has loaded, torch's own first; 0 if there is none.

    In a forked process it is 0: libgomp waits there for threads that the fork left behind.
    """
    for path in _loaded():
        try:
            found = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value or 0
    return 0


def _loaded() -> list[str]:
    """Files of libgomp that are mapped into this process, those of torch first."""
    maps = Path("/proc/self/maps")
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    paths = {line[line.index("/") :] for line in lines if re.search(r"/libgomp[^/]*\.so", line)}
    home = str(Path(torch.__file__).parent.parent)
    return sorted(paths, key=lambda path: (not path.startswith(home), path))


def _none() -> int:
    return 0


def _after_fork() -> None:
    global fork_address
    fork_address = _none


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
