"""Analysis, product and synthesis on a GPU as ``torch.library`` operators, and how each is launched.

Fake implementations give shapes to ``torch.compile``. The operators have no derivative. Tile sizes are those that
``benchmarks/kernel_variants.py`` found fastest on an H100; they change speed, and results in the last bits only.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from framequant.kernels import launches
from framequant.kernels.launches import Launch
from framequant.kernels.packed_triton import is_plain, unit_codes
from framequant.kernels.product_bytes_triton import byte_product
from framequant.kernels.product_triton import product as half_product
from framequant.kernels.transform_plan import ROWS
from framequant.kernels.transform_triton import LAST_BIT
from framequant.kernels.transform_triton import transform as tiled_transform
from framequant.kernels.triton_support import COMPILED
from framequant.kernels.vector_triton import vector_transform


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs: NVIDIA, compute capability 9 or above."""
    if not COMPILED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def turns_matrices(device: torch.device) -> bool:
    """Whether a kernel can write small matrices transposed: with ``stmatrix``, compute capability 9; interpreted."""
    return not COMPILED or starts_early(device)


def _transform(tokens: int, sizes: list[int], arguments: tuple[Any, ...], rows: int, **options: Any) -> None:
    """Launch the kernel for so many tokens."""
    early = starts_early(arguments[0].device)
    options |= {"PDL": early, "launch_pdl": early}
    if tokens <= launches.VECTOR_TOKENS:
        warps = launches.vector_warps(sizes)
        tail = launches.power_of_two(options["INTERLEAVE"] * arguments[12] - sizes[0] * sizes[1] * sizes[3])
        vector_transform[(tokens, sizes[0])](*arguments, *sizes, TAIL=tail, **options, num_warps=warps)
        return
    tiled_transform[(tokens, rows // ROWS)](*arguments, *sizes, ROWS=ROWS, LOW=True, **options, num_warps=8)


def _sum_shape(tokens: int, sizes: list[int], rows: int, pair_bits: int) -> tuple[int, int]:
    """Of sums: tokens and parts, and with ``pair_bits`` of many tokens rows of ``launches.MOST_SPARE`` zeros behind."""
    if tokens <= launches.VECTOR_TOKENS:
        return tokens, sizes[0]
    parts = rows // ROWS
    return tokens + (-(-launches.MOST_SPARE // parts) if pair_bits else 0), parts


@torch.library.custom_op("framequant::analysis", mutates_args=())
def analysis(
    x: Tensor,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    interleave: int,
    count: int,
    planes: bool,
    pair_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of tokens (tokens, dim), their units (tokens,) and sums (tokens, parts).

    Behind the sums of halves with ``pair_bits`` are zeros, which ``lane_ops.tokens`` counts with.

    Coefficients are halves (tokens, interleave, count), or with ``planes`` int8 (tokens, 4, interleave, count).
    ``pair_bits`` are for products through registers alone: halves of more than ``VECTOR_TOKENS`` tokens
    (``transform_triton``), planes of no more (``vector_triton``).
    """
    tokens, rows = x.shape[0], matrices[0].shape[0]
    full = interleave * count == sizes[0] * sizes[1] * sizes[3]
    # few tokens: the kernel writes the end, too
    make = torch.empty if full or tokens <= launches.VECTOR_TOKENS else torch.zeros
    shape = (tokens, 4, interleave, count) if planes else (tokens, interleave, count)
    z = make(shape, dtype=torch.int8 if planes else torch.float16, device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty(_sum_shape(tokens, sizes, rows, pair_bits), dtype=torch.float32, device=x.device)
    arguments = (x, signs, *matrices, x, z, unit, sums, tokens, x.stride(0), 0, count, norm)
    _transform(
        tokens,
        sizes,
        arguments,
        rows,
        PARTS=1,
        ANALYSIS=True,
        INTERLEAVE=interleave,
        PLANES=planes,
        BIAS=False,
        **({"PAIR_BITS": pair_bits} if pair_bits else {}),
    )
    return z, unit, sums


@analysis.register_fake
def _(x, signs, matrices, sizes, norm, interleave, count, planes, pair_bits=0):  # type: ignore[no-untyped-def]
    tokens = x.shape[0]
    shape = (tokens, 4, interleave, count) if planes else (tokens, interleave, count)
    return (
        x.new_empty(shape, dtype=torch.int8 if planes else torch.float16),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(_sum_shape(tokens, sizes, matrices[0].shape[0], pair_bits), dtype=torch.float32),
    )


def product_launch(layout: list[int], as_bytes: bool, rows: int, tokens: int) -> Launch:
    """Tile and splits of the product; ``layout`` as ``product`` takes it."""
    trellis, bits, _, _, _, levels, count, _ = layout
    if as_bytes:
        return launches.launch(launches.byte_tile(rows, tokens), rows, count, 4 * tokens)
    if trellis or is_plain(bits):
        tile = launches.half_tile(bool(trellis), rows, tokens, bool(COMPILED))
    else:
        tile = launches.packed_tile(unit_codes(levels, bits), tokens, bool(COMPILED))
    return launches.launch(tile, rows, count, tokens)


@torch.library.custom_op("framequant::product", mutates_args=())
def product(
    words: Tensor,
    z: Tensor,
    sums: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    rows: int,
    layout: list[int],
    factor: float,
) -> Tensor:
    """``D̃ z`` as partial sums, float32 (splits, tokens, rows).

    ``layout`` holds: trellis or not, bits, multiplier, addend, pattern, levels, words of a row that meet coefficients,
    words from row to row (``WordLayout``). ``shifts`` are those of ``words.row_shifts``.
    Words are int32 for a trellis, with coefficients as halves; int16 for scalar codes, with halves, too; or int8, with
    coefficients as planes.
    """
    trellis, bits, multiplier, addend, pattern, levels, count, stride = layout
    as_bytes = words.dtype == torch.int8
    tokens, early = z.shape[0], starts_early(z.device)
    how = product_launch(layout, as_bytes, rows, tokens)
    tile = how.tile
    u = torch.empty((how.splits, tokens, rows), dtype=torch.float32, device=z.device)
    options = {"BITS": bits, "ROW_SCALES": scales.numel() > 1, "BR": tile.rows, "BK": tile.step, "BN": tile.columns,
               "STAGES": tile.stages, "PDL": early, "num_warps": tile.warps,
               "launch_pdl": early}  # fmt: skip
    blocks, parts = -(-rows // tile.rows), sums.shape[1]
    options |= {"PARTS": parts, "PADDED_PARTS": 1 << (parts - 1).bit_length()}
    if not as_bytes:
        half_product[(blocks, how.splits, -(-tokens // tile.columns))](
            words, z, sums, scales, scales if shifts is None else shifts, u, rows, count, stride, how.span, tokens,
            factor, TRELLIS=bool(trellis),
            MULTIPLIER=multiplier, ADDEND=addend, PATTERN=pattern, LEVELS=levels, CENTRED=not trellis, PREFETCH=0,
            **options,
        )  # fmt: skip
        return u
    byte_product[(blocks, how.splits, -(-tokens * 4 // tile.columns))](
        words, z, sums, scales, u, rows, count, stride, how.span, tokens, LAST_BIT, (1 << bits) / 2 - 0.5,
        HELD=how.held, LOOP=how.loop, **options,
    )  # fmt: skip
    return u


@product.register_fake
def _(words, z, sums, scales, shifts, rows, layout, factor):  # type: ignore[no-untyped-def]
    how = product_launch(layout, words.dtype == torch.int8, rows, z.shape[0])
    return z.new_empty((how.splits, z.shape[0], rows), dtype=torch.float32)


@torch.library.custom_op("framequant::synthesis", mutates_args=())
def synthesis(
    u: Tensor,
    unit: Tensor,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    dim: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, dim) of ``dtype`` from partial sums (splits, tokens, coefficients), the bias added."""
    splits, tokens, _ = u.shape
    y = torch.empty((tokens, dim), dtype=dtype, device=u.device)
    arguments = (
        u,
        signs,
        *matrices,
        u if bias is None else bias,
        y,
        unit,
        unit,
        tokens,
        u.stride(1),
        u.stride(0),
        0,
    )
    _transform(tokens, sizes, (*arguments, norm), matrices[0].shape[0], PARTS=splits, ANALYSIS=False, INTERLEAVE=1,
               PLANES=False, BIAS=bias is not None)  # fmt: skip
    return y


@synthesis.register_fake
def _(u, unit, signs, matrices, sizes, norm, dim, bias, dtype):  # type: ignore[no-untyped-def]
    return u.new_empty((u.shape[1], dim), dtype=dtype)
