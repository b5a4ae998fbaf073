"""The Sigma-Delta recursion over N frame coefficients, for all vectors at once: the inner loop of the second paper.

In units of the step, with v the quantizer's input and K half the number of levels::

    v_n = Σ_{i=1}^{ρ} (-1)^{i+1} binom(ρ, i) u_{n-i} + c_n
    code_n = clamp(floor(v_n + K), 0, 2K - 1),  q_n = code_n - K + 1/2,  u_n = v_n - q_n

so that ``D^ρ u = c - q``. Order 0 is memoryless. Vectors are lanes and never interact. ``quantize_sequences`` takes
a choice of backend as an argument: ``"torch"`` (the oracle, any device, one pass of tensor operations for each n),
``"cpu"`` (numba), ``"triton"``. All are float64 with the same operations in the same order, so they agree bit for
bit. Importing this module loads neither numba nor triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64, Int32, UInt8
from torch import Tensor

from framequant.errors import ConfigError
from framequant.kernels.feedback import choose_backend

#: |u| beyond half a step by more than rounding counts as an overload.
OVERLOAD = 0.5 + 1e-9


class Sequences(NamedTuple):
    """What ``quantize_sequences`` returns.

    Attributes:
        codes: (vectors, N).
        overloads: how many states of each vector lie beyond half a step; 0 where the recursion was stable.
        peaks: the largest |u| of each vector, in steps.
        energies: Σ u² of each vector, in squared steps.
    """

    codes: UInt8[Tensor, "vectors size"]
    overloads: Int32[Tensor, " vectors"]
    peaks: Float64[Tensor, " vectors"]
    energies: Float64[Tensor, " vectors"]


def quantize_sequences(
    coefficients: Float64[Tensor, "vectors size"],
    steps: Float64[Tensor, " vectors"],
    num_levels: int,
    order: int,
    backend: str = "auto",
) -> Sequences:
    """Quantize each line of coefficients by Sigma-Delta.

    Args:
        coefficients: c, finite, not changed.
        steps: δ of each vector, positive.
        num_levels: 2K, even, 2 … 256.
        order: ρ, 0 … 3.
        backend: ``"auto"``, ``"torch"``, ``"cpu"`` or ``"triton"``.

    Returns:
        New tensors on the same device.

    Raises:
        ConfigError: an unknown backend, one that cannot run on the device, or an impossible order.
    """
    if not 0 <= order <= 3:
        raise ConfigError(f"Sigma-Delta order {order} does not exist here; use 0 to 3.")
    backend = choose_backend(backend, coefficients.device)
    if backend == "torch" or coefficients.numel() == 0:
        return _torch(coefficients, steps, num_levels, order)
    coefficients, inverse = coefficients.contiguous(), (1 / steps).contiguous()
    vectors, device = len(steps), coefficients.device
    result = Sequences(
        torch.empty(coefficients.shape, dtype=torch.uint8, device=device),
        torch.empty(vectors, dtype=torch.int32, device=device),
        torch.empty(vectors, dtype=torch.float64, device=device),
        torch.empty(vectors, dtype=torch.float64, device=device),
    )
    if backend == "triton":
        from framequant.kernels import sigma_delta_triton

        sigma_delta_triton.quantize_sequences(coefficients, inverse, num_levels, order, OVERLOAD, result)
    else:
        from framequant.kernels import sigma_delta_cpu

        arrays = tuple(tensor.numpy() for tensor in (coefficients, inverse, *result))
        sigma_delta_cpu.quantize_sequences(*arrays, num_levels, order, OVERLOAD, torch.get_num_threads())
    return result


def _torch(coefficients: Tensor, steps: Tensor, num_levels: int, order: int) -> Sequences:
    vectors, size = coefficients.shape
    scaled = (coefficients * (1 / steps)[:, None]).T.contiguous()
    codes = torch.empty((size, vectors), dtype=torch.uint8, device=coefficients.device)
    half, top = num_levels / 2, num_levels - 1
    first = second = third = torch.zeros_like(steps)
    overloads = torch.zeros(vectors, dtype=torch.int32, device=coefficients.device)
    peaks, energies = torch.zeros_like(steps), torch.zeros_like(steps)
    for n in range(size):
        value = scaled[n]
        if order == 1:
            value = value + first
        elif order == 2:
            value = value + (2 * first - second)
        elif order == 3:
            value = value + (3 * (first - second) + third)
        code = torch.floor(value + half).clamp_(0, top)
        first, second, third = value - (code - (half - 0.5)), first, second
        codes[n] = code.to(torch.uint8)
        size_now = first.abs()
        overloads += (size_now > OVERLOAD).to(torch.int32)
        peaks, energies = torch.maximum(peaks, size_now), energies + first * first
    return Sequences(codes.T.contiguous(), overloads, peaks, energies)
