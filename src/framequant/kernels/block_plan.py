"""An output frame that is local to blocks of rows, as the kernels apply it at the end of a product: no triton.

With ``T_out = (I ⊗ H_b) P diag(s)`` a program that has b rows of ``D̃ z`` has what b outputs need. Must not import
layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float16, Float32, Int8, Int32
from torch import Tensor

from framequant.frames import BlockHadamard, ComposedFrame, FrameOperator
from framequant.frames.block_hadamard import chunk_size
from framequant.kernels.transform_plan import TransformPlan, shared_block, transform_plan

#: Sizes of a block that the kernels take: sides of a tensor-core tile, rows of a program.
BLOCKS = (16, 32, 64, 128)
FOLD_BLOCK, FOLD_WIDTH = 32, 128  # of panels with the frame in them: rows of a block, coordinates of a unit


@dataclass(frozen=True)
class BlockPlan:
    """Constants of synthesis in blocks.

    Attributes:
        block: rows of a block.
        ends: one past the last row of each chunk: a chunk's rows make the outputs in its place.
        places: (rows,) the output that each rotated row is.
        signs: (rows,) +1 and -1, of the rotated rows.
        matrix: Sylvester's matrix of a block, +1 and -1; symmetric.
    """

    block: int
    ends: tuple[int, ...]
    places: Int32[Tensor, " rows"]
    signs: Int8[Tensor, " rows"]
    matrix: Float16[Tensor, "b b"]

    @property
    def norm(self) -> float:
        """What the result is multiplied by."""
        return 1.0 / math.sqrt(self.block)


def block_plan(frame: FrameOperator, device: torch.device | str) -> BlockPlan | None:
    """Plan the synthesis of a frame that is local to blocks; None for other frames, and other sizes of blocks."""
    stages = getattr(frame, "stages", ())
    if len(stages) != 1 or not isinstance(stages[0], BlockHadamard) or stages[0].block not in BLOCKS:
        return None
    constants, block = stages[0]._constants.originals, stages[0].block
    order, size = constants["order"], chunk_size(frame.dim, block)
    return BlockPlan(
        block,
        tuple(range(size, frame.dim + 1, size)),
        order.to(device=device, dtype=torch.int32),
        constants["signs"][order].to(device=device, dtype=torch.int8),
        (constants["matrix"] * math.sqrt(block)).round().to(device=device, dtype=torch.float16),
    )


def joined_plan(plans: Sequence[BlockPlan]) -> BlockPlan:
    """One plan for the rows of several linears, with blocks of one size, one below the other."""
    starts = list(accumulate((len(plan.places) for plan in plans), initial=0))
    return BlockPlan(
        plans[0].block,
        tuple(start + end for start, plan in zip(starts, plans, strict=False) for end in plan.ends),
        torch.cat([plan.places + start for start, plan in zip(starts, plans, strict=False)]),
        torch.cat([plan.signs for plan in plans]),
        plans[0].matrix,
    )


@dataclass(frozen=True)
class FoldPlan:
    """Constants of panels whose rows have the frame's block multiplied into them (``panel_fold_triton``).

    Attributes:
        into: analysis without the frame.
        block: (20, 16): the frame's block times the first of ``fold_gain``, halves, and twice what codes of -1.5 make.
    """

    into: TransformPlan
    block: Float32[Tensor, "20 16"]


def fold_gain(factor: float) -> tuple[float, float]:
    """What levels of two-bit codes are multiplied by in a fold: a number from 1/2 to 1, and a power of two."""
    fraction, exponent = math.frexp(factor / 4 / math.sqrt(FOLD_BLOCK))
    return fraction, math.ldexp(1.0, exponent)


def fold_plan(frame: FrameOperator, factor: float, device: torch.device | str) -> FoldPlan | None:
    """Plan the fold of a frame after a Hadamard transform; None for other frames, and blocks that are not 18 by 16.

    Rows must be whole units of eight groups of coefficients.

    Args:
        frame: of the inputs.
        factor: of the codes' ``WordLayout``.
        device: of the constants.
    """
    stages = getattr(frame, "stages", ())
    block = shared_block(stages[1]) if len(stages) == 2 else None
    if block is None or tuple(block.shape) != (18, 16) or frame.dim % FOLD_WIDTH:
        return None
    into = transform_plan(ComposedFrame(frame.spec, stages[:1]), True, device)
    if into is None:
        return None
    rounded = (block * fold_gain(factor)[0]).half().double()
    constants = torch.cat([rounded, -1.5 * rounded.sum(0).expand(2, -1)])
    return FoldPlan(into, constants.to(device, torch.float32))
