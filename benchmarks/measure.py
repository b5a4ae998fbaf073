"""What the benchmarks share: the best of several timed runs, and the commit that they belong to."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import torch


def best_seconds(run: Callable[[], object], cuda: bool, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def commit() -> str:
    """Short name of the checked-out commit; ``FRAMEQUANT_COMMIT`` for a mere copy; else "unknown"."""
    if "FRAMEQUANT_COMMIT" in os.environ:
        return os.environ["FRAMEQUANT_COMMIT"]
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"
