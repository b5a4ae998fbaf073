"""Calibration batches: what the walk runs the model on.

A batch is what the model is called with: a tensor (token ids or images), a tuple of arguments, or a mapping of
keyword arguments. ``as_batches`` takes what users have at hand and makes a list of these. Texts and image
folders are read by ``evaluation.text`` and ``evaluation.images``; this module knows tensors only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from framequant.errors import CalibrationError
from framequant.model.rows import count_rows

#: Tokens of one batch: large enough to keep the machine busy, small enough for attention that keeps its scores.
TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 16384}
IMAGES_PER_BATCH = {"cpu": 32, "cuda": 128}


def as_batches(calibration: Any, device: str = "cpu") -> list[Any]:
    """Make a list of batches.

    Args:
        calibration: a tensor of token ids (samples, length) or images (samples, channels, height, width); a
            mapping of such tensors; or an iterable of batches (a list, a DataLoader), taken as they come. A
            batch that is a pair whose second element is one integer per sample (labels) loses it.
        device: kind of device that will run them, "cpu" or "cuda": it decides how large they are.

    Raises:
        CalibrationError: nothing in it, or something that is no batch.
    """
    if isinstance(calibration, Tensor):
        batches: list[Any] = list(_split(calibration, device))
    elif isinstance(calibration, Mapping):
        batches = _split_mapping(calibration, device)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        batches = [_as_batch(item) for item in calibration]
    else:
        raise CalibrationError(
            f"calibration is {type(calibration).__name__}; expected a tensor, a mapping or a list of batches. "
            "For a text file or an image folder use framequant.evaluation.text or .images, or the command line."
        )
    if not batches:
        raise CalibrationError("the calibration set is empty; give at least one batch.")
    return batches


def _split(tensor: Tensor, device: str) -> tuple[Tensor, ...]:
    if tensor.ndim < 2 or tensor.shape[0] == 0:
        raise CalibrationError(
            f"calibration has shape {tuple(tensor.shape)}; expected (samples, length) token ids or "
            "(samples, channels, height, width) images."
        )
    return tensor.split(_batch_size(tensor, device))


def _split_mapping(mapping: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    tensors = {key: value for key, value in mapping.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CalibrationError("the calibration mapping holds no tensor.")
    size = min(_batch_size(value, device) for value in tensors.values())
    count = len(next(iter(tensors.values())))
    return [
        {key: value[start : start + size] if key in tensors else value for key, value in mapping.items()}
        for start in range(0, count, size)
    ]


def _batch_size(tensor: Tensor, device: str) -> int:
    if tensor.ndim >= 4:
        return IMAGES_PER_BATCH.get(device, IMAGES_PER_BATCH["cuda"])
    tokens = TOKENS_PER_BATCH.get(device, TOKENS_PER_BATCH["cuda"])
    return max(tokens // max(tensor.shape[1], 1), 1)


def _as_batch(item: Any) -> Any:
    if isinstance(item, Tensor | Mapping):
        return dict(item) if isinstance(item, Mapping) else item
    if isinstance(item, tuple | list) and item and isinstance(item[0], Tensor):
        labels = len(item) == 2 and isinstance(item[1], Tensor) and item[1].ndim == 1
        return item[0] if labels else tuple(item)
    raise CalibrationError(
        f"a calibration batch is {type(item).__name__}; expected a tensor, a tuple or a mapping."
    )


def leading(batches: list[Any], samples: int) -> list[Any]:
    """The first batches, as many as it takes to have so many samples; all where there are fewer."""
    counts = itertools.accumulate(count_rows(batch) for batch in batches)
    return batches[: next((number for number, count in enumerate(counts, 1) if count >= samples), None)]


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move a batch's tensors to a device; floating ones (images) also to the model's dtype."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(to_device(value, device, dtype) for value in batch)
    return batch


def as_samples(batches: list[Any]) -> list[Any]:
    """Cut batches into samples, batches of one row each; tensors are views. ``collate`` inverts it.

    Raises:
        CalibrationError: a batch's tensors have different numbers of rows.
    """
    return [sample for batch in batches for sample in _rows(batch)]


def _rows(batch: Any) -> list[Any]:
    if isinstance(batch, Tensor):
        return list(batch.split(1))
    entries = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    counts = {len(value) for value in entries.values() if isinstance(value, Tensor) and value.ndim}
    if len(counts) != 1:
        raise CalibrationError(
            f"the tensors of a calibration batch have {sorted(counts)} rows; expected the same number in all."
        )
    rows = []
    for row in range(counts.pop()):
        part = {
            key: value[row : row + 1] if isinstance(value, Tensor) and value.ndim else value
            for key, value in entries.items()
        }
        rows.append(part if isinstance(batch, Mapping) else tuple(part.values()))
    return rows


def collate(samples: list[Any]) -> Any:
    """Join samples to one batch; sequences of a mapping with an attention mask are padded with zeros.

    Raises:
        CalibrationError: samples of different shape that no mask could tell from padding.
    """
    first = samples[0]
    if isinstance(first, Tensor):
        return _joined(samples, padded=False)
    if isinstance(first, Mapping):
        padded = "attention_mask" in first
        return {key: _joined([sample[key] for sample in samples], padded) for key in first}
    return tuple(_joined(list(values), padded=False) for values in zip(*samples, strict=True))


def _joined(values: list[Any], padded: bool) -> Any:
    if not isinstance(values[0], Tensor) or values[0].ndim == 0:
        return values[0]
    if all(value.shape[1:] == values[0].shape[1:] for value in values):
        return torch.cat(values)
    if not padded or any(value.ndim != 2 for value in values):
        raise CalibrationError(
            "calibration samples of different length need an attention mask to be run together; give mappings with "
            "'attention_mask', or samples of one length."
        )
    length = max(value.shape[1] for value in values)
    return torch.cat([functional.pad(value, (0, length - value.shape[1])) for value in values])
