"""Several linears that read one input, on a GPU: one analysis and one product of all their rows, then a synthesis each.

Where output frames are local to blocks of rows, the product writes all outputs, and no synthesis follows.

The codes of the linears are rows of one matrix of words, which is all that is kept of them: ``stored`` gives a
linear's bytes back. Outputs are those of the single linears up to the order in which partial sums are added.

Must not import layers. Imports triton through the operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from framequant import storage
from framequant.frames import FrameOperator
from framequant.kernels import launches, reference, triton_linear, tuning
from framequant.kernels.block_plan import BlockPlan, joined_plan
from framequant.kernels.triton_linear import TritonPlan
from framequant.kernels.words import stored_bytes

_verdicts: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True)
class GroupPlan:
    """The constants of linears with one input frame on their device.

    Attributes:
        members: plan of each linear; their words and scales are rows of the group's.
        rows: of each linear in the product, padding included.
        joined: the first plan with the words of all linears, one below the other, and a scale for each of their rows.
    """

    members: tuple[TritonPlan, ...]
    rows: tuple[int, ...]
    joined: TritonPlan


def can_join(plans: Sequence[TritonPlan]) -> bool:
    """Whether one product can serve these linears: like codes and coefficients from one analysis."""
    first = plans[0]
    return all(
        plan.spec.frame_in == first.spec.frame_in
        and plan.layout == first.layout
        and plan.words.shape[1:] == first.words.shape[1:]
        and plan.words.device == first.words.device
        and _block(plan) == _block(first)
        for plan in plans
    )


def _block(plan: TritonPlan) -> int:
    """Rows of a block of an output frame that is local to blocks, else 0."""
    return plan.out.block if isinstance(plan.out, BlockPlan) else 0


def join(plans: Sequence[TritonPlan]) -> GroupPlan:
    """Put the codes of linears for which ``can_join`` holds into one matrix.

    Args:
        plans: of the linears. One alone keeps its tensors; of several the words are copied.
    """
    rows = tuple(plan.rows for plan in plans)
    if len(plans) == 1:
        return GroupPlan(tuple(plans), rows, plans[0])
    words = torch.cat([plan.words for plan in plans])
    scales = torch.cat([_row_scales(plan) for plan in plans])
    parts = words.split([len(plan.words) for plan in plans])
    members = tuple(
        replace(plan, words=part, scales=scale[: plan.spec.coefficient_shape[0]])
        for plan, part, scale in zip(plans, parts, scales.split(rows), strict=True)
    )
    joined = replace(plans[0], words=words, scales=scales, top=triton_linear.power_above(scales))
    blocks = [plan.out for plan in plans if isinstance(plan.out, BlockPlan)]
    if blocks:
        joined = replace(joined, out=joined_plan(blocks), bias=_joined_bias(plans))
    return GroupPlan(members, rows, joined)


def _joined_bias(plans: Sequence[TritonPlan]) -> Tensor | None:
    """The biases of all linears one after the other, 0 where one has none; None if none has."""
    known = [plan.bias for plan in plans if plan.bias is not None]
    if not known:
        return None
    return torch.cat(
        [known[0].new_zeros(plan.spec.out_features) if plan.bias is None else plan.bias for plan in plans]
    )


def _row_scales(plan: TritonPlan) -> Tensor:
    """A scale for each row of coefficients; the rows that pad a trellis have 0."""
    scales = torch.zeros((plan.rows, 1), dtype=plan.scales.dtype, device=plan.scales.device)
    scales[: plan.spec.coefficient_shape[0]] = plan.scales
    return scales


def stored(plan: TritonPlan) -> dict[str, Tensor]:
    """The stored tensors of a member, as its ``FrameLinear`` had them; new tensors."""
    shape = storage.layout(plan.spec)["scales"][0]
    return {
        "packed_codes": stored_bytes(plan.words, plan.spec, plan.layout),
        "scales": plan.scales[: shape[0]].clone(),
        **{name: tensor.clone() for name, tensor in plan.kept.items()},
    }


def linears(group: GroupPlan, inputs: Float[Tensor, "*b n"]) -> tuple[Float[Tensor, "*b o"], ...]:
    """Apply all linears; ``triton_linear.takes(inputs)`` holds. New tensors of the inputs' dtype."""
    if len(group.members) == 1:
        return (triton_linear.linear(group.members[0], inputs),)
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    outputs = triton_linear.products(group.joined, x, tuple(zip(group.members, group.rows, strict=True)))
    return tuple(y.view(*inputs.shape[:-1], y.shape[-1]) for y in outputs)


def plain(
    group: GroupPlan, frames: Sequence[tuple[FrameOperator, FrameOperator]], inputs: Float[Tensor, "*b n"]
) -> tuple[Float[Tensor, "*b o"], ...]:
    """The same in plain torch, decoded tile by tile, for any inputs."""
    coefficients = reference.coefficients(group.joined.spec, {}, frames[0][0], inputs)
    outputs = []
    for plan, (_, frame_out) in zip(group.members, frames, strict=True):
        y = reference.synthesis(frame_out, reference.product(coefficients, plan.spec, stored(plan)))
        outputs.append(y if plan.bias is None else y + plan.bias.to(y.dtype))
    return tuple(outputs)


def is_right(
    group: GroupPlan, frames: Sequence[tuple[FrameOperator, FrameOperator]], dtype: torch.dtype, tokens: int
) -> bool:
    """Whether random tokens come out as in plain torch; asked once for every kind of group, dtype and launch.

    Cost: one decoding of the linears, at first use of their kind. A kind that fails is warned about once.
    """
    plan = group.joined
    tokens = launches.tokens_to_check(tokens, triton_linear.loops(plan, sum(group.rows)))
    kinds = tuple((member.spec.scheme(), member.bias is not None) for member in group.members)
    key = (kinds, dtype, plan.words.device, tokens)
    if key not in _verdicts:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, plan.spec.in_features, generator=generator).to(plan.words.device, dtype)
        exact = torch.cat(plain(group, frames, x.float()), dim=-1)
        times = triton_linear.raised(exact)
        if times > 1:  # biases are as they are
            x = x * times
            exact = torch.cat(plain(group, frames, x.float()), dim=-1)
        problem = tuning.checked(
            lambda: linears(group, x),
            lambda: triton_linear.problem_with(lambda: torch.cat(linears(group, x), dim=-1), lambda: exact),
            plan.words.device,
        )
        if problem:
            shapes = ", ".join(f"{m.spec.out_features} x {m.spec.in_features}" for m in group.members)
            warnings.warn(
                f"The Triton kernels of linears {shapes} ({type(plan.spec.code).__name__}, {dtype}) {problem}; plain "
                "torch is used.",
                RuntimeWarning,
                stacklevel=2,
            )
        _verdicts[key] = not problem
    return _verdicts[key]
