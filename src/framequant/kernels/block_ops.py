"""The product of few tokens that ends with a linear's outputs: for output frames local to blocks of rows.

A ``torch.library`` operator that takes what ``triton_ops.analysis`` makes; prompts are ``block_prompt_ops``'. The fake
implementation gives shapes to ``torch.compile``; there is no derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framequant.kernels import launches
from framequant.kernels.launches import Launch
from framequant.kernels.product_bytes_triton import byte_product
from framequant.kernels.product_triton import product as half_product
from framequant.kernels.transform_triton import LAST_BIT
from framequant.kernels.triton_ops import starts_early
from framequant.kernels.triton_support import COMPILED

#: What products of halves are multiplied by, so that those of few and of more tokens stay within halves: coefficients
#: have a norm below 1024, or below twice the root of their number.
SHRINK_FEW, SHRINK = 2.0**-10, 2.0**-4


def product_launch(layout: list[int], as_bytes: bool, rows: int, tokens: int, block: int) -> Launch:
    """Tile of the product; ``layout`` as ``triton_ops.product`` takes it."""
    trellis, count = layout[0], layout[6]
    if as_bytes:
        return launches.block_launch(launches.block_byte_tile(rows, tokens, block), count)
    tile = launches.block_half_tile(bool(trellis), rows, tokens, block, bool(COMPILED))
    return launches.block_launch(tile, count)


@torch.library.custom_op("framequant::block_product", mutates_args=())
def product(
    words: Tensor,
    z: Tensor,
    sums: Tensor,
    unit: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    top: Tensor,
    places: Tensor,
    signs: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    layout: list[int],
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, rows) of ``dtype``; ``z``, ``sums``, ``unit``, ``shifts`` and ``layout`` as in ``triton_ops``.

    ``places``, ``signs`` and ``matrix`` are those of a ``BlockPlan``, ``top`` is a power of two above all scales.
    """
    trellis, bits, multiplier, addend, pattern, levels, count, stride = layout
    as_bytes, rows, block = words.dtype == torch.int8, len(places), len(matrix)
    tokens, early = z.shape[0], starts_early(z.device)
    how = product_launch(layout, as_bytes, rows, tokens, block)
    tile, parts = how.tile, sums.shape[1]
    y = torch.empty((tokens, rows), dtype=dtype, device=z.device)
    few = tokens <= launches.VECTOR_TOKENS
    options = {
        "BITS": bits, "ROW_SCALES": scales.numel() > 1, "BR": tile.rows, "BK": tile.step, "BN": tile.columns,
        "STAGES": tile.stages, "GROUPS": tile.groups, "PARTS": parts, "PADDED_PARTS": 1 << (parts - 1).bit_length(),
        "unit_ptr": unit, "top_ptr": top, "places_ptr": places, "signs_ptr": signs, "matrix_ptr": matrix,
        "bias_ptr": unit if bias is None else bias, "BIAS": bias is not None, "BLOCK": block,
        "PDL": early, "num_warps": tile.warps, "launch_pdl": early,
    }  # fmt: skip
    blocks, columns = -(-rows // tile.rows), tokens * (4 if as_bytes else 1)
    grid = (blocks, 1, -(-columns // tile.columns))
    if as_bytes:
        byte_product[grid](
            words, z, sums, scales, y, rows, count, stride, how.span, tokens, LAST_BIT, (1 << bits) / 2 - 0.5,
            HELD=how.held, LOOP=how.loop, shrink=1.0, norm=block**-0.5, **options,
        )  # fmt: skip
        return y
    shrink = SHRINK_FEW if few else SHRINK
    half_product[grid](
        words, z, sums, scales, scales if shifts is None else shifts, y, rows, count, stride, how.span, tokens, factor,
        TRELLIS=bool(trellis), MULTIPLIER=multiplier, ADDEND=addend, PATTERN=pattern, LEVELS=levels,
        CENTRED=not trellis, PREFETCH=0, shrink=shrink, norm=block**-0.5 / shrink, **options,
    )  # fmt: skip
    return y


@product.register_fake
def _(words, z, sums, unit, scales, shifts, top, places, signs, matrix, bias, layout, factor, dtype):  # type: ignore[no-untyped-def]
    return z.new_empty((z.shape[0], places.shape[0]), dtype=dtype)
