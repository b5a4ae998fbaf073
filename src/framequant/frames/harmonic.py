"""Harmonic unit-norm tight frames: a truncated Fourier transform, applied by the FFT.

``e_j = sqrt(2/d) [cos(2 pi k j / N), sin(2 pi k j / N)]`` for k = 1 … d/2, and for odd d a constant ``1/sqrt(2)``
before them (k then ends at (d - 1)/2). The N vectors have norm one, ``E^T E = (N/d) I``, and for even d they add up
to zero. Consecutive vectors are close, which is what Sigma-Delta quantization lives from.

With a ``seed`` the coordinates get random signs first. That is another frame with the same laws, Gram matrix and
variation; but coordinates that resemble their neighbours, as weights on pixels do, no longer add up to a peak at one
vector, which a Sigma-Delta quantizer would need a large step for.

Imports no module of ours but ``operator``, ``signs``, ``spectral_tetris`` (roots of unity) and ``errors``.

References:
    Goyal, Vetterli, Thao, "Quantized overcomplete expansions in R^N", IEEE Trans. Inf. Theory 44, 1998.
    Benedetto, Powell, Yılmaz, "Sigma-Delta quantization and finite frames", IEEE Trans. Inf. Theory 52, 2006.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import FrameError
from framequant.frames.operator import MAX_COEFFICIENTS, MAX_DENSE_ENTRIES, Constants, check_last_axis
from framequant.frames.signs import random_signs
from framequant.frames.spectral_tetris import roots_of_unity


def smallest_size(dim: int) -> int:
    """Return the least N of a harmonic frame of R^dim: d for odd d, d + 1 for even d.

    With N = d and d even, the last sine is zero at every j, so that nothing spans its coordinate.
    """
    return dim + 1 if dim % 2 == 0 else dim


def frame_size(dim: int, ratio: float) -> int:
    """Return the number of vectors N of the harmonic frame of R^dim whose N/d is nearest to ``ratio``.

    For even d, N is even: the frame adds up to zero, and with N even the last state of first-order Sigma-Delta
    then vanishes, which takes the boundary term out of its error.

    Args:
        dim: d, positive.
        ratio: N/d, more than 1 (1 itself only for odd d).

    Returns:
        N; where ``ratio`` is above 1 but N = d would come out, the next valid N.

    Raises:
        FrameError: the ratio is below 1, not finite or too large, or is 1 for an even dimension.

    Examples:
        >>> frame_size(784, 8), frame_size(5, 1.5), frame_size(10, 1.01)
        (6272, 8, 12)
    """
    if not math.isfinite(ratio) or ratio < 1:
        raise FrameError(
            f"frame size ratio N/d = {ratio:g} is below 1: N = {ratio * dim:g} vectors cannot span R^{dim}. "
            f"The smallest harmonic frame has N = {smallest_size(dim)} "
            f"(ratio {smallest_size(dim) / dim:.4g}); use a ratio of 2 or more."
        )
    if ratio == 1:
        check_size(dim, dim)
    if dim % 2:
        size = max(round(ratio * dim), dim)
    else:
        size = max(2 * round(ratio * dim / 2), dim + 2)
    check_size(dim, size)
    return size


def check_size(dim: int, size: int) -> None:
    """Refuse sizes for which no harmonic frame exists.

    Raises:
        FrameError: N < d, N = d for even d, or too large; the message names the nearest valid N.
    """
    if dim < 1:
        raise FrameError(f"a harmonic frame needs dim >= 1, not {dim}.")
    least = smallest_size(dim)
    if size < dim:
        raise FrameError(
            f"N = {size} vectors cannot span R^{dim}; the nearest harmonic frame has N = {least}."
        )
    if size < least:
        raise FrameError(
            f"N = d = {size} is impossible for even d: the highest sine vanishes at every point. "
            f"The nearest harmonic frame has N = {least}; N = {least + 1}, being even, adds up to zero as well."
        )
    if size > MAX_COEFFICIENTS:
        raise FrameError(f"N = {size} is too large; the largest frame has {MAX_COEFFICIENTS} vectors.")


class HarmonicFrame:
    """The harmonic frame of ``size`` unit vectors in R^dim.

    Attributes:
        dim: d.
        size: N.
        seed: of the signs; 0 for none.
    """

    def __init__(self, dim: int, size: int, seed: int = 0) -> None:
        """Describe the frame.

        Args:
            dim: d, at least 1.
            size: N ≥ d for odd d, N ≥ d + 1 for even d.
            seed: unsigned 64-bit seed of random signs of the coordinates; 0 leaves them alone.

        Raises:
            FrameError: no such frame exists; the message names the nearest valid N.
        """
        check_size(dim, size)
        self.dim, self.size, self.seed = dim, size, seed
        self._constants = Constants(signs=random_signs(dim, seed)) if seed else None

    @property
    def redundancy(self) -> float:
        """N/d."""
        return self.size / self.dim

    @property
    def sums_to_zero(self) -> bool:
        """Whether the vectors add up to zero: for even d."""
        return self.dim % 2 == 0

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """Return ``<x, e_j>`` for all j by one inverse real FFT.

        Args:
            x: float32 or float64, any leading shape.

        Returns:
            A new tensor (..., size), same dtype and device.

        Raises:
            FrameError: if the last axis is not ``dim`` long or the dtype is not floating.

        Cost:
            N log N per vector.
        """
        check_last_axis(x, self.dim, "analysis")
        if self._constants is not None:
            x = x * self._constants.like(x)["signs"]
        odd = self.dim % 2
        pairs = x[..., odd:].unflatten(-1, (-1, 2)) * (math.sqrt(2 / self.dim) / 2)
        waves = torch.complex(pairs[..., 0], -pairs[..., 1])
        constant = x[..., :1] / math.sqrt(self.dim) if odd else torch.zeros_like(x[..., :1])
        spectrum = torch.cat([torch.complex(constant, torch.zeros_like(constant)), waves], dim=-1)
        return torch.fft.irfft(spectrum, n=self.size, norm="forward")

    def adjoint(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``E^T c`` = Σ c_j e_j by one real FFT; arguments and errors as for ``analysis``."""
        check_last_axis(coefficients, self.size, "adjoint")
        odd, top = self.dim % 2, self.dim // 2
        spectrum = torch.fft.rfft(coefficients)
        waves = spectrum[..., 1 : top + 1] * math.sqrt(2 / self.dim)
        pairs = torch.stack([waves.real, -waves.imag], dim=-1).flatten(-2)
        if odd:
            pairs = torch.cat([spectrum[..., :1].real / math.sqrt(self.dim), pairs], dim=-1)
        return pairs if self._constants is None else pairs * self._constants.like(pairs)["signs"]

    def synthesis(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Return ``(d/N) E^T c``: the canonical dual, a left inverse of ``analysis``."""
        return self.adjoint(coefficients) * (self.dim / self.size)

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "size dim"]:
        """Return E densely from its definition, with phases reduced modulo N as integers: the oracle.

        Raises:
            FrameError: if it would have more than ``MAX_DENSE_ENTRIES`` entries.
        """
        if self.dim * self.size > MAX_DENSE_ENTRIES:
            raise FrameError(f"a dense frame of {self.size} x {self.dim} entries would not fit in memory.")
        cosines, sines = roots_of_unity(self.size)
        phases = np.outer(np.arange(self.size), np.arange(1, self.dim // 2 + 1)) % self.size
        waves = np.stack([cosines[phases], sines[phases]], axis=-1).reshape(self.size, -1)
        constant = np.full((self.size, self.dim % 2), math.sqrt(0.5))
        matrix = torch.from_numpy(np.concatenate([constant, waves], axis=1) * math.sqrt(2 / self.dim))
        if self._constants is not None:
            matrix = matrix * self._constants.originals["signs"]
        return matrix.to(dtype=dtype, device=device)

    def kernel(self) -> Float[Tensor, " size"]:
        """Return ``<e_0, e_j>`` for all j: the Gram matrix is circulant, so this line is all of it; float64."""
        first = torch.zeros(self.dim, dtype=torch.float64)
        first[self.dim % 2 :: 2] = math.sqrt(2 / self.dim)
        if self.dim % 2:
            first[0] = 1 / math.sqrt(self.dim)
        return HarmonicFrame(self.dim, self.size).analysis(first)  # signs do not change products

    def difference_norm(self, order: int) -> float:
        """Return the norm of the order-th difference of consecutive vectors, the same everywhere.

        It is ``sqrt((2/d) Σ_k (2 sin(pi k / N))^(2 order))``, since a difference multiplies wave k by
        ``1 - exp(2 pi i k / N)``.
        """
        top = self.dim // 2
        total = math.fsum((2 * math.sin(math.pi * k / self.size)) ** (2 * order) for k in range(1, top + 1))
        constant = 1.0 / self.dim if self.dim % 2 and order == 0 else 0.0
        return math.sqrt(2 / self.dim * total + constant)

    def variation(self, order: int = 1) -> float:
        """Return the frame variation of an order in closed form; see ``unit_norm.frame_variation``."""
        return max(self.size - order, 0) * self.difference_norm(order)

    def __repr__(self) -> str:
        seed = f", seed={self.seed}" if self.seed else ""
        return f"HarmonicFrame(dim={self.dim}, size={self.size}{seed})"
