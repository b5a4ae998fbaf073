"""Attention of one query a sequence as a ``torch.library`` operator, its plain torch twin, and how it is launched.

Must not import layers. Imports torch and triton.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from framequant.kernels import launches, triton_ops
from framequant.kernels.one_query_triton import join, one_query

#: Numbers of a head that the kernel takes.
DIMENSIONS = (32, 64, 128, 256)


def takes(batch_heads: int, shared_heads: int, dim: int) -> bool:
    """Whether the kernel knows these sizes: a power of two of numbers, and whole groups of heads."""
    return dim in DIMENSIONS and batch_heads % shared_heads == 0


@torch.library.custom_op("framequant::one_query", mutates_args=("keys", "values"))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Write a new key and value to a cache, and attend to all positions up to them.

    Args:
        q: (batch, heads, 1, dim) of float16 or bfloat16.
        k: (batch, shared heads, 1, dim), as ``v``: of the new position.
        keys: (batch, shared heads, longest, dim), contiguous, as ``values``.
        length: (), int64: positions that the cache holds; that one is written, and nothing if it is ``longest``.
        scale: of the products.
        cos: (batch or 1, 1, 1, dim), as ``sin``: rotate the two halves of ``q`` and ``k`` first.

    Returns:
        (batch, 1, heads, dim).
    """
    batch, heads, _, dim = q.shape
    shared, longest = keys.shape[1], keys.shape[2]
    q, k, v = (_rows(x) for x in (q, k, v))
    angles = None if cos is None or sin is None else (_rows(cos), _rows(sin))
    early = triton_ops.starts_early(q.device)
    splits = launches.query_splits(batch * heads, longest)
    out = q.new_empty((batch, 1, heads, dim))
    parts = q.new_empty((batch * heads, splits, dim + 2) if splits > 1 else 1, dtype=torch.float32)
    one_query[(batch * heads, splits)](
        q, k, v, *(angles or (q, q)), keys, values, length, out, parts,
        q.stride(0), k.stride(0), v.stride(0),
        angles[0].stride(0) if angles and angles[0].shape[0] > 1 else 0, longest, scale * math.log2(math.e),
        HEADS=heads, SHARED=heads // shared, DIM=dim, TILE=launches.query_tile(dim), SPLITS=splits,
        ROTATED=angles is not None, PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    if splits > 1:
        join[(batch * heads,)](
            parts, out, SPLITS=splits, PADDED=launches.power_of_two(splits), DIM=dim, PDL=early, num_warps=4,
            launch_pdl=early,
        )  # fmt: skip
    return out


@attention.register_fake
def _(q, k, v, keys, values, length, scale, cos=None, sin=None):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


def _rows(x: Tensor) -> Tensor:
    """The same numbers, those of one sequence one after the other."""
    wanted = (x.shape[3], x.shape[3], 1)
    laid = all(x.shape[i + 1] == 1 or x.stride(i + 1) == stride for i, stride in enumerate(wanted))
    return x if laid else x.contiguous()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of each head rotated by angles, as transformers' models of Llama's kind do."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def reference(
    q: Float[Tensor, "b h 1 d"],
    k: Float[Tensor, "b s 1 d"],
    v: Float[Tensor, "b s 1 d"],
    keys: Float[Tensor, "b s n d"],
    values: Float[Tensor, "b s n d"],
    length: Int64[Tensor, ""],
    scale: float,
    cos: Float[Tensor, "c 1 1 d"] | None = None,
    sin: Float[Tensor, "c 1 1 d"] | None = None,
) -> Float[Tensor, "b 1 h d"]:
    """``attention`` in plain torch; reads ``length`` back."""
    if cos is not None and sin is not None:
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    place = int(length)
    keys[:, :, place], values[:, :, place] = k[:, :, 0], v[:, :, 0]
    found = torch.nn.functional.scaled_dot_product_attention(
        q, keys[:, :, : place + 1], values[:, :, : place + 1], scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous()
