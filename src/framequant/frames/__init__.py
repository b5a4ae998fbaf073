"""Linear algebra of frames: Parseval analysis operators, which exist, how they are built and applied.

``choose_frame`` turns a redundancy into a spec, ``build_frame`` turns a spec into an operator: the identity,
a randomized Hadamard transform of all coordinates or of blocks of them, a tight fusion frame after one, or a
harmonic frame, with the conventions of ``operator``. Unit-norm tight frames as Sigma-Delta quantization has them are in
``harmonic`` and ``unit_norm``.

No quantization and no ``nn.Module`` in this package; of ours it imports nothing but ``errors``.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.frames.block_hadamard import BlockHadamard, block_frame
from framequant.frames.choose import choose_frame
from framequant.frames.dual_stage import DualStage
from framequant.frames.fusion_frame import FusionFrame
from framequant.frames.hadamard import RandomizedHadamard
from framequant.frames.harmonic import HarmonicFrame, frame_size
from framequant.frames.operator import FrameKind, FrameOperator, FrameSpec, LinearStage, check_last_axis
from framequant.frames.signs import derive_seed, random_signs
from framequant.frames.spectral_tetris import tight_fusion_frame_exists

__all__ = [
    "BlockHadamard",
    "ComposedFrame",
    "DualStage",
    "FrameKind",
    "FrameOperator",
    "FrameSpec",
    "FusionFrame",
    "HarmonicFrame",
    "RandomizedHadamard",
    "block_frame",
    "build_frame",
    "choose_frame",
    "derive_seed",
    "frame_size",
    "harmonic_stage",
    "random_signs",
    "tight_fusion_frame_exists",
]


class ComposedFrame:
    """The operator of a spec: its stages applied in order, none at all for the identity.

    A composition of Parseval maps is Parseval, since the transposes cancel from the inside out.

    Attributes:
        spec: the description this operator was built from.
        dim: number of coordinates.
        num_coefficients: number of coefficients.
        redundancy: true ``num_coefficients / dim``.
        stages: the maps, the one applied first by ``analysis`` first.
    """

    def __init__(self, spec: FrameSpec, stages: tuple[LinearStage, ...]) -> None:
        self.spec, self.stages = spec, stages
        self.dim, self.num_coefficients = spec.dim, spec.num_coefficients
        self.redundancy = spec.redundancy

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector, in one direction."""
        return sum(stage.multiply_adds for stage in self.stages)

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... coefficients"]:
        """Apply ``T`` to the last axis.

        Args:
            x: any leading shape, any floating dtype; computed in that dtype, so a caller who wants half
                inputs transformed in float32 casts them first.

        Returns:
            ``(..., num_coefficients)``, same dtype and device; ``x`` itself for the identity.

        Raises:
            FrameError: if the last axis is not ``dim`` long or the dtype is not floating.
        """
        check_last_axis(x, self.dim, "analysis")
        for stage in self.stages:
            x = stage.analysis(x)
        return x

    def synthesis(self, coefficients: Float[Tensor, "... coefficients"]) -> Float[Tensor, "... dim"]:
        """Apply ``T^T``, adjoint and left inverse, to the last axis; errors as for ``analysis``."""
        check_last_axis(coefficients, self.num_coefficients, "synthesis")
        for stage in reversed(self.stages):
            coefficients = stage.synthesis(coefficients)
        return coefficients

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "coefficients dim"]:
        """Return ``T`` densely: the product of the stages' matrices, in float64 before the cast."""
        matrix = torch.eye(self.dim, dtype=torch.float64, device="cpu")
        for index, stage in enumerate(self.stages):
            matrix = stage.as_matrix() @ matrix if index else stage.as_matrix()
        return matrix.to(dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"ComposedFrame({self.spec})"


@functools.lru_cache(maxsize=4)
def harmonic_stage(spec: FrameSpec) -> DualStage:
    """The decoder of a harmonic spec; the last few are kept, since a Sobolev dual is worth it."""
    return DualStage(HarmonicFrame(spec.dim, spec.num_subspaces, spec.seed), spec.dual_order)


def build_frame(spec: FrameSpec) -> FrameOperator:
    """Build the operator that a spec describes; equal specs give equal operators.

    Args:
        spec: the description.

    Returns:
        The operator, with float64 constants on the CPU; casts are made and kept on first use.

    Raises:
        FrameError: if the tight fusion frame does not exist (the message names one that does), or an operator
            of these sizes is too large to build.
    """
    stages: list[LinearStage] = []
    if spec.kind is FrameKind.HARMONIC:
        return ComposedFrame(spec, (harmonic_stage(spec),))
    if spec.kind is FrameKind.BLOCK_HADAMARD:
        return ComposedFrame(spec, (BlockHadamard(spec.dim, spec.subspace_dim, spec.seed),))
    if spec.kind is FrameKind.FUSION:
        # The fusion frame first: its refusals come before anything is allocated.
        stages.append(FusionFrame(spec.dim, spec.num_subspaces, spec.subspace_dim))
    if spec.kind is not FrameKind.IDENTITY:
        stages.insert(0, RandomizedHadamard(spec.dim, spec.seed))
    return ComposedFrame(spec, tuple(stages))
