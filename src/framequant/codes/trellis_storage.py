"""How a matrix of trellis coefficients is stored: tiles, their bit strings and the scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from framequant.codes.trellis import TrellisSpec


def layout(spec: TrellisSpec, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor."""
    raise NotImplementedError


def decode_rows(
    spec: TrellisSpec, tensors: Mapping[str, Tensor], rows: int, cols: int, start: int, stop: int, dtype: Any
) -> Tensor:
    """Decode some rows of the coefficients."""
    raise NotImplementedError
