"""The linear for prompts as ``torch.library`` operators: analysis, panels of D̃ with cuBLAS, synthesis.

Coefficients and products are halves whatever the dtype of the inputs: cuBLAS multiplies both halves at one rate, and
these have three more bits. Fake implementations give shapes to ``torch.compile``; no operator has a derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framequant.kernels import launches
from framequant.kernels.launches import PanelTile
from framequant.kernels.packed_triton import num_digits, num_planes, unit_codes
from framequant.kernels.panel_packed_triton import decode_packed_panel
from framequant.kernels.panel_triton import TRELLIS_UNIT, decode_panel
from framequant.kernels.prompt_transform_triton import prompt_transform
from framequant.kernels.trellis_triton import tile_words


def width(columns: int) -> int:
    """Coefficients of a row with what fills it up, so that every row of a matrix for cuBLAS is aligned."""
    return -(-columns // 16) * 16


@torch.library.custom_op("framequant::prompt_analysis", mutates_args=())
def analysis(
    x: Tensor, signs: Tensor, matrices: list[Tensor], sizes: list[int], norm: float, columns: int
) -> tuple[Tensor, Tensor]:
    """Coefficients of tokens (tokens, dim) as halves (tokens, width(columns)), and their units (tokens,)."""
    tokens, wide = x.shape[0], width(columns)
    make = torch.empty if wide == columns else torch.zeros  # the filling meets the filling of a panel
    z = make((tokens, wide), dtype=torch.float16, device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    prompt_transform[(tokens,)](
        x, signs, *matrices, x, unit, z, unit, x.stride(0), wide, norm, *sizes, ANALYSIS=True, BIAS=False,
        num_warps=launches.prompt_warps(sizes), maxnreg=launches.prompt_registers(sizes),
    )  # fmt: skip
    return z, unit


@analysis.register_fake
def _(x, signs, matrices, sizes, norm, columns):  # type: ignore[no-untyped-def]
    z = x.new_empty((x.shape[0], width(columns)), dtype=torch.float16)
    return z, x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("framequant::prompt_product", mutates_args=())
def product(words: Tensor, z: Tensor, scales: Tensor, top: Tensor, rows: int, layout: list[int]) -> Tensor:
    """``D̃ z`` as halves (tokens, rows), over ``top`` and what ``gain`` returns; no more than a panel is decoded.

    ``layout`` holds: trellis or not, bits, multiplier, addend, pattern, levels (``WordLayout``).
    """
    tokens, wide = z.shape
    u = torch.empty((tokens, rows), dtype=torch.float16, device=z.device)
    most = launches.panel_rows(rows, wide, tokens)
    panel = torch.empty((most, wide), dtype=torch.float16, device=z.device)
    for start in range(0, rows, most):
        count = min(most, rows - start)
        row_scales = scales[start : start + count] if scales.numel() > 1 else scales
        _decode(words, start, row_scales, top, panel[:count], layout)
        torch.mm(z, panel[:count].t(), out=u[:, start : start + count])
    return u


def _decode(words: Tensor, start: int, scales: Tensor, top: Tensor, panel: Tensor, layout: list[int]) -> None:
    """Decode as many rows as ``panel`` has, from ``start``, a multiple of 16, on; ``scales`` are theirs."""
    trellis, bits, *_, levels = layout
    count, wide = panel.shape
    if not trellis and num_digits(levels, bits) > 1:
        tile, codes = launches.PACKED_PANEL_TILE, num_digits(levels, bits)
        decode_packed_panel[(-(-wide // (tile.words * codes)), -(-count // tile.rows))](
            words[start:], scales, top, panel, count, words.shape[1] // bits, wide, BITS=bits, LEVELS=levels,
            ROW_SCALES=scales.numel() > 1, BR=tile.rows, BK=tile.words, num_warps=tile.warps,
        )  # fmt: skip
        return
    decode(words, start, scales, top, panel, layout, launches.panel_tile(bool(trellis)))


def decode(
    words: Tensor,
    start: int,
    scales: Tensor,
    top: Tensor,
    panel: Tensor,
    layout: list[int],
    tile: PanelTile,
    **rotation: Any,
) -> None:
    """Decode rows of all codes but several digits a word, as ``_decode`` does, with the arguments that rotate them."""
    trellis, bits, multiplier, addend, pattern, levels = layout
    (count, wide), codes = panel.shape, 8 if trellis else unit_codes(levels, bits)
    height = tile_words(pattern) if trellis else 16  # rows of words for sixteen rows
    stride = words.shape[1] if trellis else words.shape[1] // num_planes(bits)
    decode_panel[(-(-wide // (tile.words * codes)), -(-count // tile.rows))](
        words[start * height // 16 :], scales, top, panel, count, stride, wide,
        TRELLIS=bool(trellis), BITS=bits, MULTIPLIER=multiplier, ADDEND=addend, PATTERN=pattern,
        ROW_SCALES=scales.numel() > 1, BR=tile.step, BK=tile.words, STEPS=tile.rows // tile.step,
        num_warps=tile.warps, **rotation,
    )  # fmt: skip


@product.register_fake
def _(words, z, scales, top, rows, layout):  # type: ignore[no-untyped-def]
    return z.new_empty((z.shape[0], rows))


def gain(trellis: bool, factor: float) -> float:
    """What a product is to be multiplied by, beside ``top``, if ``factor`` is the value of one level."""
    return factor / TRELLIS_UNIT if trellis else factor


@torch.library.custom_op("framequant::prompt_synthesis", mutates_args=())
def synthesis(
    u: Tensor,
    unit: Tensor,
    top: Tensor,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    dim: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, dim) of ``dtype`` from products (tokens, coefficients), scaled by all units; bias added."""
    tokens = u.shape[0]
    y = torch.empty((tokens, dim), dtype=dtype, device=u.device)
    prompt_transform[(tokens,)](
        u, signs, *matrices, unit if bias is None else bias, top, y, unit, u.stride(0), dim, norm, *sizes,
        ANALYSIS=False, BIAS=bias is not None, num_warps=launches.prompt_warps(sizes),
        maxnreg=launches.prompt_registers(sizes),
    )  # fmt: skip
    return y


@synthesis.register_fake
def _(u, unit, top, signs, matrices, sizes, norm, dim, bias, dtype):  # type: ignore[no-untyped-def]
    return u.new_empty((u.shape[0], dim), dtype=dtype)
