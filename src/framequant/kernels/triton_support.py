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
def over(power):
    """One over a power of two, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _prefetch_text(count):
    return f"cp.async.bulk.prefetch.L2.global [$1], {count}; mov.b32 $0, 0;"


@triton.jit
def prefetch(addresses, BYTES: tl.constexpr):
    """Ask for ``BYTES`` (a multiple of 16) from each 16-byte aligned address to come into the L2 cache."""
    text: tl.constexpr = _prefetch_text(BYTES)
    tl.inline_asm_elementwise(text, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)
