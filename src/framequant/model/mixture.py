"""Mixtures of experts on the walk: which linears are captured together, and what an expert without tokens is given.

Experts of one layer read different tokens of the same tensor, chosen by the router. So the same linear of all
experts (a *family*) is captured in one run of the block, shares an input frame, and an expert that saw fewer tokens
than it has input features is topped up from its fellows. The float model routes its own tokens its own way, so
rows of the two chains cannot be paired: experts get no targets from the float model and no token weights, and
padding, which is routed like any token, counts.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from framequant.model import discovery
from framequant.model.gradients import OutputGradients
from framequant.model.report import QuantizationReport
from framequant.model.trace import Group
from framequant.quantizers.hessian import Moments

#: Bytes of the Hessians of a family that are summed in one run of the block; larger families take several runs.
MOMENT_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
#: An expert counts in the bit budget with at least this share of the tokens of a mean expert.
LEAST_SHARE = 0.1


def with_experts(
    groups: list[Group], selected: Iterable[str], families: Mapping[str, str], tokens: int
) -> list[Group]:
    """Note the families of traced groups, and add experts that the trace did not reach.

    Args:
        groups: from ``trace_block``.
        selected: linears of the block to quantize, by name inside it.
        families: of those that may be experts', by name inside the block; a family whose members all read every token
            shares none out, and is no family of experts.
        tokens: that the traced run had.

    Returns:
        The groups, those of experts one linear each and with ``family`` set.
    """
    rows = {name: group.rows for group in groups for name in group.linears}
    members = {name: families[name] for name in selected if name in families}
    routed = _routed(rows, members, tokens)
    result: list[Group] = []
    for group in groups:
        plain = [name for name in group.linears if members.get(name) not in routed]
        if plain:
            result.append(replace(group, linears=plain))
        result += [
            Group([name], group.calls, family=members[name], rows=group.rows)
            for name in group.linears
            if name not in plain
        ]
    missing = [name for name, family in members.items() if family in routed and name not in rows]
    return result + [Group([name], 0, family=members[name]) for name in missing]


def _routed(seen: Mapping[str, int], members: Mapping[str, str], tokens: int) -> set[str]:
    """Families of whose members some did not see all tokens."""
    return {family for name, family in members.items() if seen.get(name, 0) != tokens}


def stages(groups: Sequence[Group], block: nn.Module, recapture: bool) -> list[list[Group]]:
    """Groups that are captured in one run of the block, in order.

    Args:
        groups: of the block.
        block: for sizes and device.
        recapture: whether each group sees the quantized groups before it; families are kept together.

    Returns:
        Lists of groups; the Hessians of a list's experts take at most ``MOMENT_BYTES``, or are of one expert.
    """
    clusters: dict[str, list[Group]] = {}
    for group in groups:
        key = (group.family or f".{group.name}") if recapture else ""
        clusters.setdefault(key, []).append(group)
    return [part for cluster in clusters.values() for part in _parts(cluster, block)]


def moment_bytes(block: nn.Module, families: Mapping[str, str], device: torch.device) -> int:
    """Bytes that the Hessians of a block's experts take at most at a time, the pool of a family included.

    Args:
        block: on any device.
        families: of the experts' linears, by name inside the block.
        device: where the block will be run.
    """
    sizes: dict[str, list[int]] = {}
    for name, family in families.items():
        features = discovery.linear_weight(block.get_submodule(name)).shape[1]
        sizes.setdefault(family, []).append(4 * features**2)
    return max((min(sum(some), max(_limit(device), some[0])) + some[0] for some in sizes.values()), default=0)


def _limit(device: torch.device) -> int:
    return MOMENT_BYTES.get(device.type, MOMENT_BYTES["cpu"])


def _parts(cluster: list[Group], block: nn.Module) -> list[list[Group]]:
    parts: list[list[Group]] = [[]]
    used = 0
    for group in cluster:
        weight = discovery.linear_weight(block.get_submodule(group.name))
        size = 4 * weight.shape[1] ** 2 if group.family else 0
        limit = _limit(weight.device)
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(group)
        used += size
    return parts


def top_up(
    totals: Mapping[str, Moments], stage: Iterable[Group], pools: dict[str, Moments]
) -> dict[str, int]:
    """Complete the moments of experts that saw fewer tokens than they have input features.

    With n tokens of d needed, ``Σ x xᵀ`` gets (d - n) times the mean over the family's tokens: n = 0 gives the shared
    Hessian, n = d its own. A family without any token keeps its empty moments, whose Hessian is the identity.

    Args:
        totals: by group name, updated.
        stage: the groups that were captured.
        pools: sums over each family, updated; a family that takes several stages goes on where it was.

    Returns:
        For each group that was topped up or left empty, the tokens that it saw itself.
    """
    experts = [group for group in stage if group.family]
    for group in experts:
        own = totals[group.name]
        pool = pools.setdefault(group.family, Moments(own.features))
        if own.hessian_sum is not None:
            pool.count += own.count
            pool.hessian_sum = (
                own.hessian_sum if pool.hessian_sum is None else pool.hessian_sum + own.hessian_sum
            )
    few: dict[str, int] = {}
    for group in experts:
        own, pool = totals[group.name], pools[group.family]
        lacking = own.features - own.count
        if lacking <= 0:
            continue
        few[group.name] = own.count
        if pool.hessian_sum is not None and pool.count:
            share = pool.hessian_sum * (lacking / pool.count)
            own.hessian_sum = share if own.hessian_sum is None else own.hessian_sum + share
            own.count += lacking
    return few


def tokens_seen(gradients: Mapping[str, OutputGradients]) -> dict[str, int]:
    """Tokens whose gradients reached each linear."""
    return {name: sum(len(part) for part in found.squares.values()) for name, found in gradients.items()}


def expert_shares(seen: Mapping[str, int], families: Mapping[str, str]) -> dict[str, float]:
    """How often each expert is used.

    Args:
        seen: tokens that reached each linear.
        families: family of each expert's linear.

    Returns:
        For each expert's linear the share of the model's tokens that pass it, by which its errors count.
    """
    total = max(seen.values(), default=0)
    routed = _routed(seen, families, total)
    shares: dict[str, float] = {}
    for family, names in _members(families).items():
        used = sum(seen.get(name, 0) for name in names)
        if family in routed and used:
            least = LEAST_SHARE * (used / len(names))
            shares |= {name: max(seen.get(name, 0), least) / total for name in names}
    return shares


def pooled_gradients(
    gradients: Mapping[str, OutputGradients], seen: Mapping[str, int], families: Mapping[str, str]
) -> dict[str, OutputGradients]:
    """Gradients for experts that no token reached: their family's, where it has any.

    Args:
        gradients: of the linears that tokens reached.
        seen: tokens that reached each linear.
        families: family of each expert's linear.
    """
    found: dict[str, OutputGradients] = {}
    for names in _members(families).values():
        reached = [name for name in names if seen.get(name)]
        if reached and len(reached) < len(names):
            pooled = _pooled([gradients[name] for name in reached])
            found |= {name: pooled for name in names if name not in reached}
    return found


def _members(families: Mapping[str, str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for name, family in families.items():
        members.setdefault(family, []).append(name)
    return members


def _pooled(parts: Sequence[OutputGradients]) -> OutputGradients:
    squares = [values for part in parts for values in part.squares.values()]
    return OutputGradients(
        gram_sum=_sum(part.gram_sum for part in parts),
        input_sum=_sum(part.input_sum for part in parts),
        input_square=sum(part.input_square for part in parts),
        squares={0: torch.cat(squares)} if squares else {},
        count=sum(part.count for part in parts),
        inputs=sum(part.inputs for part in parts),
    )


def _sum(tensors: Iterable[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        if tensor is not None:
            total = tensor.clone() if total is None else total.add_(tensor)
    return total


def _number(name: str, family: str) -> str:
    """The expert's part of a linear's name: what its family's name lacks."""
    parts = name.split(".")
    return next(p for i, p in enumerate(parts) if ".".join(parts[:i] + parts[i + 1 :]) == family)


def warn_of_fallbacks(report: QuantizationReport, few: Mapping[str, tuple[int, str]]) -> None:
    """List the experts that saw too few tokens: in their entries and, by family, among the warnings.

    Args:
        report: updated.
        few: by linear, the tokens that it saw and its family.
    """
    by_family: dict[str, list[str]] = {}
    for entry in report.linears:
        if entry.name in few:
            tokens, family = few[entry.name]
            entry.details["hessian"] = "topped up from the layer's experts" if entry.tokens else "identity"
            entry.tokens = tokens
            by_family.setdefault(family, []).append(f"{_number(entry.name, family)} ({tokens})")
    for family, numbers in by_family.items():
        report.warnings.append(
            f"{family}: {len(numbers)} experts saw fewer calibration tokens than they have input features; their "
            "Hessians were topped up from the layer's other experts, if these saw any. More calibration data helps. "
            f"Expert (tokens): {', '.join(numbers)}."
        )
