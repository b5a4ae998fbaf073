"""Analysis of one token where the transform is a matrix times Walsh and Hadamard's of 256: a program for each row.

For products through registers alone (``lane_product_triton``) whose programs cannot analyse for themselves. A thread
takes a column of the vector times a row of the first matrix, 256 threads transform what they have in float32, by
shuffles and through shared memory, and the frame's block follows. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.lane_analysis_triton import pair_factor
from framequant.kernels.lanes_triton import (
    lane_hadamard,
    load_shared,
    load_shared_words,
    shared_memory,
    store_shared,
    store_shared_planes,
)
from framequant.kernels.triton_support import let_next_start, wait_for_previous
from framequant.kernels.vector_triton import bound

_SHRINK = tl.constexpr(2.0**-16)  # so that sums of bfloat16's largest numbers are finite


@triton.constexpr_function
def column_bytes():
    """Bytes of shared memory: a row of float32 twice, and three planes of up to 336 coefficients."""
    return 2 * 256 * 4 + 3 * 336


@triton.jit
def _row_weights(m_ptr, signs_ptr, row, thread, F0: tl.constexpr):
    """What each number of a thread's column is multiplied by, none of it from another kernel."""
    found = ()
    for i in tl.static_range(F0):
        sign = tl.load(signs_ptr + thread + i * 256).to(tl.float32) * _SHRINK
        found += (tl.load(m_ptr + row * F0 + i + thread * 0) * sign,)
    return found


@triton.jit
def _across_warps(value, shared, thread):
    """Walsh and Hadamard's transform of 256 threads' numbers."""
    value = lane_hadamard(value, 32)
    store_shared(shared + thread * 4, value)
    tl.debug_barrier()
    total = thread * 0.0
    for warp in tl.static_range(8):
        other = load_shared(shared + thread % 32 * 4, warp * 128)
        common = (thread // 32) & warp
        odd = (common ^ (common >> 1) ^ (common >> 2)) & 1
        total += tl.where(odd == 1, -other, other)
    return total


@triton.jit
def _block_row(block_ptr, number, EACH: tl.constexpr):
    """A coefficient's row of the frame's block: sixteen float32. Rows of all programs are the same: through L1."""
    found = ()
    for i in tl.static_range(16):
        found += (tl.load(block_ptr + i * EACH + number % EACH),)
    return found


@triton.jit
def _keep_digits(planes, y, number, CODES: tl.constexpr, LENGTH: tl.constexpr):
    """Write coefficients in units of their last bit to three planes of shared memory, the i-th codes' together."""
    if CODES > 0:
        y *= tl.where(number % 2 == 1, pair_factor(CODES), 1.0)
    integer = (y + 12582912.0).to(tl.int32, bitcast=True)  # of a float32 in [2**23, 2**24), which is one
    digits = (integer - (0x4B400000 - 0x808080)) ^ 0x808080
    number = tl.minimum(number, 335)  # what is behind LENGTH is not looked at
    RUNS: tl.constexpr = CODES if CODES > 0 else 1
    place = tl.where(number < LENGTH, number % RUNS * (LENGTH // RUNS) + number // RUNS, number)
    store_shared_planes(planes + place, digits, 336)


@triton.jit
def _write_digits(z_ptr, planes, row, thread, COUNT: tl.constexpr, CODES: tl.constexpr, LENGTH: tl.constexpr):
    """Bring a row's planes to memory, four bytes a thread: memory that corrects errors is slow with single bytes."""
    RUNS: tl.constexpr = CODES if CODES > 0 else 1
    SIZE: tl.constexpr = LENGTH // RUNS // 4  # words of a run
    run, word = thread // SIZE, thread % SIZE
    used = run < 3 * RUNS
    run = tl.minimum(run, 3 * RUNS - 1)
    value = load_shared(planes + run // RUNS * 336 + (run % RUNS * SIZE + word) * 4).to(
        tl.int32, bitcast=True
    )
    at = z_ptr + run * COUNT + (row * SIZE + word) * 4
    tl.store(at.to(tl.pointer_type(tl.int32), bitcast=True), value, mask=used)


@triton.jit
def _write_tails(z_ptr, thread, BEGIN: tl.constexpr, COUNT: tl.constexpr, RUNS: tl.constexpr, there):
    """Zeros behind each run's last coefficient."""
    SIZE: tl.constexpr = (COUNT - BEGIN) // 4
    for turn in tl.static_range((3 * RUNS * SIZE + 255) // 256):
        run, word = (thread + 256 * turn) // SIZE, (thread + 256 * turn) % SIZE
        at = z_ptr + run * COUNT + BEGIN + word * 4
        tl.store(at.to(tl.pointer_type(tl.int32), bitcast=True), thread * 0, mask=there & (run < 3 * RUNS))


@triton.jit
def column_analysis(
    x_ptr, gate_ptr, signs_ptr, m_ptr, block_ptr, z_ptr, unit_ptr, sum_ptr, memory_ptr, norm,
    F0: tl.constexpr, GATED: tl.constexpr, EACH: tl.constexpr, COUNT: tl.constexpr, CODES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Coefficients of a token of ``256 F0`` numbers as ``lane_product`` takes them, 16 EACH of each row.

    Args:
        gate_ptr: (256 F0,); GATED, the token is ``silu(gate) x``.
        m_ptr: float32 (F0, F0).
        block_ptr: float32 (16, EACH), with EACH 16 not read.
        z_ptr: int8 planes (4, CODES, COUNT), of a trellis (CODES 0) (4, COUNT), as ``lane_product`` takes them; behind
            the last they are set to 0.
        sum_ptr: (F0,), of coefficients, in units of the token.
    """
    let_next_start(PDL)
    thread, row = tl.arange(0, 256), tl.program_id(0)
    shared = shared_memory(column_bytes(), memory_ptr)
    weights = _row_weights(m_ptr, signs_ptr, row, thread, F0)
    if EACH > 16:
        block = _block_row(block_ptr, thread, EACH) + _block_row(block_ptr, thread + 256, EACH)
    tl.debug_barrier()
    wait_for_previous(PDL)
    value, squares, largest = thread * 0.0, thread * 0.0, thread * 0.0
    for i in tl.static_range(F0):
        x = tl.load(x_ptr + thread + i * 256).to(tl.float32)
        if GATED:
            gate = tl.load(gate_ptr + thread + i * 256).to(tl.float32)
            x *= gate / (1.0 + tl.exp(-gate))
        value += x * weights[i]
        x *= _SHRINK
        squares += x * x
        largest = tl.maximum(largest, tl.abs(x))
    squares, largest = tl.sum(squares), tl.max(largest)
    bits = bound(squares, largest, 256 * F0)
    value = _across_warps(value, shared, thread)
    value *= (0x7F000000 - bits).to(tl.float32, bitcast=True)
    scale = norm * 4194304.0
    LENGTH: tl.constexpr = 16 * EACH
    planes = shared + 2048
    if EACH > 16:
        store_shared(shared + thread * 4, value, 1024)
        tl.debug_barrier()
        total = thread * 0.0
        for turn in tl.static_range(2):
            number = thread + 256 * turn
            at = shared + tl.minimum(number // EACH, 15) * 64
            y = thread * 0.0
            for i in tl.static_range(4):
                words = load_shared_words(at, 1024 + i * 16)
                for j in tl.static_range(4):
                    y += words[j].to(tl.float32, bitcast=True) * block[16 * turn + 4 * i + j]
            y = tl.where(number < LENGTH, y * scale, 0.0)
            total += y
            _keep_digits(planes, y, number, CODES, LENGTH)
    else:
        total = value * scale
        _keep_digits(planes, total, thread, CODES, LENGTH)
    tl.store(sum_ptr + row, tl.sum(total) * 2.384185791015625e-07)
    tl.debug_barrier()
    _write_digits(z_ptr, planes, row, thread, COUNT, CODES, LENGTH)
    RUNS: tl.constexpr = CODES if CODES > 0 else 1
    _write_tails(z_ptr, thread, F0 * LENGTH // RUNS, COUNT, RUNS, (row == 0) & (thread >= 0))
    if row == 0:
        power = tl.where(
            (largest < float("inf")) & (squares == squares), bits.to(tl.float32, bitcast=True), float("nan")
        )
        tl.store(unit_ptr, power / _SHRINK)
