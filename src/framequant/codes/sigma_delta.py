"""The Sigma-Delta code: what its integers mean, which tensors hold them, and the vocabulary of its settings.

The alphabet is midrise: code c of ``num_levels = 2K`` stands for ``(c - K + 1/2) δ``, so that one-bit codes mean ±δ/2.
Each vector (a row or a column of the weight) has one step δ. What is stored is ``sqrt(d/N) δ``, the step of the
coefficients of the frame in Parseval scaling, so that the layer's formula ``D̃ = scale · level`` is that of the other
codes. A quantized bias is one more vector, in the harmonic frame of R^out.

    packed_codes   uint8     (m_out, row bytes)         as scalar codes, see ``packing``
    scales         bfloat16  (m_out, 1) or (1, m_in)    one for each vector
    packed_bias    uint8     (1, row bytes)             only with a quantized bias
    bias_scale     bfloat16  (1, 1)                     likewise

Imports torch, ``packing`` and our errors only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.codes.packing import bytes_per_row, unpack_codes
from framequant.errors import ConfigError, nearest

MAX_ORDER = 3
MAX_LEVELS = 256
MAX_BIAS_SIZE = 1 << 24
SCALE_DTYPE = torch.bfloat16


class Vectors(StrEnum):
    """Which vectors are expanded in the frame: rows of W (in R^in) or columns (in R^out)."""

    ROWS = "rows"
    COLUMNS = "columns"


class Step(StrEnum):
    """How the step δ of a vector is found."""

    STABLE = "stable"  # the least δ with |c_n| <= (K - (2^ρ - 1)/2) δ for all n: no state leaves ±δ/2
    NORM = "norm"  # the same from |c_n| <= ‖x‖, before any coefficient is known: the paper's assumption
    MSE = "mse"  # the share of the stable step with the least measured error; overloads are allowed, and counted


class Dual(StrEnum):
    """Which dual frame decodes."""

    CANONICAL = "canonical"
    SOBOLEV = "sobolev"  # of the order of the recursion


def check_levels(levels: object, order: int) -> None:
    """Refuse a number of levels that does not exist, or with which an order is unstable.

    With greedy quantization, states stay within ±δ/2 only where ``|c| <= (K - (2^ρ - 1)/2) δ`` for all
    coefficients, so order ρ needs at least 2^ρ levels. Order 0 is memoryless.

    Raises:
        ConfigError: the message names the nearest valid choice.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
        raise ConfigError(
            f"Sigma-Delta order {order!r} does not exist here; use 1, 2 or 3, or 0 for memoryless codes."
        )
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise ConfigError(f"levels = {levels!r}: expected an even integer from 2 to {MAX_LEVELS}.")
    if not 2 <= levels <= MAX_LEVELS or levels % 2:
        near = min(max(levels + levels % 2, 2), MAX_LEVELS)
        raise ConfigError(
            f"levels = {levels}: a midrise alphabet has an even number of levels from 2 to {MAX_LEVELS}; "
            f"the nearest is {near}."
        )
    if levels < 2**order:
        raise ConfigError(
            f"order {order} is unstable with {levels} levels: it needs at least {2**order}. Use levels = {2**order}, "
            f"or order = {levels.bit_length() - 1} with {levels} levels."
        )


def parse_step(step: Step | float | str) -> Step | float:
    """Turn a setting into a ``Step`` or a positive number.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(step, int | float) and not isinstance(step, bool):
        if math.isfinite(step) and step > 0:
            return float(step)
        raise ConfigError(f"step = {step!r}: a step given by its value is a positive number.")
    names = [member.value for member in Step]
    if str(step) not in names:
        raise ConfigError(
            f"step = {step!r}: expected a positive number or a name.{nearest(str(step), names)}"
        )
    return Step(str(step))


def parse_dual(dual: Dual | str, order: int) -> Dual:
    """Turn a setting into a ``Dual``.

    Raises:
        ConfigError: there is no such dual, or not for this order.
    """
    names = [member.value for member in Dual]
    if str(dual) not in names:
        raise ConfigError(f"dual = {dual!r}.{nearest(str(dual), names)}")
    if order == 0 and Dual(str(dual)) is Dual.SOBOLEV:
        raise ConfigError("dual = 'sobolev' needs order 1, 2 or 3: memoryless codes have the canonical dual.")
    return Dual(str(dual))


@dataclass(frozen=True)
class SigmaDeltaSpec:
    """Everything that determines the code of one linear but its codes and scales.

    Attributes:
        num_levels: 2K, even, 2 … 256.
        order: of the recursion, 1 … 3; 0 for memoryless quantization of the coefficients. Decoding does not need
            it, a reader of the file does.
        vectors: which vectors were expanded.
        bias_size: number of frame vectors N of the bias; 0 if the bias is stored as in the float model.

    Raises:
        ConfigError: a value is out of range.
    """

    num_levels: int
    order: int = 1
    vectors: Vectors = Vectors.ROWS
    bias_size: int = 0

    def __post_init__(self) -> None:
        if str(self.vectors) not in {member.value for member in Vectors}:
            raise ConfigError(f"vectors = {self.vectors!r}.{nearest(str(self.vectors), list(Vectors))}")
        object.__setattr__(self, "vectors", Vectors(self.vectors))
        check_levels(self.num_levels, self.order)
        size = self.bias_size
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_BIAS_SIZE:
            raise ConfigError(f"bias_size = {size!r}: expected an integer from 0 to {MAX_BIAS_SIZE}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "vectors": self.vectors.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SigmaDeltaSpec:
        """Build a spec from what ``to_dict`` returned.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not possible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown key {key!r} in a Sigma-Delta code.{nearest(str(key), known)}")
        for key in known:
            if key not in values:
                raise ConfigError(f"A Sigma-Delta code needs the key {key!r}.")
        return cls(**values)


def layout(spec: SigmaDeltaSpec, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a coefficient matrix (rows, cols)."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed_codes": ((rows, bytes_per_row(cols, spec.num_levels)), torch.uint8),
        "scales": ((rows, 1) if spec.vectors is Vectors.ROWS else (1, cols), SCALE_DTYPE),
    }
    if spec.bias_size:
        tensors["packed_bias"] = ((1, bytes_per_row(spec.bias_size, spec.num_levels)), torch.uint8)
        tensors["bias_scale"] = ((1, 1), SCALE_DTYPE)
    return tensors


def code_values(codes: Int[Tensor, ...], num_levels: int, dtype: torch.dtype) -> Float[Tensor, ...]:
    """Return what codes stand for in units of the step: ``c - K + 1/2``; exact in every dtype of 11 bits or more."""
    return codes.to(dtype) - (num_levels - 1) / 2


def decode_rows(
    spec: SigmaDeltaSpec, tensors: Mapping[str, Tensor], cols: int, start: int, stop: int, dtype: torch.dtype
) -> Float[Tensor, "rows cols"]:
    """Decode rows ``start … stop - 1`` of D̃; computed in float32 at least, then cast.

    Args:
        spec: the code.
        tensors: the stored tensors of one linear.
        cols: columns of D̃.
        start: first row.
        stop: one past the last row.
        dtype: of the result.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(tensors["packed_codes"][start:stop], spec.num_levels, cols)
    scales = tensors["scales"].to(work)
    chosen = scales[start:stop] if spec.vectors is Vectors.ROWS else scales
    return (code_values(codes, spec.num_levels, work) * chosen).to(dtype)


def decode_bias(
    spec: SigmaDeltaSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Float[Tensor, " size"]:
    """Decode the coefficients of a quantized bias, (bias_size,)."""
    codes = unpack_codes(tensors["packed_bias"], spec.num_levels, spec.bias_size)[0]
    return code_values(codes, spec.num_levels, dtype) * tensors["bias_scale"][0, 0].to(dtype)
