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
from jaxtyping import Float16, Float64, Int8, Int32
from torch import Tensor

from framequant.frames import BlockHadamard, ComposedFrame, FrameOperator
from framequant.frames.block_hadamard import chunk_size
from framequant.kernels.transform_plan import TransformPlan, shared_block, transform_plan

#: Sizes of a block that the kernels take: sides of a tensor-core tile, rows of a program.
BLOCKS = (16, 32, 64, 128)
FOLD_BLOCK, FOLD_WIDTH = 32, 128  # of panels with the frame in them: rows of a block, coordinates of a unit
#: What the entries of the frame's block are multiplied by there: they are at most 1, so these are halves.
FOLD_LIFT = 2.0**15


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
        lanes: (32, 16): what each lane of a warp has of the frame's block, from ``fold_lanes``.
    """

    into: TransformPlan
    lanes: Int32[Tensor, "32 16"]


def fold_gain(factor: float) -> tuple[float, float]:
    """What levels of two-bit codes are multiplied by in a fold: a number from 1/2 to 1, and a power of two."""
    return fraction_and_power(factor / 4 / math.sqrt(FOLD_BLOCK))


def fraction_and_power(number: float) -> tuple[float, float]:
    """A number from 1/2 to 1, and a power of two, whose product is a positive ``number``."""
    fraction, exponent = math.frexp(number)
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
    return FoldPlan(into, fold_lanes(block * fold_gain(factor)[0]).to(device))


def fold_lanes(block: Float64[Tensor, "18 16"]) -> Int32[Tensor, "32 16"]:
    """Registers of each lane of a warp: left operands of the transposed block, as it meets codes masked where they lie.

    Four codes of a byte are 1, 4, 16 and 64 times as large as in the lowest place, and a lane's two begin with the
    first or the third. So of 16 coefficients: four words each of those that begin there in even lanes, and in odd
    ones; two of the last coefficients; two for each coordinate of what codes of -1.5 make, float32; two of no use.
    """
    lane = torch.arange(32)
    row, quarter = lane // 4, lane % 4
    rounded = block.half().double() * FOLD_LIFT

    def pair(coefficient: Tensor, coordinate: Tensor, third: Tensor) -> Tensor:
        first, second = rounded[coefficient, coordinate], rounded[coefficient + 1, coordinate]
        return (torch.stack([first, second / 4], 1) / 16.0 ** third[:, None]).half().view(torch.int32)[:, 0]

    words = [
        pair(8 * k + 2 * quarter, row + 8 * m, third)
        for third in (quarter % 2, 1 - quarter % 2)
        for k in range(2)
        for m in range(2)
    ]
    words += [pair(torch.full_like(lane, 16), row + 8 * m, quarter % 2) for m in range(2)]
    level = (-1.5 * 2.0**-24 * rounded.sum(0)).float().view(torch.int32)
    words += [level[row], level[row], level[row + 8], level[row + 8], lane * 0, lane * 0]
    return torch.stack([word.to(torch.int32) for word in words], 1)
