"""How far a model's predictions are from another's: mean Kullback–Leibler divergence and top-1 agreement.

``KL(reference ‖ model) = Σ p_ref (log p_ref − log p)``, averaged over all positions of a text or over images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import CalibrationError
from framequant.evaluation.forward import OnProgress, batches, logits_of, rows_per_chunk, while_decoded


@dataclass(frozen=True)
class Divergence:
    """Result of ``kl_divergence``.

    Attributes:
        kl: mean divergence in nats.
        standard_error: of that mean, positions taken as independent.
        agreement: share of positions with the same most likely class.
        positions: number of tokens or images.
        seconds: wall-clock time.
    """

    kl: float
    standard_error: float
    agreement: float
    positions: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@torch.inference_mode()
def kl_divergence(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    total: int | None = None,
    on_progress: OnProgress | None = None,
) -> Divergence:
    """Measure the divergence of ``model`` from ``reference`` on the same inputs.

    Args:
        model: the quantized model.
        reference: the float model; must have as many classes.
        inputs: token windows (windows, length), or an iterable of image batches.
        total: number of windows or images, for the progress.
        on_progress: called with windows or images done and in all.

    Raises:
        CalibrationError: the models differ in their number of classes, or there is no input.
        NumericalError: a logit is NaN or infinite.
    """
    start = time.perf_counter()
    if isinstance(inputs, Tensor):
        total = len(inputs)
        inputs = batches(model, inputs) if not inputs.is_floating_point() else inputs.split(32)
    sums, squares, same, count, done = 0.0, 0.0, 0, 0, 0
    for batch in while_decoded(inputs, model, reference):
        ours, theirs = logits_of(model, batch), logits_of(reference, batch)
        if ours.shape[-1] != theirs.shape[-1]:
            raise CalibrationError(
                f"the models have {ours.shape[-1]} and {theirs.shape[-1]} classes; they must be the same."
            )
        ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2).to(ours.device)
        rows = rows_per_chunk(ours)
        for mine, other in zip(ours.split(rows), theirs.split(rows), strict=True):
            log_p, log_q = other.float().log_softmax(-1), mine.float().log_softmax(-1)
            values = (log_p.exp() * (log_p - log_q)).sum(-1).double()
            sums += values.sum().item()
            squares += values.square().sum().item()
            same += int((mine.argmax(-1) == other.argmax(-1)).sum())
            count += len(values)
        done += len(batch)
        if on_progress:
            on_progress(done, total or done)
    if count == 0:
        raise CalibrationError("there is nothing to compare the models on.")
    mean = sums / count
    error = math.sqrt(max(squares / count - mean * mean, 0.0) / count)
    return Divergence(mean, error, same / count, count, time.perf_counter() - start)
