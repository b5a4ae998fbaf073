"""Second moments of a linear's inputs, their damping, and a factorisation that cannot fail silently.

Conventions: activations are rows, ``x`` of shape (tokens, features); the Hessian is the *mean* of ``x xᵀ``
(no factor 2); the damping is a fraction of its mean diagonal. Sums are kept in float32 on fast devices and in
float64 when the activations are float64; factorisations are always float64.

Must not import ``torch.nn``, models or frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import NumericalError

#: The first retry of a failed factorisation multiplies the damping by this, and so on.
ESCALATION = 10.0
MAX_ESCALATIONS = 8
NOT_FINITE = (
    "its calibration activations contain NaN or infinity. "
    "Check the model and the calibration data, or run the walk in float32."
)
#: Batches with a larger peak, or with none as large as the second, are summed in float64: the squares of a million
#: tokens would overflow float32, or half of the digits would be denormal.
LARGEST_IN_FLOAT32 = 1e15
SMALLEST_IN_FLOAT32 = 1e-15
#: Matrices of more rows are handled by pieces of ``PIECE_ROWS``, since a second copy might not fit.
SMALL = 4096
PIECE_ROWS = 1024
#: Triangular matrices of at most so many rows are inverted by the library.
CORNER = 512


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which moments of activations of ``dtype`` are summed, unless their squares leave float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _summable(*batches: Tensor) -> list[Tensor]:
    """The same activations in a dtype in which sums of their products neither overflow nor vanish.

    Raises:
        NumericalError: an activation is NaN or infinite.
    """
    dtype = accumulation_dtype(batches[0].dtype)
    peaks = [float(batch.detach().abs().amax()) for batch in batches if batch.numel()]
    if not all(math.isfinite(peak) for peak in peaks):
        raise NumericalError(NOT_FINITE)
    if any(peak > LARGEST_IN_FLOAT32 or 0 < peak < SMALLEST_IN_FLOAT32 for peak in peaks):
        dtype = torch.float64
    return [batch.to(dtype) for batch in batches]


@dataclass
class Moments:
    """Streaming sums over tokens, from which the rounding's matrices are made.

    With x_q the input of a linear in the quantized chain, x_f the same token's input in the float model, and
    e = h_f - h_q the deviation of the residual stream that the linear writes to:

    Attributes:
        features: number of input features.
        hessian_sum: Σ x_q x_qᵀ, (features, features).
        drift_sum: Σ (x_f - x_q) x_qᵀ, (features, features); None when the float chain is not carried.
            Summing the difference rather than C = Σ x_f x_qᵀ loses no digits to cancellation.
        residual_sum: Σ e x_qᵀ per residual-writing linear, (out_features, features), by linear name.
        output_gram: E[g gᵀ] of the gradients of a linear's outputs, (out_features, out_features), by linear name.
        count: number of tokens.
    """

    features: int
    hessian_sum: Tensor | None = None
    drift_sum: Tensor | None = None
    residual_sum: dict[str, Tensor] = field(default_factory=dict)
    output_gram: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, inputs: Float[Tensor, "t n"], float_inputs: Float[Tensor, "t n"] | None = None) -> None:
        """Add a batch of tokens; ``float_inputs`` are the same tokens' inputs in the float model.

        Raises:
            NumericalError: an activation is NaN or infinite; the caller knows the linear and the batch.
        """
        x, *other = _summable(inputs, *([] if float_inputs is None else [float_inputs]))
        self.hessian_sum = _add_product(self.hessian_sum, x, x, inputs.dtype)
        for y in other:
            self.drift_sum = _add_product(self.drift_sum, y - x, x, inputs.dtype)
        self.count += x.shape[0]

    def add_residual(self, name: str, deviation: Float[Tensor, "t o"], inputs: Float[Tensor, "t n"]) -> None:
        """Add the residual stream's deviation for the linear ``name``; call beside ``add``; raises as it does."""
        error, x = _summable(deviation, inputs)
        self.residual_sum[name] = _add_product(self.residual_sum.get(name), error, x, inputs.dtype)

    def hessian(self) -> Float[Tensor, "n n"]:
        """Mean of x xᵀ in float64; the identity when no token was seen (every direction matters alike)."""
        if self.hessian_sum is None or self.count == 0:
            return torch.eye(self.features, dtype=torch.float64)
        return _mean(self.hessian_sum, self.count)

    def write_hessian(self, out: Float[Tensor, "n n"]) -> None:
        """``hessian`` into a tensor of float64 or a part of one; nothing of its size is made."""
        if self.hessian_sum is None or self.count == 0:
            out.zero_().fill_diagonal_(1)
        else:
            out.copy_(self.hessian_sum).div_(self.count)

    def drift(self) -> Float[Tensor, "n n"] | None:
        """Mean of (x_f - x_q) x_qᵀ in float64, or None."""
        return None if self.drift_sum is None else _mean(self.drift_sum, max(self.count, 1))

    def residual(self, name: str, rows: slice = slice(None)) -> Float[Tensor, "rows n"] | None:
        """Mean of e x_qᵀ in float64 for one linear, or some of its rows; or None."""
        total = self.residual_sum.get(name)
        return None if total is None else _mean(total[rows], max(self.count, 1))


def _mean(total: Tensor, count: int) -> Tensor:
    """``total / count``, a new tensor in float64; nothing else of its size is made."""
    return total.to(torch.float64, copy=True).div_(count)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, held: torch.dtype) -> Tensor:
    """``total + leftᵀ right``, in the memory of the total where the dtypes agree; ``right`` has values of ``held``."""
    if total is not None and total.dtype != left.dtype:
        return total.double() + left.double().T @ right.double()
    if right.dtype == torch.float32 and held == torch.bfloat16 and right.device.type in ("cpu", "cuda"):
        return _add_halves(total, left, right)
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _add_halves(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + leftᵀ right`` where ``right`` has values of bfloat16, by matrix units: many times as fast.

    Products of such numbers are exact in float32, in which they are summed. A float32 ``left`` (a difference) is taken
    as the sum of two of them, so 16 of its 24 bits count.
    """
    if total is None:
        total = left.new_zeros(left.shape[1], right.shape[1])
    high = left.bfloat16()
    rest = (left - high).bfloat16()
    for half in (high, rest) if bool(rest.any()) else (high,):
        (_add_on_gpu if total.is_cuda else _add_on_cpu)(total, half, right)
    return total


def _add_on_cpu(total: Tensor, left: Tensor, right: Tensor) -> None:
    with products_of_halves():
        total.addmm_(left.float().T, right)


def _add_on_gpu(total: Tensor, left: Tensor, right: Tensor) -> None:
    right = right.bfloat16()
    for first in range(0, left.shape[1], SMALL):
        rows = slice(first, first + SMALL)
        total[rows] += torch.mm(left[:, rows].T, right, out_dtype=torch.float32)


@contextmanager
def products_of_halves() -> Iterator[None]:
    """Let float32 products on a CPU round their factors to bfloat16, where the processor has units for that.

    For factors that have such values anyway: the result is exact up to the order of float32 sums.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def damped(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Return ``hessian + damping · mean(diag) · I``, a new tensor; an all-zero Hessian gives the identity."""
    return damped_(hessian.clone(), damping)


def damped_(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """``damped``, in place."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        return hessian.zero_().fill_diagonal_(1)
    diagonal += damping * mean
    return hessian


@dataclass(frozen=True)
class FeedbackFactor:
    """The upper triangular factor through which rounding errors are fed forward.

    Attributes:
        upper: U with (H + λI)⁻¹ = Uᵀ U, float64, (n, n).
        damping: the damping that was needed, a fraction of the mean diagonal.
        escalations: how often it had to be raised.
    """

    upper: Tensor
    damping: float
    escalations: int


def feedback_factor(
    hessian: Float[Tensor, "n n"] | Callable[[], Float[Tensor, "n n"]], damping: float, name: str = ""
) -> FeedbackFactor:
    """Factor the damped inverse Hessian, raising the damping until the factorisation succeeds.

    Args:
        hessian: symmetric positive semi-definite, float64; or what makes it anew at each call, for matrices of which
            no more than one fits into memory: what it makes is overwritten, and becomes the factor.
        damping: fraction of the mean diagonal to start from, ≥ 0.
        name: the linear, for the error message.

    Returns:
        The factor and the damping that was used.

    Raises:
        NumericalError: the Hessian holds NaN or infinity, or no damping up to 10⁸ times the first helps.

    References:
        Frantar et al. 2022, arXiv 2210.17323 (GPTQ), for the use of the Cholesky factor of the inverse.
    """
    matrix = hessian() if callable(hessian) else hessian.clone()
    if not all_finite(matrix):
        raise NumericalError(f"{name or 'a linear'}: {NOT_FINITE}")
    current = damping
    for escalation in range(MAX_ESCALATIONS + 1):
        upper = _inverse_cholesky_(damped_(matrix, current))
        if upper is not None:
            return FeedbackFactor(upper, current, escalation)
        current = max(current, 1e-8) * ESCALATION
        matrix = hessian() if callable(hessian) else hessian.clone()
    raise NumericalError(
        f"{name or 'a linear'}: its Hessian could not be factored with damping up to {current:g}."
    )


def _inverse_cholesky_(matrix: Tensor) -> Tensor | None:
    """U with matrix⁻¹ = Uᵀ U, or None if the matrix is not numerically positive definite; overwrites the matrix.

    With J the exchange matrix, J M J = L Lᵀ gives M = (J L J)(J L J)ᵀ, an upper triangular factor R = J L J, so
    M⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹: one Cholesky and one triangular inverse, in the memory of the matrix: at n = 32256 that
    is 8.3 GB.
    """
    lower = cholesky_(_exchanged_(column_major(matrix)))
    if lower is None:
        return None
    upper = _inverse_upper_(_exchanged_(lower))
    return upper if all_finite(upper) else None


def column_major(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A symmetric matrix with contiguous columns, as LAPACK works on them in place.

    A large one is not copied but transposed, which changes nothing but the last bits, where it is not quite symmetric.
    """
    if matrix.T.is_contiguous():
        return matrix
    return matrix.T.contiguous().T if len(matrix) <= SMALL else matrix.T


def cholesky_(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """L with matrix = L Lᵀ, in its memory where columns are contiguous; None if it is not positive definite."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if int(info) == 0 and all_finite(matrix) else None


def _inverse_upper_(root: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, in place, by halves: large products, which are fast everywhere.

    [[A, B], [0, D]]⁻¹ = [[A⁻¹, −A⁻¹ B D⁻¹], [0, D⁻¹]]. The corner is made a piece of columns at a time, from the right:
    a piece reads those of B up to its own, and nothing of the matrix's size is made.
    """
    n = len(root)
    if n <= CORNER:
        return root.copy_(torch.linalg.solve_triangular(root, torch.eye(n).to(root), upper=True))
    half = n // 2
    left, right = _inverse_upper_(root[:half, :half]), _inverse_upper_(root[half:, half:])
    root[half:, :half] = 0
    corner, strip = root[:half, half:], max(half // 4, CORNER)
    for first in reversed(range(0, n - half, PIECE_ROWS)):
        last = min(first + PIECE_ROWS, n - half)
        between = corner[:, :last] @ right[:last, first:last]
        for start in range(0, half, strip):  # its part below the diagonal is zero
            rows = slice(start, start + strip)
            corner[rows, first:last] = -(left[rows, start:] @ between[start:])
    return root


def all_finite(matrix: Tensor) -> bool:
    """Whether no entry is NaN or infinite; by pieces, since the test makes copies."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(PIECE_ROWS))


def _exchanged_(matrix: Tensor) -> Tensor:
    """Reverse the order of rows and columns, in place, by pieces."""
    n = len(matrix)
    if n <= SMALL:
        return matrix.copy_(matrix.flip(0, 1))
    half = n // 2
    for first in range(0, half, PIECE_ROWS):
        last = min(first + PIECE_ROWS, half)
        top = matrix[first:last].flip(0, 1)
        matrix[first:last] = matrix[n - last : n - first].flip(0, 1)
        matrix[n - last : n - first] = top
    if n % 2:
        matrix[half] = matrix[half].flip(0)
    return matrix
