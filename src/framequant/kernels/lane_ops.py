"""The product of few tokens through registers alone as a ``torch.library`` operator, and how it is launched.

``lane_product`` takes what ``triton_ops.analysis`` makes with planes. A fake implementation gives shapes to
``torch.compile``; the operator has no derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from framequant.kernels import launches
from framequant.kernels.lane_product_triton import lane_product as kernel
from framequant.kernels.lane_product_triton import shared_floats
from framequant.kernels.transform_triton import LAST_BIT
from framequant.kernels.triton_ops import starts_early
from framequant.kernels.triton_support import COMPILED

#: The level of a trellis' sum of bytes that is 0 (``codes/trellis_codebook.py``).
CENTRE = 510.0


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@torch.library.custom_op("framequant::lane_product", mutates_args=())
def product(
    words: Tensor,
    z: Tensor,
    sums: Tensor,
    unit: Tensor,
    scales: Tensor,
    places: Tensor | None,
    signs: Tensor | None,
    bias: Tensor | None,
    rows: int,
    block: int,
    layout: list[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, rows) of ``dtype``, or with ``block`` 0 ``D̃ z`` in units of the token, float32 (1, tokens, rows).

    ``layout`` holds: trellis or not, bits, multiplier, addend. ``z`` are int8 planes (tokens, 4, codes of a byte, bytes),
    zeros behind the last coefficient: 16 bytes of them at least, of a trellis (tokens, 4, 1, coefficients) 64. ``places``
    and ``signs`` are those of a ``BlockPlan``.
    """
    trellis, bits, multiplier, addend = layout
    tokens, early = z.shape[0], starts_early(z.device)
    stride = words.stride(0) * words.element_size()
    how = launches.lane_launch(rows, stride, multiprocessors(z.device))
    shape = (tokens, rows) if block else (1, tokens, rows)
    y = torch.empty(shape, dtype=dtype if block else torch.float32, device=z.device)
    plane = z.shape[2] * z.shape[3]
    memory = unit if COMPILED else torch.empty(shared_floats(how.warps, tokens, plane), device=z.device)
    level, zero = (factor, CENTRE) if trellis else (1.0, (1 << bits) / 2 - 0.5)
    kernel[(how.programs,)](
        words.view(torch.uint8), z, sums, scales, y, unit, unit if places is None else places,
        unit if signs is None else signs, unit if bias is None else bias, memory, rows, stride,
        LAST_BIT * level, zero * level, max(block, 1) ** -0.5, TOKENS=tokens, COUNT=z.shape[3], PARTS=sums.shape[1],
        BITS=bits, MULTIPLIER=multiplier, ADDEND=addend, TRELLIS=bool(trellis), ROW_SCALES=scales.numel() > 1,
        BLOCK=block, BIAS=bias is not None, CHUNKS=how.chunks, ROUNDS=how.rounds, WARPS=how.warps,
        WARPS_K=how.warps_k, PDL=early, num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return y


@product.register_fake
def _(words, z, sums, unit, scales, places, signs, bias, rows, block, layout, factor, dtype):  # type: ignore[no-untyped-def]
    shape = (z.shape[0], rows) if block else (1, z.shape[0], rows)
    return z.new_empty(shape, dtype=dtype if block else torch.float32)
