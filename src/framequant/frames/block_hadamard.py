"""Hadamard transforms in blocks of few coordinates: the other rotation on the output side of a linear.

Random signs, a random order within chunks, then ``I ⊗ H_b``. A linear whose output rotation is local can be finished by
whoever has ``b`` rows of its product, so a GPU's product ends with its outputs instead of handing all rows to a launch
of their own. The order is there since neighbours resemble each other: the outputs of one attention head are larger than
those of another, and a code with one scale for a matrix wants blocks of equal energy. It stays within chunks so that a
bounded piece of the matrix has whole blocks and what they make.

As a fusion frame this is the orthogonal decomposition into subspaces of ``b`` coordinates each.

Imports no other module of ours but ``hadamard``, ``operator``, ``signs`` and ``errors``.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.errors import FrameError
from framequant.frames.hadamard import sylvester
from framequant.frames.operator import (
    MAX_BLOCK,
    Constants,
    FrameKind,
    FrameSpec,
    check_last_axis,
    is_block_size,
)
from framequant.frames.signs import random_signs, splitmix64

LARGEST_CHUNK = 2048
"""Coordinates that are put in order together, at most: part of the file format."""


def block_frame(dim: int, block: int, seed: int = 0) -> FrameSpec:
    """The Hadamard transform in blocks, or of all coordinates where ``block`` does not divide them.

    Args:
        dim: number of coordinates.
        block: size of a block, a power of two from 2 to ``MAX_BLOCK``.
        seed: unsigned 64-bit seed of the random signs.

    Raises:
        FrameError: ``block`` is no size of a block, or another argument is out of range.

    Examples:
        >>> block_frame(4096, 64).num_subspaces, block_frame(100, 64).kind.value
        (64, 'hadamard')
    """
    if not is_block_size(block):
        raise FrameError(f"a block has a power of two of coordinates, 2 to {MAX_BLOCK}, not {block!r}.")
    if dim % block:
        return FrameSpec(FrameKind.HADAMARD, dim, seed=seed)
    return FrameSpec(FrameKind.BLOCK_HADAMARD, dim, dim // block, block, seed)


def chunk_size(dim: int, block: int) -> int:
    """Largest divisor of ``dim`` that ``block`` divides and that is at most ``LARGEST_CHUNK``; part of the format.

    Args:
        dim: a multiple of ``block``.
        block: at most ``LARGEST_CHUNK``.

    Examples:
        >>> chunk_size(4096, 32), chunk_size(11008, 32), chunk_size(576, 64)
        (2048, 1376, 576)
    """
    count = dim // block
    return block * max(k for k in range(1, min(count, LARGEST_CHUNK // block) + 1) if count % k == 0)


def random_order(dim: int, block: int, seed: int) -> Int[Tensor, " dim"]:
    """The coordinate that each place takes: a block has one out of every ``block``-th part of its chunk.

    Which one is random: the parts' coordinates are ranked by the low 63 bits of their SplitMix64 words (top bits are
    the signs), and block j takes those of rank j. So neighbours, which resemble each other, are dealt out evenly.

    Args:
        dim: a multiple of ``block``.
        block: at most ``LARGEST_CHUNK``.
        seed: unsigned 64-bit seed, that of the signs.

    Returns:
        A new int64 tensor on the CPU.
    """
    words = splitmix64(dim, seed) & np.uint64((1 << 63) - 1)
    parts = words.reshape(-1, block, chunk_size(dim, block) // block)
    starts = np.arange(0, dim, parts.shape[2]).reshape(-1, block, 1)
    order = np.argsort(parts, axis=2, kind="stable") + starts
    return torch.from_numpy(order.astype(np.int64).swapaxes(1, 2).reshape(-1))


class BlockHadamard:
    """The orthogonal map ``x -> (I ⊗ H_b) P (s * x)``: random signs s, a random order P, Sylvester's matrix H_b.

    Attributes:
        dim: number of coordinates, and of coefficients.
        block: b, coordinates of a block.
    """

    def __init__(self, dim: int, block: int, seed: int = 0) -> None:
        """Build the signs, the order and the matrix of a block.

        Args:
            dim: a multiple of ``block``.
            block: a power of two from 2 to ``MAX_BLOCK``.
            seed: unsigned 64-bit seed of the signs and the order.

        Raises:
            FrameError: ``block`` is no size of a block, or does not divide ``dim``.
        """
        if not is_block_size(block) or dim < 1 or dim % block:
            raise FrameError(
                f"no blocks of {block!r} coordinates, a power of two up to {MAX_BLOCK}, divide dim={dim}."
            )
        self.dim = self.num_coefficients = dim
        self.block = block
        order = random_order(dim, block, seed)
        self._constants = Constants(
            signs=random_signs(dim, seed),
            order=order,
            places=order.argsort(),
            matrix=torch.from_numpy(sylvester(block)),
        )

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector: dim times (1 + the size of a block)."""
        return self.dim * (1 + self.block)

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Apply ``(I ⊗ H_b) P diag(s)`` to the last axis.

        Args:
            x: any leading shape, any floating dtype; computed in that dtype.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            FrameError: the last axis is not ``dim`` long or the dtype is not floating.
        """
        check_last_axis(x, self.dim, "analysis")
        constants = self._constants.like(x)
        return self._rotated((x * constants["signs"])[..., constants["order"]], constants["matrix"])

    def synthesis(self, coefficients: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Apply the transpose, which is the inverse; arguments and errors as for ``analysis``."""
        check_last_axis(coefficients, self.dim, "synthesis")
        constants = self._constants.like(coefficients)
        rotated = self._rotated(coefficients, constants["matrix"])
        return rotated[..., constants["places"]] * constants["signs"]

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "dim dim"]:
        """Return the dense matrix: blocks on the diagonal, its columns put in order and signed."""
        originals = self._constants.originals
        copies = torch.eye(self.dim // self.block, dtype=torch.float64, device="cpu")
        matrix = torch.kron(copies, originals["matrix"])[:, originals["places"]] * originals["signs"]
        return matrix.to(dtype=dtype, device=device)

    def _rotated(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Multiply each block by the matrix, which is symmetric: analysis and synthesis share this."""
        return (x.unflatten(-1, (-1, self.block)) @ matrix).flatten(-2)
