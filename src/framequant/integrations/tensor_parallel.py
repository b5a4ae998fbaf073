"""A quantized linear divided among ranks: each holds whole rows of the coefficient matrix D.

A frame mixes all features of its side, so no slice of W is a slice of D. But ``y = T_outᵀ D̃ T_in x`` divides by the
rows of D, whatever the frame and the code: rank r keeps the rows ``D_r`` and computes ``c_r = D̃_r T_in x``.

- *Column-parallel* layers (in the words of Megatron-LM and vLLM: q, k, v, gate, up), whose outputs on the ranks are
  slices of y: the ``c_r`` are gathered, every rank synthesises them and takes its features.
- *Row-parallel* layers (o, down), whose inputs on the ranks are slices of x and whose outputs are summed: the slices of
  x are gathered, and the terms ``T_outᵀ (0, c_r, 0)`` add up to y, since synthesis is linear.

Codes, the bulk of the memory and of the work, are divided; the transforms are done on every rank. This costs one
gather for each layer, which frame blocks local to a shard (``docs/serving.md``) would save.

Pure functions of specs and tensors; what gathers is passed in. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from framequant import storage
from framequant.codes.trellis import TrellisSpec
from framequant.errors import ConfigError
from framequant.frames import FrameKind, FrameSpec
from framequant.spec import LinearSpec

#: Joins the last axes of all ranks' tensors, in the order of ranks; their shapes are equal.
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a linear: rows ``start … stop - 1`` of D, of the ``bounds`` of all ranks.

    Attributes:
        rank: 0 … number of ranks - 1.
        bounds: first rows of all ranks, and the number of rows.
    """

    rank: int
    bounds: tuple[int, ...]

    @property
    def start(self) -> int:
        """First row."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.bounds[self.rank + 1]

    @property
    def sizes(self) -> list[int]:
        """Rows of every rank."""
        return [after - before for before, after in pairwise(self.bounds)]


def divide(spec: LinearSpec, rank: int, ranks: int) -> Shard:
    """Share out the rows of D, as evenly as the tiles of its code allow.

    Args:
        spec: the whole linear.
        rank: 0 … ranks - 1.
        ranks: at least 1.

    Returns:
        The shard of ``rank``.

    Raises:
        ConfigError: there are fewer rows, or tiles of rows, than ranks.
    """
    rows = spec.coefficient_shape[0]
    step = spec.code.tile_rows if isinstance(spec.code, TrellisSpec) else 1
    tiles = -(-rows // step)
    if tiles < ranks:
        raise ConfigError(
            f"a linear of {spec.out_features} outputs has {tiles} rows of tiles, too few for {ranks} ranks; "
            "use a smaller --tensor-parallel-size."
        )
    return Shard(rank, tuple(min(tiles * number // ranks * step, rows) for number in range(ranks + 1)))


def shard_spec(spec: LinearSpec, shard: Shard) -> LinearSpec:
    """The linear of a shard: ``x ↦ c_r``, with the whole's input frame and code, and no output frame."""
    rows = shard.stop - shard.start
    return replace(spec, out_features=rows, frame_out=FrameSpec(FrameKind.IDENTITY, rows))


def shard_tensor(spec: LinearSpec, shard: Shard, name: str, whole: Tensor) -> Tensor:
    """A shard's part of a stored tensor, a view; what belongs to no row (one scale, steps of activations) whole."""
    (size, *_), _ = storage.layout(shard_spec(spec, shard))[name]
    if len(whole) == size:
        return whole
    by_tiles = isinstance(spec.code, TrellisSpec) and len(whole) < spec.coefficient_shape[0]
    unit = spec.code.tile_rows if by_tiles else 1
    return whole[shard.start // unit : -(-shard.stop // unit)]


def shard_tensors(spec: LinearSpec, shard: Shard, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All stored tensors of a shard."""
    return {name: shard_tensor(spec, shard, name, tensor) for name, tensor in tensors.items()}


def gather_rows(
    shards: list[Shard], coefficients: list[Float[Tensor, "*b own"]], gather: Gather
) -> list[Float[Tensor, "*b rows"]]:
    """All rows of ``D̃ T_in x`` of several linears from those of every rank, in one gather.

    Args:
        shards: this rank's, one for each linear.
        coefficients: this rank's ``c_r``, one for each linear.
        gather: joins the ranks' tensors; shorter shards are padded with zeros for it.

    Returns:
        The coefficients of the whole linears, for ``T_outᵀ``.
    """
    widths = [max(shard.sizes) for shard in shards]
    padded = [
        functional.pad(own, (0, width - own.shape[-1]))
        for own, width in zip(coefficients, widths, strict=True)
    ]
    ranks = gather(torch.cat(padded, dim=-1)).split(sum(widths), dim=-1)
    pieces = [rank.split(widths, dim=-1) for rank in ranks]
    return [
        torch.cat([pieces[rank][index][..., :size] for rank, size in enumerate(shard.sizes)], dim=-1)
        for index, shard in enumerate(shards)
    ]


def zero_other_rows(shard: Shard, coefficients: Float[Tensor, "*b own"]) -> Float[Tensor, "*b rows"]:
    """``(0, c_r, 0)``: this rank's term of all rows; the terms of all ranks add up."""
    return functional.pad(coefficients, (shard.start, shard.bounds[-1] - shard.stop))


def own_features(
    outputs: Float[Tensor, "*b out"], size: int, rank: int, ranks: int
) -> Float[Tensor, "*b size"]:
    """The ``size`` features that a rank owns; where there are fewer than ranks, neighbours own the same.

    Args:
        outputs: all features.
        size: features for each rank: their number divided by the ranks, or more where some are replicated (key and
            value heads of an attention with fewer of them than ranks).
        rank: 0 … ranks - 1.
        ranks: number of ranks.

    Raises:
        ConfigError: the features do not divide that way.
    """
    replicas, rest = divmod(size * ranks, outputs.shape[-1])
    if rest or replicas < 1 or ranks % replicas:
        raise ConfigError(
            f"{outputs.shape[-1]} features do not divide into {size} for each of {ranks} ranks."
        )
    return outputs.narrow(-1, rank // replicas * size, size)
