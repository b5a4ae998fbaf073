"""What the Triton kernels of inference share: is this the interpreter, and early starts of dependent kernels.

With *programmatic dependent launch* a kernel starts while the one before it still runs, and waits only where
it needs its results, so that fetching codes overlaps with the transform of the activations. A kernel launched
so must wait before it writes anything, or reads what an earlier kernel wrote. Imports triton.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Allow the next kernel of the stream to start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernels before this one have finished and their writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def wait_until(flag_ptr, wanted):
    """Wait until the counter is at least ``wanted`` and what was written before each ``arrive`` is visible."""
    if COMPILED:
        text: tl.constexpr = "ld.acquire.gpu.global.u32 $0, [$1];"
        seen = tl.inline_asm_elementwise(text, "=r,l", [flag_ptr], dtype=tl.int32, is_pure=False, pack=1)
        while seen < wanted:
            seen = tl.inline_asm_elementwise(text, "=r,l", [flag_ptr], dtype=tl.int32, is_pure=False, pack=1)
    else:  # programs run one after the other, those that are waited for first
        tl.device_assert(tl.load(flag_ptr) >= wanted)


@triton.jit
def arrive(flag_ptr):
    """Count this program, whose writes so far come before; return how many were counted before it."""
    tl.debug_barrier()
    return tl.atomic_add(flag_ptr, 1, sem="acq_rel", scope="gpu")


@triton.constexpr_function
def _prefetch_text(count):
    return f"cp.async.bulk.prefetch.L2.global [$1], {count}; mov.b32 $0, 0;"


@triton.jit
def prefetch(addresses, BYTES: tl.constexpr):
    """Ask for ``BYTES`` (a multiple of 16) from each 16-byte aligned address to come into the L2 cache."""
    text: tl.constexpr = _prefetch_text(BYTES)
    tl.inline_asm_elementwise(text, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)
