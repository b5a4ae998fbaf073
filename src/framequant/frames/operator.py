"""What a frame is here: its description, the laws it obeys, and the constants it keeps.

A frame operator ``T`` takes ``dim`` coordinates to ``num_coefficients`` coefficients and is *Parseval*:
``T^T T = I``. So ``analysis`` (``T``) keeps norms, and ``synthesis`` (``T^T``) is its adjoint and its left
inverse at once; ``T T^T`` is the projection onto the range of ``T``, the identity only without redundancy.
Both act on the last axis. ``as_matrix`` is the dense oracle that every fast path is tested against.

A frame is named completely by a ``FrameSpec``, five numbers that go into the checkpoint: whoever holds the
spec builds the same operator again. This module builds none itself, and imports no other module of ours but
``errors`` and ``signs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import FrameError, nearest
from framequant.frames.signs import SEED_LIMIT

MAX_DIM = 1 << 20
"""Largest ``dim`` and ``num_subspaces`` accepted: far above any layer, far below what exhausts memory."""

MAX_COEFFICIENTS = 1 << 24
"""Largest number of coefficients accepted."""

MAX_DENSE_ENTRIES = 1 << 28
"""Largest dense factor of an operator, in entries (2 GiB in float64)."""


MAX_BLOCK = 1 << 10
"""Largest block of a Hadamard transform: a larger one is hardly local, and its dense matrix large."""


class FrameKind(StrEnum):
    """Which transform.

    None, a randomized Hadamard transform, one in blocks of coordinates, a fusion frame after one, or a harmonic frame.
    """

    IDENTITY = "identity"
    HADAMARD = "hadamard"
    BLOCK_HADAMARD = "block_hadamard"
    FUSION = "fusion"
    HARMONIC = "harmonic"


@dataclass(frozen=True)
class FrameSpec:
    """Everything needed to build a frame again, bit for bit.

    Construction checks types and ranges only, in constant time and memory, so that a hostile file cannot
    make it allocate; whether a tight fusion frame of these sizes exists is asked by ``build_frame``.

    Attributes:
        kind: which transform.
        dim: number of coordinates d, any positive integer.
        num_subspaces: k; for BLOCK_HADAMARD its blocks; for HARMONIC its N vectors, subspaces of dimension one; else 1.
        subspace_dim: l, even; for BLOCK_HADAMARD the size of a block, a power of two; for HARMONIC 1; else 0.
        seed: unsigned 64-bit seed of the random signs; unused by IDENTITY; for HARMONIC, 0 stands for no signs.
        dual_order: for HARMONIC, the order of the Sobolev dual that synthesises, 0 for the canonical; else 0.

    Raises:
        FrameError: if a field has the wrong type or is out of range; the message names the field.
    """

    kind: FrameKind
    dim: int
    num_subspaces: int = 1
    subspace_dim: int = 0
    seed: int = 0
    dual_order: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, FrameKind):
            raise FrameError(f"kind must be a FrameKind, not {self.kind!r}.")
        _require_integer("dim", self.dim, 1, MAX_DIM)
        _require_integer("num_subspaces", self.num_subspaces, 1, MAX_DIM)
        _require_integer("subspace_dim", self.subspace_dim, 0, MAX_DIM)
        _require_integer("seed", self.seed, 0, SEED_LIMIT - 1)
        _require_integer("dual_order", self.dual_order, 0, 3 if self.kind is FrameKind.HARMONIC else 0)
        if self.kind is FrameKind.HARMONIC:
            self._check_harmonic()
        elif self.kind is FrameKind.BLOCK_HADAMARD:
            self._check_blocks()
        elif self.kind is not FrameKind.FUSION:
            if (self.num_subspaces, self.subspace_dim) != (1, 0):
                raise FrameError(
                    f"num_subspaces and subspace_dim belong to fusion frames; for kind={self.kind.value!r} "
                    f"they must be 1 and 0, not {self.num_subspaces} and {self.subspace_dim}."
                )
        elif not self.dim <= self.num_coefficients <= MAX_COEFFICIENTS:
            raise FrameError(
                f"num_subspaces * subspace_dim must lie between dim={self.dim} and {MAX_COEFFICIENTS}, "
                f"not be {self.num_subspaces} * {self.subspace_dim}."
            )

    def _check_blocks(self) -> None:
        if not is_block_size(self.subspace_dim) or self.num_coefficients != self.dim:
            raise FrameError(
                f"blocks of a Hadamard transform of dim={self.dim} have a subspace_dim that is a power of two up to "
                f"{MAX_BLOCK}, and together all coordinates, not {self.num_subspaces} * {self.subspace_dim}."
            )

    def _check_harmonic(self) -> None:
        least = self.dim + 1 if self.dim % 2 == 0 else self.dim
        if self.subspace_dim != 1 or not least <= self.num_subspaces <= MAX_COEFFICIENTS:
            raise FrameError(
                f"a harmonic frame of R^{self.dim} has subspace_dim 1 and num_subspaces from {least} to "
                f"{MAX_COEFFICIENTS}, not {self.subspace_dim} and {self.num_subspaces}."
            )
        if self.dual_order and self.dim * self.num_subspaces > MAX_DENSE_ENTRIES:
            raise FrameError(
                f"the Sobolev dual of {self.num_subspaces} vectors in R^{self.dim} would not fit in memory; "
                "use the canonical dual."
            )

    @property
    def num_coefficients(self) -> int:
        """Number of coefficients m: ``num_subspaces * subspace_dim`` where there are subspaces, else ``dim``."""
        return self.num_subspaces * self.subspace_dim if self.subspace_dim else self.dim

    @property
    def redundancy(self) -> float:
        """The true redundancy ``num_coefficients / dim``, whatever was asked for."""
        return self.num_coefficients / self.dim

    def to_dict(self) -> dict[str, int | str]:
        """Return the fields as JSON-ready values; ``from_dict`` inverts it. Only harmonic frames name a dual."""
        values = {**asdict(self), "kind": self.kind.value}
        if self.kind is not FrameKind.HARMONIC:
            del values["dual_order"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrameSpec:
        """Build a spec from untrusted values, such as a checkpoint's.

        Args:
            values: ``kind`` and ``dim``, and any of the other fields.

        Returns:
            The spec.

        Raises:
            FrameError: if a field is unknown, missing, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise FrameError(f"a frame is described by a mapping, not by {type(values).__name__}.")
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise FrameError(f"unknown field {name!r} in a frame description.{nearest(str(name), names)}")
        for name in ("kind", "dim"):
            if name not in values:
                raise FrameError(f"a frame description lacks the field {name!r}.")
        kinds = [kind.value for kind in FrameKind]
        kind = values["kind"]
        if not isinstance(kind, str) or kind not in kinds:
            raise FrameError(f"kind {kind!r} is not known.{nearest(str(kind), kinds)}")
        return cls(**{**values, "kind": FrameKind(kind)})


class LinearStage(Protocol):
    """A Parseval map, without a spec: one stage of a frame operator."""

    dim: int
    num_coefficients: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per vector, in one direction."""
        ...

    def analysis(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... coefficients"]:
        """Apply ``T`` to the last axis, in the dtype and on the device of ``x``."""
        ...

    def synthesis(self, coefficients: Float[Tensor, "... coefficients"]) -> Float[Tensor, "... dim"]:
        """Apply ``T^T``, the adjoint and left inverse, to the last axis."""
        ...

    def as_matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Float[Tensor, "coefficients dim"]:
        """Return ``T`` as a dense matrix, assembled from its definition rather than by ``analysis``."""
        ...


class FrameOperator(LinearStage, Protocol):
    """A Parseval frame operator that knows its own description; ``build_frame`` makes one."""

    spec: FrameSpec

    @property
    def redundancy(self) -> float:
        """The true redundancy ``num_coefficients / dim``."""
        ...


class Constants:
    """Float64 constants of an operator on the CPU, and their casts, made once per device and dtype.

    The cache lives and dies with the operator: a module-level one keyed by sizes would hand one layer
    the constants of another. Integer tensors are moved but keep their dtype.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.originals = tensors
        self._casts: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def like(self, x: Tensor) -> dict[str, Tensor]:
        """Return the constants on the device and in the dtype of ``x``."""
        key = (x.device, x.dtype)
        if key not in self._casts:
            # Tensors born in inference mode can never take part in autograd: cache ordinary ones.
            with torch.inference_mode(False):
                self._casts[key] = {name: self._cast(tensor, x) for name, tensor in self.originals.items()}
        return self._casts[key]

    @staticmethod
    def _cast(tensor: Tensor, x: Tensor) -> Tensor:
        dtype = x.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=x.device, dtype=dtype)


def is_block_size(size: object) -> bool:
    """Whether a block of a Hadamard transform may have this size: a power of two, 2 to ``MAX_BLOCK``."""
    return isinstance(size, int) and 2 <= size <= MAX_BLOCK and size & (size - 1) == 0


def check_last_axis(x: Tensor, size: int, what: str) -> None:
    """Refuse an input that an operator cannot act on.

    Args:
        x: the tensor to act on.
        size: the length its last axis must have.
        what: the operation, for the message.

    Raises:
        FrameError: if the last axis has another length, or the dtype is not a floating-point one.
    """
    if x.dim() == 0 or x.shape[-1] != size:
        raise FrameError(f"{what} acts on a last axis of length {size}; the shape is {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise FrameError(f"{what} acts on floating-point tensors, not {x.dtype}.")


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise FrameError(f"{name} must be an integer, not {value!r}.")
    if not low <= value <= high:
        shown = value if abs(value) < SEED_LIMIT else f"a number of {value.bit_length()} bits"
        raise FrameError(f"{name} must lie between {low} and {high}, not be {shown}.")
