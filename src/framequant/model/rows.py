"""Rows of several batches, put together to one: what a step on randomly chosen samples is run on.

A value is a batch or what a block returns for one: a tensor, or tuples, lists and mappings of tensors. Its tensors with
as many entries as the batch has samples have rows; all else is taken as the first of the batches has it.

Must not import layers or quantizers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def count_rows(batch: Any) -> int:
    """Samples of a batch."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else [batch]
    return next(len(value) for value in values if isinstance(value, Tensor) and value.ndim)


def form_of(value: Any, count: int) -> Hashable:
    """What two values must have in common for their rows to be put together.

    Args:
        value: of a batch.
        count: samples of the batch.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.shape[1:] if _has_rows(value, count) else value.shape
    if isinstance(value, dict):
        return tuple((key, form_of(entry, count)) for key, entry in value.items())
    if isinstance(value, tuple | list):
        return tuple(form_of(entry, count) for entry in value)
    return repr(value)


def pick(values: Sequence[Any], counts: Sequence[int], rows: Sequence[list[int]]) -> Any:
    """Some rows of values of one form, one after the other.

    Args:
        values: of one or more batches.
        counts: samples of each batch.
        rows: positions in each.
    """
    first = values[0]
    if isinstance(first, Tensor):
        if not _has_rows(first, counts[0]):
            return first
        parts = [value[chosen] for value, chosen in zip(values, rows, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if isinstance(first, dict):
        return {key: pick([value[key] for value in values], counts, rows) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(pick(entries, counts, rows) for entries in zip(*values, strict=True))
    return first


def _has_rows(value: Tensor, count: int) -> bool:
    return value.ndim > 0 and len(value) == count
