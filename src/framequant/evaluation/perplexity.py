"""Perplexity by the standard protocol: non-overlapping windows, mean over all predicted tokens.

A window of S tokens predicts S − 1: its first token has no context. Losses are computed in float32 and summed
in float64.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from framequant.evaluation.forward import OnProgress, batches, logits_of, rows_per_chunk


@dataclass(frozen=True)
class Perplexity:
    """Result of ``perplexity``.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood per predicted token, in nats.
        tokens: number of predicted tokens.
        windows: number of windows.
        sequence_length: tokens of a window.
        seconds: wall-clock time.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    windows: Int[Tensor, "windows length"],
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model.

    Args:
        model: returns logits for token ids.
        windows: token ids, see ``evaluation.text``.
        batch_size: windows run at once; by default as many as keep the logits below ``LOGIT_BYTES``.
        on_progress: called with windows done and in all.

    Raises:
        CalibrationError: the model has no language-model head.
        NumericalError: a logit is NaN or infinite.
    """
    start = time.perf_counter()
    total, done = 0.0, 0
    for batch in batches(model, windows, batch_size):
        logits = logits_of(model, batch)[:, :-1].flatten(0, 1)
        targets = batch[:, 1:].flatten().to(logits.device)
        rows = rows_per_chunk(logits)
        for part, labels in zip(logits.split(rows), targets.split(rows), strict=True):
            total += functional.cross_entropy(part.float(), labels, reduction="none").double().sum().item()
        done += len(batch)
        if on_progress:
            on_progress(done, len(windows))
    count, length = windows.shape
    tokens = count * (length - 1)
    nll = total / tokens
    return Perplexity(_exp(nll), nll, tokens, count, length, time.perf_counter() - start)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
