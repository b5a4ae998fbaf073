"""How a matrix of trellis coefficients is stored: its tiles' bit strings and the scales.

The matrix is covered by tiles, row-major over the grid of tiles, padded with zeros below and to the right where
tiles do not divide it; padding is stored and counted. A coefficient is its tile's codebook value times its
row's scale, or the one scale of the tensor.

Imports the trellis code, torch and the errors only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.codes.trellis import TrellisSpec, decode_tiles, matrix_from_tiles

SCALE_DTYPE = torch.float32


def layout(spec: TrellisSpec, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a coefficient matrix (rows, cols)."""
    down, across = spec.grid(rows, cols)
    return {
        "packed_codes": ((down, across * spec.bytes_per_tile), torch.uint8),
        "scales": ((1, 1), SCALE_DTYPE),
    }


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
    return (matrix * tensors["scales"].to(work)).to(dtype)
