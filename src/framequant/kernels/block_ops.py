"""Products that end with a linear's outputs, as ``torch.library`` operators: for output frames local to blocks of rows.

Few tokens: ``product`` takes what ``triton_ops.analysis`` makes. A prompt: ``prompt_analysis``, then
``prompt_product``, whose panels are rows of the weight itself, seen from the input frame, so cuBLAS writes outputs.
Fake implementations give shapes to ``torch.compile``; no operator has a derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from framequant.kernels import launches, prompt_ops
from framequant.kernels.block_plan import FOLD_BLOCK, FOLD_WIDTH, fold_gain
from framequant.kernels.block_triton import finish_tokens
from framequant.kernels.launches import Launch
from framequant.kernels.panel_fold_triton import fold_bytes, fold_panel
from framequant.kernels.product_bytes_triton import byte_product
from framequant.kernels.product_triton import product as half_product
from framequant.kernels.prompt_transform_triton import prompt_transform
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


#: Tokens that a program of ``finish_tokens`` looks at where there is no bias: it rarely has anything to do.
FINISHED = 16


@torch.library.custom_op("framequant::block_prompt_analysis", mutates_args=())
def prompt_analysis(
    x: Tensor, signs: Tensor, matrices: list[Tensor], sizes: list[int], norm: float, columns: int
) -> tuple[Tensor, Tensor]:
    """Coefficients of tokens (tokens, dim) in the dtype of ``x`` (tokens, width(columns)), and their units (tokens,).

    A unit is 1 unless halves do not suit a token's norm.
    """
    tokens, wide = x.shape[0], prompt_ops.width(columns)
    make = torch.empty if wide == columns else torch.zeros  # the filling meets the filling of a panel
    z = make((tokens, wide), dtype=x.dtype, device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    prompt_transform[(tokens,)](
        x, signs, *matrices, x, unit, z, unit, x.stride(0), wide, norm, *sizes, ANALYSIS=True, BIAS=False, PLAIN=True,
        num_warps=launches.prompt_warps(sizes), maxnreg=launches.prompt_registers(sizes),
    )  # fmt: skip
    return z, unit


@prompt_analysis.register_fake
def _(x, signs, matrices, sizes, norm, columns):  # type: ignore[no-untyped-def]
    z = x.new_empty((x.shape[0], prompt_ops.width(columns)))
    return z, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("framequant::block_prompt_product", mutates_args=())
def prompt_product(
    words: Tensor,
    z: Tensor,
    unit: Tensor,
    scales: Tensor,
    top: Tensor,
    places: Tensor,
    signs: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    frame: Tensor | None,
    ends: list[int],
    layout: list[int],
    factor: float,
) -> Tensor:
    """Outputs (tokens, rows) in the dtype of ``z``; no more than a panel of the weight is decoded at a time.

    ``layout`` holds: trellis or not, bits, multiplier, addend, pattern, levels; ``ends`` those of the chunks of a
    ``BlockPlan``; ``frame`` the block of a ``FoldPlan`` whose analysis made ``z``.
    """
    (tokens, wide), rows, block = z.shape, len(places), len(matrix)
    y = torch.empty((tokens, rows), dtype=z.dtype, device=z.device)
    gain = prompt_ops.gain(bool(layout[0]), factor) * block**-0.5
    panels = list(pairwise([0, *launches.panel_ends(ends, wide, tokens)]))
    most = max(end - start for start, end in panels)
    panel = torch.empty((most, wide), dtype=z.dtype, device=z.device)
    for start, end in panels:
        count = end - start
        row_scales = scales[start:end] if scales.numel() > 1 else scales
        turned = places[start:], signs[start:]
        if frame is None:
            prompt_ops.decode(
                words, start, row_scales, top, panel[:count], layout, launches.block_panel_tile(block),
                places_ptr=turned[0], signs_ptr=turned[1], matrix_ptr=matrix, gain=gain, first=start, BLOCK=block,
            )  # fmt: skip
        else:
            _fold(words[start:], row_scales, top, panel[:count], frame, *turned, fold_gain(factor)[1], start)
        torch.mm(z, panel[:count].t(), out=y[:, start:end])
    half = z.dtype == torch.float16
    if half or bias is not None:
        each = FINISHED if bias is None else 1
        finish_tokens[(-(-tokens // each),)](
            y, unit, top, unit if bias is None else bias, tokens, rows, HALF=half, BIAS=bias is not None,
            TOKENS=each, STEP=1024, num_warps=4,
        )  # fmt: skip
    return y


def _fold(
    words: Tensor,
    scales: Tensor,
    top: Tensor,
    panel: Tensor,
    frame: Tensor,
    places: Tensor,
    signs: Tensor,
    gain: float,
    first: int,
) -> None:
    """Decode as many rows as ``panel`` has of two-bit ``words``, with both frames multiplied in."""
    count, wide = panel.shape
    tile, units = launches.FOLD_TILE, wide // FOLD_WIDTH
    memory = None if COMPILED else torch.empty(fold_bytes(tile.units, tile.warps) // 4, device=words.device)
    fold_panel[(-(-units // (tile.units * tile.warps)), count // FOLD_BLOCK)](
        words, scales, top, panel, frame, places, signs, memory, 2 * words.stride(0), units, wide, gain, first,
        ROW_SCALES=scales.numel() > 1, UNITS=tile.units, WARPS=tile.warps, num_warps=tile.warps,
        maxnreg=tile.registers,
    )  # fmt: skip


@prompt_product.register_fake
def _(words, z, unit, scales, top, places, signs, matrix, bias, frame, ends, layout, factor):  # type: ignore[no-untyped-def]
    return z.new_empty((z.shape[0], places.shape[0]))
