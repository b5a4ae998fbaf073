"""One group of linears quantized by several processes: rows of scalar codes, or whole linears, to each.

With error feedback between columns only, rows do not interact: each rank rounds its share of the rows. Trellis
tiles with feedback from row to row do, so there whole linears are dealt out. What a rank has made is sent to all,
so that every rank holds the same bytes.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from framequant.config import CodeKind, FrameQuantConfig
from framequant.model.ranks import Ranks, split_evenly
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import QuantizedWeight, quantize_group


def quantize_shared(
    weights: Mapping[str, Tensor],
    moments: Moments,
    configs: Mapping[str, FrameQuantConfig],
    group: str,
    ranks: Ranks,
) -> dict[str, QuantizedWeight]:
    """``quantize_group`` by all ranks together.

    Args:
        weights, moments, configs, group: see ``quantize_group``; moments are those of all ranks, and are used up.
        ranks: who shares the work.

    Returns:
        The same results on every rank.
    """
    if ranks.size == 1:
        return quantize_group(weights, moments, configs, group, consume=True)
    if _rows_are_independent(moments, configs):
        found = quantize_group(weights, moments, configs, group, ranks, consume=True)
        return {name: _sent(found[name], 0, ranks) for name in weights}
    shares = split_evenly({name: weight.numel() for name, weight in weights.items()}, ranks.size)
    mine = [name for name in weights if name in shares[ranks.rank]]
    found = {}
    if mine:
        found = quantize_group(
            {name: weights[name] for name in mine}, moments, {name: configs[name] for name in mine}, group
        )
    owners = {name: rank for rank, names in enumerate(shares) for name in names}
    return {name: _sent(found.get(name), owners[name], ranks) for name in weights}


def _rows_are_independent(moments: Moments, configs: Mapping[str, FrameQuantConfig]) -> bool:
    scalar = all(config.code is CodeKind.SCALAR for config in configs.values())
    return scalar and not any(name in moments.output_gram for name in configs)


def _sent(result: QuantizedWeight | None, owner: int, ranks: Ranks) -> QuantizedWeight:
    parts = None if result is None else (result.spec, result.tensors, result.loss)
    spec, tensors, loss = ranks.share(parts, owner)
    return QuantizedWeight(spec, tensors, loss)
