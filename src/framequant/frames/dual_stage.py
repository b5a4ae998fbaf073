"""A unit-norm tight frame in the scaling of ``operator``, with a choice of the dual that decodes.

``DualStage`` turns codes into vectors and is what a checkpoint's harmonic frame builds. Imports no module of ours but
``duals``, ``harmonic``, ``operator`` and ``unit_norm``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.frames.duals import sobolev_dual
from framequant.frames.harmonic import HarmonicFrame
from framequant.frames.operator import Constants, LinearStage, check_last_axis
from framequant.frames.unit_norm import UnitNormFrame


class DualStage:
    """A unit-norm tight frame E in Parseval scaling, ``T = sqrt(d/N) E``, and a dual L of E.

    ``synthesis`` is what decodes codes: L times ``sqrt(N/d)``. With the canonical dual ``(d/N) E^T`` that is ``T^T``,
    and the stage is Parseval. With a Sobolev dual of order ρ it is a left inverse of T but not its adjoint.
    ``analysis`` is always the adjoint of ``synthesis``: what a product in the frame applies to activations,
    ``(L c) · x = c · (L^T x)``.

    Attributes:
        frame: E.
        dim: d.
        num_coefficients: N.
        dual_order: 0 for the canonical dual, else the order of the Sobolev dual.
    """

    def __init__(self, frame: UnitNormFrame, dual_order: int = 0) -> None:
        """Take a frame; a Sobolev dual is computed on first use, by QR of an N x d matrix."""
        self.frame = frame
        self.dim, self.num_coefficients, self.dual_order = frame.dim, frame.size, dual_order
        self._constants: Constants | None = None

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector, in one direction: about 2 N log2 N for an FFT, else N d."""
        size = self.num_coefficients
        fast = self.dual_order == 0 and isinstance(self.frame, HarmonicFrame)
        return 2 * size * size.bit_length() if fast else size * self.dim

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... size"]:
        """Apply the adjoint of ``synthesis`` to the last axis, in the dtype of ``x``."""
        check_last_axis(x, self.dim, "analysis")
        if self.dual_order:
            return x @ self._dual(x)
        return self.frame.analysis(x) * math.sqrt(self.dim / self.num_coefficients)

    def synthesis(self, coefficients: Float[Tensor, "... size"]) -> Float[Tensor, "... dim"]:
        """Apply ``sqrt(N/d) L`` to the last axis: decode codes into the vector they stand for."""
        check_last_axis(coefficients, self.num_coefficients, "synthesis")
        if self.dual_order:
            return coefficients @ self._dual(coefficients).mT
        return self.frame.adjoint(coefficients) * math.sqrt(self.dim / self.num_coefficients)

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "size dim"]:
        """Return the matrix of ``analysis``."""
        if self.dual_order:
            matrix = self._dual(torch.empty(0, dtype=torch.float64)).mT
        else:
            matrix = self.frame.as_matrix() * math.sqrt(self.dim / self.num_coefficients)
        return matrix.to(dtype=dtype, device=device)

    def _dual(self, like: Tensor) -> Float[Tensor, "dim size"]:
        if self._constants is None:
            dual = sobolev_dual(self.frame.as_matrix(), self.dual_order)
            self._constants = Constants(dual=dual * math.sqrt(self.num_coefficients / self.dim))
        return self._constants.like(like)["dual"]


_: type[LinearStage] = DualStage
