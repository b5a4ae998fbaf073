"""Several linears that read one input, on a GPU: one analysis, one product of all their rows, a synthesis each.

The codes of the linears are rows of one matrix of words, which is all that is kept of them: ``stored`` gives a
linear's bytes back. Outputs are those of the single linears up to the order in which partial sums are added.

Must not import layers. Imports triton through the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from framequant import storage
from framequant.kernels import triton_linear
from framequant.kernels import triton_ops as operators
from framequant.kernels.triton_linear import TritonPlan
from framequant.kernels.words import stored_bytes


@dataclass(frozen=True)
class GroupPlan:
    """The constants of linears with one input frame on their device.

    Attributes:
        members: plan of each linear; their words and scales are rows of the group's.
        rows: of each linear in the product, padding included.
        words: of all linears, one below the other.
        scales: one for each row, or one for all if there is but one linear.
    """

    members: tuple[TritonPlan, ...]
    rows: tuple[int, ...]
    words: Tensor
    scales: Tensor


def can_join(plans: Sequence[TritonPlan]) -> bool:
    """Whether one product can serve these linears: like codes and coefficients from one analysis."""
    first = plans[0]
    return all(
        plan.spec.frame_in == first.spec.frame_in
        and plan.layout == first.layout
        and plan.words.shape[1:] == first.words.shape[1:]
        and plan.words.device == first.words.device
        for plan in plans
    )


def join(plans: Sequence[TritonPlan]) -> GroupPlan:
    """Put the codes of linears for which ``can_join`` holds into one matrix.

    Args:
        plans: of the linears. One alone keeps its tensors; of several the words are copied.
    """
    rows = tuple(len(plan.words) for plan in plans)
    if len(plans) == 1:
        return GroupPlan(tuple(plans), rows, plans[0].words, plans[0].scales)
    words = torch.cat([plan.words for plan in plans])
    scales = torch.cat([_row_scales(plan) for plan in plans])
    return arrange(plans, words, scales)


def arrange(plans: Sequence[TritonPlan], words: Tensor, scales: Tensor) -> GroupPlan:
    """The group of linears whose words and scales are the given ones, one below the other."""
    rows = tuple(len(plan.words) for plan in plans)
    if len(plans) == 1:
        return GroupPlan((replace(plans[0], words=words, scales=scales),), rows, words, scales)
    members = tuple(
        replace(plan, words=part, scales=scale[: plan.spec.coefficient_shape[0]])
        for plan, part, scale in zip(plans, words.split(rows), scales.split(rows), strict=True)
    )
    return GroupPlan(members, rows, words, scales)


def _row_scales(plan: TritonPlan) -> Tensor:
    """A scale for each row of words; the rows that pad a trellis have 0."""
    scales = torch.zeros((len(plan.words), 1), dtype=plan.scales.dtype, device=plan.scales.device)
    scales[: plan.spec.coefficient_shape[0]] = plan.scales
    return scales


def stored(plan: TritonPlan) -> dict[str, Tensor]:
    """The stored tensors of a member, as its ``FrameLinear`` had them; new tensors."""
    words = plan.words if plan.layout.trellis else plan.words.view(torch.int16)
    shape = storage.layout(plan.spec)["scales"][0]
    return {
        "packed_codes": stored_bytes(words, plan.spec, plan.layout),
        "scales": plan.scales[: shape[0]].clone(),
    }


def linears(group: GroupPlan, inputs: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b o"], ...]:
    """Apply all linears; ``triton_linear.takes(inputs)`` holds. New tensors of the inputs' dtype."""
    if len(group.members) == 1:
        return (triton_linear.linear(group.members[0], inputs),)
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    first = group.members[0]
    into = first.into
    z, unit, sums = operators.analysis(
        x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm, first.interleave, first.count,
        not first.layout.trellis,
    )  # fmt: skip
    u = operators.product(
        group.words, z, sums, group.scales, len(group.words), first.numbers, first.layout.factor
    )
    outputs, start = [], 0
    for plan, rows in zip(group.members, group.rows, strict=True):
        out, size = plan.out, plan.spec.out_features
        y = operators.synthesis(
            u[:, :, start : start + rows], unit, out.signs, list(out.matrices), [*out.sizes, *out.padded], out.norm,
            size, plan.bias, inputs.dtype,
        )  # fmt: skip
        outputs.append(y.view(*inputs.shape[:-1], size))
        start += rows
    return tuple(outputs)
