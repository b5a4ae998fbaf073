"""The trellis code as the rounding sees it: panels of columns are cut into tiles, tiles are searched by Viterbi.

Linears that share a Hessian are stacked; each is padded to whole tiles on its own, so that its tiles are its
own bytes. The scale of a linear is the root mean square of its coefficients times the code's gain.

Must not import models, layers or frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.codes.trellis import (
    TrellisSpec,
    codebook_values,
    matrix_from_tiles,
    pack_states,
    tiles_from_matrix,
)
from framequant.codes.trellis_storage import SCALE_DTYPE, encode_factors
from framequant.kernels.viterbi import encode_tiles
from framequant.quantizers.two_sided import Wave


class TrellisCoder:
    """Trellis codes of one or more stacked matrices of coefficients.

    Args:
        matrices: the coefficients D of each linear, (rows_i, cols), float64.
        spec: the trellis, the same for all.
    """

    def __init__(self, matrices: Sequence[Float[Tensor, "rows cols"]], spec: TrellisSpec) -> None:
        self.panel = spec.tile_cols
        self._spec = spec
        self._rows = [matrix.shape[0] for matrix in matrices]
        self._scales = [_scale(matrix, spec) for matrix in matrices]
        grids = [spec.grid(*matrix.shape) for matrix in matrices]
        self._tile_rows = [down for down, _ in grids]
        #: Paths found so far: (rows of tiles of all matrices, panels, steps).
        self._states = torch.zeros(
            (sum(self._tile_rows), grids[0][1], spec.steps), dtype=torch.int32, device=matrices[0].device
        )
        #: The same by matrix and block row, (blocks, tiles of a block row, panels, steps), when cells are rounded.
        self._blocks: list[Tensor] = []

    def clip(self, coefficients: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Return the coefficients as they are: a trellis has no range to clamp to."""
        return coefficients

    def quantize(self, columns: Float[Tensor, "m c"], first: int) -> Float[Tensor, "m c"]:
        """Search the best paths for a panel's tiles and record them."""
        scaled = [
            (part / scale.double()).float()
            for part, scale in zip(columns.split(self._rows), self._scales, strict=True)
        ]
        tiles = [tiles_from_matrix(part, self._spec) for part in scaled]
        states = encode_tiles(torch.cat(tiles), self._spec)
        self._states[:, first // self.panel] = states
        values = self._decoded(states).split(self._tile_rows)
        restored = [
            matrix_from_tiles(value, rows, columns.shape[1], self._spec).to(columns.dtype)
            * scale.to(columns.dtype)
            for value, rows, scale in zip(values, self._rows, self._scales, strict=True)
        ]
        return torch.cat(restored)

    def open_blocks(self, heights: Sequence[int]) -> None:
        """Prepare to record block rows of this many rows, whole tiles; see ``two_sided.CellCoder``."""
        highs = [height // self._spec.tile_rows for height in heights]
        shapes = [
            (-(-rows // high), high, *self._states.shape[1:])
            for rows, high in zip(self._tile_rows, highs, strict=True)
        ]
        self._blocks = [torch.zeros(shape, dtype=torch.int32, device=self._states.device) for shape in shapes]

    def quantize_cells(self, waves: Sequence[Wave], values: Sequence[Tensor]) -> list[Tensor]:
        """Search the paths of cells, each some tiles high and one panel wide; see ``two_sided.CellCoder``."""
        scales = [
            self._scales[wave.linear].to(value.dtype) for wave, value in zip(waves, values, strict=True)
        ]
        tiles = [
            (value / scale).float().reshape(-1, self._spec.weights)
            for value, scale in zip(values, scales, strict=True)
        ]
        states = encode_tiles(torch.cat(tiles), self._spec, check=False)
        decoded = self._decoded(states)
        counts = [len(part) for part in tiles]
        for wave, found in zip(waves, states.split(counts), strict=True):
            place = wave.cells(self._blocks[wave.linear])
            place.copy_(found.reshape(place.shape))
        return [
            part.to(value.dtype).reshape(value.shape) * scale
            for part, value, scale in zip(decoded.split(counts), values, scales, strict=True)
        ]

    def _decoded(self, states: Int[Tensor, "tiles steps"]) -> Float[Tensor, "tiles weights"]:
        """The values of paths."""
        return _values(self._spec.state_bits, self._spec.codebook, states.device)[states].flatten(-2)

    def tensors(self) -> list[dict[str, Tensor]]:
        """The stored tensors of each linear, in the order in which the matrices were given."""
        result = []
        found = list(self._states.split(self._tile_rows))
        if self._blocks:
            found = [b.flatten(0, 1)[:rows] for b, rows in zip(self._blocks, self._tile_rows, strict=True)]
        for states, scale in zip(found, self._scales, strict=True):
            packed = pack_states(states.flatten(0, 1), self._spec)
            result.append({"packed_codes": packed.reshape(len(states), -1), "scales": scale})
        if self._spec.row_factors:
            ones = (torch.ones(rows, 1, device=self._states.device) for rows in self._rows)
            for stored, factors in zip(result, ones, strict=True):
                stored["row_factors"] = encode_factors(factors)
        return result


@lru_cache(maxsize=16)
def _values(state_bits: int, codebook: str, device: torch.device) -> Float[Tensor, "states weights"]:
    """The codebook's values, 512 KiB at most: a look-up is one operation, decoding a dozen."""
    return codebook_values(state_bits, device=device, identifier=codebook)


def _scale(matrix: Tensor, spec: TrellisSpec) -> Float[Tensor, "1 1"]:
    """Root mean square times the gain, as stored; never zero."""
    scale = (matrix.square().mean().sqrt() * spec.gain).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
    return scale.to(SCALE_DTYPE).reshape(1, 1)
