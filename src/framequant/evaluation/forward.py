"""Running a model on evaluation batches: its logits, batches that fit into memory, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from framequant.errors import CalibrationError, NumericalError
from framequant.layers import decoded_once
from framequant.memory import return_freed_memory
from framequant.model.calibration import to_device

#: Bytes that the logits of one batch may take.
LOGIT_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}
#: Tokens of one batch.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
#: Rows whose logits are turned to float32 at once.
ROWS_PER_CHUNK = {"cpu": 256, "cuda": 4096}

_Item = TypeVar("_Item")
OnProgress = Callable[[int, int], None]


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Logits of a batch of token ids (batch, length, vocabulary) or images (batch, classes).

    Raises:
        CalibrationError: the model has no head, so it returns no logits.
        NumericalError: a logit is NaN or infinite.
    """
    parameter = next(model.parameters())
    batch = to_device(batch, parameter.device, parameter.dtype)
    caching = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    outputs = model(batch, **caching)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is None:
        raise CalibrationError(
            f"{type(model).__name__} has no head that gives logits, so this cannot be measured on it."
        )
    if not torch.isfinite(logits).all():
        raise NumericalError(f"{type(model).__name__} returns NaN or infinite logits.")
    return logits


def rows_per_chunk(logits: Tensor) -> int:
    """Rows of logits that are turned to float32 at once."""
    return ROWS_PER_CHUNK["cuda" if logits.device.type == "cuda" else "cpu"]


def vocabulary_size(model: nn.Module) -> int:
    """Number of classes of the output, as far as the config says."""
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or getattr(config, "num_labels", None) or 1000)


def batches(model: nn.Module, windows: Tensor, batch_size: int | None = None) -> Iterator[Tensor]:
    """Split windows into batches of few tokens, whose logits stay below ``LOGIT_BYTES``."""
    if batch_size is None:
        kind = "cuda" if next(model.parameters()).device.type == "cuda" else "cpu"
        per_window = windows.shape[1] * vocabulary_size(model) * next(model.parameters()).element_size()
        most = min(TOKENS_PER_BATCH[kind] // windows.shape[1], LOGIT_BYTES[kind] // max(per_window, 1))
        batch_size = max(1, most)
    logits_of(model, windows[:1, :2])  # builds the frames first, lest they lie between large freed blocks
    return_freed_memory()
    for batch in while_decoded(windows.split(batch_size), model):
        yield batch
        return_freed_memory()


def while_decoded(items: Iterable[_Item], *models: nn.Module) -> Iterator[_Item]:
    """Hand items on while the codes of models are held decoded; see ``layers.decoded_once``."""
    with ExitStack() as held:
        for model in models:
            held.enter_context(decoded_once(model))
        yield from items
