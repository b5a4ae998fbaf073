"""The whole linear of one or two tokens in one launch: analysis, the product synthesis.

Between launches that depend on each other a GPU spends a microsecond, even with early starts; a counter in memory
costs a fraction of it. The first programs analyse, the next ones multiply, with their codes in registers before the
coefficients are there, the last ones synthesise. A program waits for programs of smaller index only, which a GPU
starts first, so whatever number fits at a time none waits for one that cannot start. All wait for the kernels before
this one before they look at a counter: that one may have used the same counters and sets them back at its end.

Only ``framequant.kernels.triton_ops`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.product_bytes_triton import byte_block
from framequant.kernels.product_triton import half_block
from framequant.kernels.triton_support import arrive, let_next_start
from framequant.kernels.vector_triton import transform_row


@triton.jit
def _reset(counters):
    for i in tl.static_range(3):
        tl.store(counters + i, 0)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def fused_linear(
    x_ptr, in_signs, in_0, in_1, in_2, z_ptr, unit_ptr, sum_ptr,
    words_ptr, scale_ptr, u_ptr,
    out_signs, out_0, out_1, out_2, bias_ptr, y_ptr, counters,
    tokens, x_stride, in_norm, rows, blocks, count, stride, span, factor, zero, out_norm,
    A0: tl.constexpr, A1: tl.constexpr, A2_IN: tl.constexpr, A2_OUT: tl.constexpr,
    AP0: tl.constexpr, AP1: tl.constexpr, AP2_IN: tl.constexpr, AP2_OUT: tl.constexpr, A_CHUNK: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2_IN: tl.constexpr, S2_OUT: tl.constexpr,
    SP0: tl.constexpr, SP1: tl.constexpr, SP2_IN: tl.constexpr, SP2_OUT: tl.constexpr, S_CHUNK: tl.constexpr,
    PADDED_PARTS: tl.constexpr, SPLITS: tl.constexpr, TRELLIS: tl.constexpr, BITS: tl.constexpr,
    MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, ROW_SCALES: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, LOOP: tl.constexpr,
    BIAS: tl.constexpr, SYNTHESISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``tokens * A0`` programs analyse, ``blocks * SPLITS`` multiply; with SYNTHESISE ``tokens * S0`` synthesise.

    The arguments of ``vector_transform`` and ``byte_product`` beside each other; ``counters`` are three int32 that are
    0 before and after.
    """
    let_next_start(PDL)
    program = tl.program_id(0)
    analysing, multiplying = tokens * A0, blocks * SPLITS
    if program < analysing:
        transform_row(
            (program // A0).to(tl.int64), program % A0, counters, 0,
            x_ptr, in_signs, in_0, in_1, in_2, x_ptr, z_ptr, unit_ptr, sum_ptr, x_stride, 0, count, in_norm,
            A0, A1, A2_IN, A2_OUT, AP0, AP1, AP2_IN, AP2_OUT, 1, True, 16 if TRELLIS else 8 // BITS, not TRELLIS, False,
            PDL, A_CHUNK, False,
        )  # fmt: skip
        arrive(counters)
    elif program < analysing + multiplying:
        block, part = (program - analysing) % blocks, (program - analysing) // blocks
        if TRELLIS:
            half_block(
                block, part, 0, counters, analysing,
                words_ptr, z_ptr, sum_ptr, scale_ptr, u_ptr, rows, count, stride, span, tokens, factor,
                A0, PADDED_PARTS, True, BITS, MULTIPLIER, ADDEND, False, ROW_SCALES, BR, BK, BN, STAGES,
                PDL, 0, True, False,
            )  # fmt: skip
        else:
            byte_block(
                block, part, 0, counters, analysing,
                words_ptr, z_ptr, sum_ptr, scale_ptr, u_ptr, rows, count, stride, span, tokens, factor, zero,
                A0, PADDED_PARTS, BITS, ROW_SCALES, BR, BK, BN, STAGES, HELD, LOOP, PDL, True, False,
            )  # fmt: skip
        if arrive(counters + 1) == multiplying - 1 and not SYNTHESISE:
            _reset(counters)
    elif SYNTHESISE:
        index = program - analysing - multiplying
        transform_row(
            (index // S0).to(tl.int64), index % S0, counters + 1, multiplying,
            u_ptr, out_signs, out_0, out_1, out_2, bias_ptr, y_ptr, unit_ptr, unit_ptr, rows, tokens * rows,
            0, out_norm, S0, S1, S2_IN, S2_OUT, SP0, SP1, SP2_IN, SP2_OUT, SPLITS, False, 1, False, BIAS, PDL,
            S_CHUNK, True,
        )  # fmt: skip
        if arrive(counters + 2) == tokens * S0 - 1:  # nobody looks at the counters any more
            _reset(counters)
