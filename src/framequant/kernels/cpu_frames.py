"""The constants of frames as the compiled CPU kernels take them: for few tokens, and for many.

Must not import layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from framequant.frames import FrameOperator, FusionFrame, RandomizedHadamard


@dataclass(frozen=True)
class FrameParts:
    """What a frame of the kernels is made of, in float64; all empty for the identity.

    Attributes:
        signs: of the randomized Hadamard transform, (dim,).
        factors: its Kronecker factors, at most three.
        block: the matrix of each of the fusion frame's ``blocks``, (rows, columns), or None.
        blocks: their number, or 0.
    """

    signs: Float[Tensor, " dim"]
    factors: list[Tensor]
    block: Float[Tensor, "rows columns"] | None
    blocks: int


def frame_parts(frame: FrameOperator) -> FrameParts | None:
    """The parts of a frame, or None if the kernels do not cover it."""
    stages = getattr(frame, "stages", ())
    if not stages:
        return FrameParts(torch.ones(frame.dim, dtype=torch.float64), [], None, 0)
    hadamard = stages[0]
    if not isinstance(hadamard, RandomizedHadamard) or len(stages) > 2 or len(hadamard.factors) > 3:
        return None
    originals = hadamard._constants.originals
    factors = [originals[f"factor{i}"] for i in range(len(hadamard.factors))]
    if len(stages) == 1:
        return FrameParts(originals["signs"], factors, None, 0)
    form = getattr(stages[1], "_form", None)
    if not isinstance(stages[1], FusionFrame) or type(form).__name__ != "_BlockForm" or frame.dim % 2:
        return None
    return FrameParts(originals["signs"], factors, form._constants.originals["block"], form.groups)


def frame_constants(
    frame: FrameOperator, analysis: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Constants and sizes of one direction of a frame, as ``transform_cpu`` takes them, or None if not covered.

    Constants: signs, then the three factors and the block, the first two to multiply from the left and the others
    from the right.
    """
    parts = frame_parts(frame)
    if parts is None:
        return None
    if not parts.factors:
        return np.zeros(0, np.float32), np.array([0, 0, 0, 0, 0, 0, frame.dim, frame.dim], np.int64)
    one = torch.ones(1, 1, dtype=torch.float64)
    factors = [*parts.factors[:-1], *[one] * (3 - len(parts.factors)), parts.factors[-1]]
    left = factors if analysis else [factor.mT for factor in factors]
    constants = [parts.signs, left[0], left[1], left[2].mT]
    outer, inner = (0, 0) if parts.block is None else parts.block.shape
    if parts.block is not None:
        constants.append(parts.block.mT if analysis else parts.block)
    sizes = [*map(len, factors), inner, outer, parts.blocks, frame.dim, frame.num_coefficients]
    return _flat(constants), np.array(sizes, np.int64)


@dataclass(frozen=True)
class LaneConstants:
    """One direction of a frame as ``lanes_cpu`` takes it; see there for the arrays."""

    factors: NDArray[np.float32]
    axes: NDArray[np.int64]
    matrices: NDArray[np.float32]
    block: NDArray[np.float32]
    sizes: NDArray[np.int64]


def lane_constants(frame: FrameOperator, analysis: bool, groups: tuple[int, int] = (0, 0)) -> LaneConstants:
    """Constants of one direction of a frame that ``frame_parts`` covers.

    Args:
        frame: the frame.
        analysis: the direction.
        groups: in which its coefficients are written, see ``lanes_cpu``; for analysis.
    """
    parts = frame_parts(frame)
    assert parts is not None
    axes, matrices, after, scale = [], [], frame.dim, 1.0
    for factor in parts.factors:
        size = len(factor)
        power = size & -size
        odd = size // power
        after //= size
        axes.append((power, odd, after))
        scale /= math.sqrt(power)
        if odd > 1:  # the factor is a Hadamard matrix times this one; both are symmetric, so directions agree
            matrices.append(factor[:odd, :odd] * math.sqrt(power))
    block = [] if parts.block is None else [parts.block if analysis else parts.block.mT]
    outer, inner = (0, 0) if parts.block is None else parts.block.shape
    sizes = [frame.dim, frame.num_coefficients, parts.blocks, inner, outer, *groups]
    return LaneConstants(
        _flat([parts.signs * scale]),
        np.array(axes, np.int64).reshape(-1, 3),
        _flat(matrices),
        _flat(block),
        np.array(sizes, np.int64),
    )


def _flat(parts: list[Tensor]) -> NDArray[np.float32]:
    if not parts:
        return np.zeros(0, np.float32)
    return np.ascontiguousarray(torch.cat([part.flatten() for part in parts]).float().numpy())
