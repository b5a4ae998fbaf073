"""How a matrix of trellis coefficients is stored: its tiles' bit strings and the scales.

The matrix is covered by tiles, row-major over the grid of tiles, padded with zeros below and to the right where
tiles do not divide it; padding is stored and counted. A coefficient is its tile's codebook value times the one
scale of the matrix and, where the code has them, its row's factor: a byte q in [-127, 127] that means 1 + q / 256.

Imports the trellis code, torch and the errors only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.codes.trellis import TrellisSpec, decode_tiles, matrix_from_tiles

SCALE_DTYPE = torch.float32
FACTOR_STEPS = 256  # of a row's factor per unit
FACTOR_LIMIT = 127


def layout(spec: TrellisSpec, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a coefficient matrix (rows, cols)."""
    down, across = spec.grid(rows, cols)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed_codes": ((down, across * spec.bytes_per_tile), torch.uint8),
        "scales": ((1, 1), SCALE_DTYPE),
    }
    if spec.row_factors:
        tensors["row_factors"] = ((rows, 1), torch.int8)
    return tensors


def encode_factors(factors: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Round row factors to their stored bytes; from 0.504 to 1.496, others are clamped.

    Examples:
        >>> encode_factors(torch.tensor([[1.0], [0.5], [1.25]])).flatten().tolist()
        [0, -127, 64]
    """
    steps = ((factors.double() - 1) * FACTOR_STEPS).round()
    return steps.clamp(-FACTOR_LIMIT, FACTOR_LIMIT).to(torch.int8)


def decode_factors(stored: Int[Tensor, "rows 1"], dtype: torch.dtype) -> Float[Tensor, "rows 1"]:
    """The row factors that bytes mean; exact in float32."""
    return 1 + stored.to(dtype) / FACTOR_STEPS


def decode_rows(
    spec: TrellisSpec,
    tensors: Mapping[str, Tensor],
    rows: int,
    cols: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """Decode rows ``start … stop - 1``; ``start`` is a multiple of the tile height, ``stop`` too or the end.

    Returns:
        A new tensor of ``dtype``; the product of codebook value and scale is taken in float32 at least.
    """
    _, across = spec.grid(rows, cols)
    first, last = start // spec.tile_rows, -(-stop // spec.tile_rows)
    packed = tensors["packed_codes"][first:last].flatten()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = decode_tiles(packed, spec, (last - first) * across, work)
    matrix = matrix_from_tiles(values, stop - start, cols, spec)
    matrix = matrix * tensors["scales"].to(work)
    if spec.row_factors:
        matrix = matrix * decode_factors(tensors["row_factors"][start:stop], work)
    return matrix.to(dtype)
