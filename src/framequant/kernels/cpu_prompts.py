"""A quantized linear on the CPU for many tokens: compiled transforms, and a dense product of tiles of decoded rows.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from framequant.kernels.cpu import BIAS, KINDS, SIZES, CpuPlan, code_groups, share
from framequant.kernels.cpu_frames import LaneConstants

#: Rows that are decoded together for a dense product.
TILE = 512


def takes(inputs: Tensor) -> bool:
    """Whether ``linear`` knows these inputs, of which ``cpu.takes`` holds: dtype and no gradient."""
    return inputs.dtype in KINDS and not (inputs.requires_grad and torch.is_grad_enabled())


def linear(
    plan: CpuPlan, inputs: Float[Tensor, "*b n"], tiles: Iterable[Float[Tensor, "rows columns"]]
) -> Float[Tensor, "*b o"]:
    """Apply a linear to many tokens: ``takes(inputs)`` holds.

    Args:
        plan: the linear's plan.
        inputs: bfloat16 or float32.
        tiles: of D̃, as ``decoded_tiles`` gives them.

    Returns:
        A new tensor of the inputs' dtype, the bias added.
    """
    from framequant.kernels import lanes_cpu

    x = inputs.contiguous()
    tokens = x.numel() // x.shape[-1]
    into, out_of = plan.many
    columns = int(into.sizes[lanes_cpu.GROUPS] * into.sizes[lanes_cpu.SIZE])
    z = x.new_empty((tokens, columns))
    _in_lanes(lanes_cpu.analysis, x, z, into)
    products = torch.cat([functional.linear(z, tile) for tile in tiles], dim=-1)
    outputs = x.new_empty((*x.shape[:-1], plan.out_features))
    _in_lanes(lanes_cpu.synthesis, products, outputs, out_of, plan.arrays[BIAS])
    return outputs


def _in_lanes(kernel: Any, source: Tensor, target: Tensor, constants: LaneConstants, *more: Any) -> None:
    """Share a transform's tokens out to threads, whole groups of lanes."""
    tokens = target.numel() // target.shape[-1]
    c = constants
    arrays = (c.factors, c.axes, c.matrices, c.block, c.sizes, *more)
    addresses = source.data_ptr(), KINDS[source.dtype], target.data_ptr(), tokens
    share(lambda start, stop: kernel(*addresses, *arrays, start, stop), tokens, torch.get_num_threads(), 16)


def arranged(plan: CpuPlan, coefficients: Float[Tensor, "*b m_in"]) -> Float[Tensor, "*b columns"]:
    """Coefficients in the order of the columns of ``decoded_tiles``, zero where these have padding.

    Args:
        plan: the linear's plan.
        coefficients: of a dtype that ``cpu.takes`` allows.

    Returns:
        A new tensor of the same dtype, float32 for halves, in which the product is to be taken.
    """
    groups, size = code_groups(plan.arrays[SIZES])
    z = coefficients.float() if coefficients.dtype == torch.float16 else coefficients
    z = functional.pad(z, (0, groups * size - z.shape[-1]))
    return z.unflatten(-1, (groups, size)).transpose(-1, -2).flatten(-2)


def decoded_tiles(plan: CpuPlan, dtype: torch.dtype) -> Iterator[Float[Tensor, "rows columns"]]:
    """Tiles of rows of D̃, decoded one after the other, their columns in the order of ``arranged``.

    Args:
        plan: the linear's plan.
        dtype: bfloat16 or float32.
    """
    groups, size = code_groups(plan.arrays[SIZES])
    for first in range(0, plan.rows, TILE):
        tile = torch.empty((min(TILE, plan.rows - first), groups * size), dtype=dtype)
        share(partial(_decode, plan, groups, tile, first), len(tile), torch.get_num_threads(), 16)
        yield tile


def _decode(plan: CpuPlan, groups: int, tile: Tensor, first: int, start: int, stop: int) -> None:
    """Decode rows ``start … stop - 1`` of a tile whose first row is the matrix's row ``first``."""
    from framequant.kernels import dense_cpu as dense

    codes, sizes, places, book, scales, offsets = (plan.arrays[i] for i in (0, SIZES, 6, 7, 8, 9))
    bits, stride, across, words = (int(sizes[i]) for i in (0, 3, 7, 8))
    address = tile.data_ptr() + start * tile.element_size() * tile.shape[1]
    span = (first + start, first + stop)
    if across:
        numbers = book.view(np.uint32)
        dense.trellis_rows(
            codes.ctypes.data, words, across, places, numbers, scales, address, KINDS[tile.dtype], *span
        )
    else:
        dense.scalar_rows(
            codes.ctypes.data, stride, bits, groups, scales, offsets, address, KINDS[tile.dtype], *span
        )
