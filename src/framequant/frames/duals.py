"""Dual frames that decode Sigma-Delta codes, dense, and the norms that bound their error.

With E the N x d matrix of frame vectors, a dual L (d x N) has ``L E = I``. Sigma-Delta of order ρ leaves
``E x - q = D^ρ u`` with bounded states u, where ``(D u)_n = u_n - u_{n-1}`` and ``u_0 = 0``; decoding by L therefore
leaves the error ``L D^ρ u``, and every bound is a norm of ``L D^ρ``. The canonical dual ``(d/N) E^T`` makes ``‖L‖``
least, the Sobolev dual of order ρ makes ``‖L D^ρ‖`` least.

Imports torch and our errors only.

References:
    Blum, Lammers, Powell, Yılmaz, "Sobolev duals in frame theory and Sigma-Delta quantization", J. Fourier
    Anal. Appl. 16, 2010.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import FrameError


def canonical_dual(frame: Float[Tensor, "size dim"]) -> Float[Tensor, "dim size"]:
    """Return ``(E^T E)^{-1} E^T``; for a unit-norm tight frame that is ``(d/N) E^T``.

    Args:
        frame: E, its rows spanning R^dim.

    Raises:
        FrameError: the rows do not span R^dim.
    """
    return _pseudo_inverse(frame)


def sobolev_dual(frame: Float[Tensor, "size dim"], order: int) -> Float[Tensor, "dim size"]:
    """Return ``(D^{-ρ} E)^† D^{-ρ}``, the dual of least Frobenius and operator norm of ``L D^ρ``.

    Args:
        frame: E in the order in which it is quantized.
        order: ρ ≥ 0; 0 gives the canonical dual.

    Returns:
        A new tensor of the frame's dtype; worked out in float64.

    Raises:
        FrameError: the rows do not span R^dim, or sums of the frame are too ill-conditioned for this order.

    Cost:
        A QR factorisation of a size x dim matrix: 2 · size · dim² multiply-adds.
    """
    summed = frame.double()
    for _ in range(order):
        summed = summed.cumsum(0)  # D^{-1}
    dual = _pseudo_inverse(summed)
    for _ in range(order):
        dual = dual.flip(1).cumsum(1).flip(1)  # times D^{-1} from the right
    return dual.to(frame.dtype)


def _pseudo_inverse(matrix: Tensor) -> Float[Tensor, "dim size"]:
    """The pseudo-inverse by QR, with columns brought to norm one first: sums of low waves are far longer."""
    size, dim = matrix.shape
    norms = matrix.double().norm(dim=0)
    if size < dim or not bool((norms > 0).all()):
        raise FrameError(f"{size} vectors do not span R^{dim}, so they have no dual.")
    orthonormal, upper = torch.linalg.qr(matrix.double() / norms)
    pivots = upper.diagonal().abs()
    if float(pivots.min()) < 1e-13 * float(pivots.max()):
        raise FrameError(f"the {size} vectors (or their sums) span R^{dim} too badly to be inverted.")
    dual = torch.linalg.solve_triangular(upper, orthonormal.mT, upper=True) / norms[:, None]
    return dual.to(matrix.dtype)


def shaped(dual: Float[Tensor, "dim size"], order: int) -> Float[Tensor, "dim size"]:
    """Return ``L D^ρ``: the columns are ρ-th differences, of a sequence that ends in zeros."""
    for _ in range(order):
        dual = dual - torch.cat([dual[:, 1:], torch.zeros_like(dual[:, :1])], dim=1)
    return dual
