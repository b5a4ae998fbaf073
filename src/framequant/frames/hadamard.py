"""Randomized Hadamard transform: an orthogonal, flat, cheap rotation of any dimension.

Random signs, then a flat orthonormal matrix, spread every vector evenly over the coordinates, so that no
coefficient is an outlier. The matrix is a Kronecker product of small dense factors, one for each divisor in
``factor_sizes(dim)``, the first factor acting on the slowest index. A factor of size ``2^a * o`` with o odd
is ``Sylvester(2^a)`` Kronecker ``Hartley(o)``: Walsh-Hadamard matrices have entries of one modulus, and the
discrete Hartley matrix ``(cos + sin)(2 pi i j / o) / sqrt(o)`` is an explicit, symmetric, orthonormal
stand-in where none exists, with entries of modulus at most ``sqrt(2 / o)``.

Applied as one small matrix product per factor, which is how accelerators like it; the factors' order and
content are part of the checkpoint format. Imports no other module of ours but ``operator``, ``signs``,
``spectral_tetris`` (roots of unity) and ``errors``.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from framequant.errors import FrameError
from framequant.frames.operator import MAX_DENSE_ENTRIES, Constants, check_last_axis
from framequant.frames.signs import random_signs
from framequant.frames.spectral_tetris import roots_of_unity

LARGEST_FACTOR = 64
"""Factors are at most this large, save a prime factor that is larger itself."""


def factor_sizes(dim: int) -> list[int]:
    """Split ``dim`` into few, balanced factors of at most ``LARGEST_FACTOR``.

    Odd primes, largest first, are packed into bins (first fit); then each factor of two goes to the
    smallest bin, with as many extra bins as the powers of two need. This rule is part of the file format.

    Args:
        dim: positive integer.

    Returns:
        The factors; their product is ``dim``, and the list is never empty.

    Examples:
        >>> factor_sizes(4096), factor_sizes(768), factor_sizes(11008), factor_sizes(1009)
        ([64, 64], [24, 32], [43, 16, 16], [1009])
    """
    twos = (dim & -dim).bit_length() - 1
    bins: list[int] = []
    for prime in sorted(_prime_factors(dim >> twos), reverse=True):
        for index, size in enumerate(bins):
            if size * prime <= LARGEST_FACTOR:
                bins[index] *= prime
                break
        else:
            bins.append(prime)
    room = sum(max(LARGEST_FACTOR // size, 1).bit_length() - 1 for size in bins)
    largest_power = LARGEST_FACTOR.bit_length() - 1
    bins += [1] * -(-max(twos - room, 0) // largest_power)
    for _ in range(twos):
        bins[bins.index(min(bins))] *= 2
    return bins or [1]


def sylvester(size: int) -> NDArray[np.float64]:
    """Return the orthonormal Walsh-Hadamard matrix of a power of two: (-1)^<i, j> over the binary digits."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def hartley(size: int) -> NDArray[np.float64]:
    """Return the orthonormal discrete Hartley matrix, ``(cos + sin)(2 pi i j / size) / sqrt(size)``."""
    cosines, sines = roots_of_unity(size)
    phases = np.outer(np.arange(size), np.arange(size)) % size
    return (cosines + sines)[phases] / math.sqrt(size)


class RandomizedHadamard:
    """The orthogonal map ``x -> M (s * x)``, with random signs s and a flat Kronecker product M.

    Attributes:
        dim: number of coordinates, and of coefficients.
        factors: sizes of the Kronecker factors, slowest index first.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        """Build the signs and factors.

        Args:
            dim: any positive integer whose prime factors are at most 16384.
            seed: unsigned 64-bit seed of the signs.

        Raises:
            FrameError: if ``dim`` is not positive, has too large a prime factor, or ``seed`` is out of range.
        """
        if dim < 1:
            raise FrameError(f"a randomized Hadamard transform needs dim >= 1, not {dim}.")
        self.dim = self.num_coefficients = dim
        self.factors = factor_sizes(dim)
        if max(self.factors) ** 2 > MAX_DENSE_ENTRIES:
            raise FrameError(
                f"dim={dim} has the prime factor {max(self.factors)}, whose dense matrix would not fit in "
                f"memory; use a dim without prime factors above {math.isqrt(MAX_DENSE_ENTRIES)}."
            )
        matrices = {f"factor{i}": torch.from_numpy(_factor(size)) for i, size in enumerate(self.factors)}
        self._constants = Constants(signs=random_signs(dim, seed), **matrices)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector: dim times (1 + the sum of the factors)."""
        return self.dim * (1 + sum(self.factors))

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Apply ``M diag(s)`` to the last axis.

        Args:
            x: any leading shape, any floating dtype; computed in that dtype.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            FrameError: if the last axis is not ``dim`` long or the dtype is not floating.
        """
        check_last_axis(x, self.dim, "analysis")
        constants = self._constants.like(x)
        return self._kronecker(x * constants["signs"], constants, transpose=False)

    def synthesis(self, coefficients: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Apply the transpose, which is the inverse; arguments and errors as for ``analysis``."""
        check_last_axis(coefficients, self.dim, "synthesis")
        constants = self._constants.like(coefficients)
        return self._kronecker(coefficients, constants, transpose=True) * constants["signs"]

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "dim dim"]:
        """Return the dense matrix, the Kronecker product with its columns signed."""
        originals = self._constants.originals
        factors = [originals[f"factor{i}"] for i in range(len(self.factors))]
        matrix: Tensor = reduce(torch.kron, factors) * originals["signs"]
        return matrix.to(dtype=dtype, device=device)

    def _kronecker(self, x: Tensor, constants: dict[str, Tensor], transpose: bool) -> Tensor:
        """Multiply each axis of ``x``, seen as a tensor of shape (..., *factors), by its factor."""
        after, last = self.dim, len(self.factors) - 1
        for i, size in enumerate(self.factors):
            after //= size
            matrix = constants[f"factor{i}"]
            if i == last:  # the factor multiplies from the right, hence the other way round
                x = (x.unflatten(-1, (-1, size)) @ (matrix if transpose else matrix.mT)).flatten(-2)
            else:
                x = ((matrix.mT if transpose else matrix) @ x.unflatten(-1, (-1, size, after))).flatten(-3)
        return x


def _factor(size: int) -> NDArray[np.float64]:
    power = size & -size
    return np.asarray(np.kron(sylvester(power), hartley(size // power)), dtype=np.float64)


def _prime_factors(number: int) -> list[int]:
    primes, candidate = [], 2
    while candidate * candidate <= number:
        while number % candidate == 0:
            primes.append(candidate)
            number //= candidate
        candidate += 1
    return primes + [number] * (number > 1)
