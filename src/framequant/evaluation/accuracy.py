"""Top-1 and top-5 accuracy of an image classifier, with the standard error of a proportion, √(p(1 − p)/n)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framequant.evaluation.forward import OnProgress, logits_of, while_decoded
from framequant.evaluation.images import LabelledImages, image_batches
from framequant.integrations.preprocessing import ImageSettings


@dataclass(frozen=True)
class Accuracy:
    """Result of ``accuracy``; shares are fractions, not per cent.

    Attributes:
        top1: share of images whose most likely class is right.
        top1_error: its standard error.
        top5: share of images whose class is among the five most likely.
        top5_error: its standard error.
        images: number of images.
        classes: number of classes that occur among them.
        seconds: wall-clock time.
    """

    top1: float
    top1_error: float
    top5: float
    top5_error: float
    images: int
    classes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    images: LabelledImages,
    settings: ImageSettings,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Accuracy:
    """Classify every image.

    Args:
        model: returns logits (batch, classes).
        images: files and class numbers.
        settings: the model's preprocessing.
        batch_size: images at once.
        on_progress: called with images done and in all.
        batches: what ``image_batches`` returned for these images, for models that are measured one after another.

    Raises:
        CalibrationError: an image is unreadable; it is named.
        NumericalError: a logit is NaN or infinite.
    """
    start = time.perf_counter()
    first = five = done = 0
    source = image_batches(images, settings, batch_size) if batches is None else batches
    for pixels, labels in while_decoded(source, model):
        logits = logits_of(model, pixels)
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices.cpu()
        hits = best == labels[:, None]
        first += int(hits[:, 0].sum())
        five += int(hits.any(dim=-1).sum())
        done += len(labels)
        if on_progress:
            on_progress(done, len(images))
    top1, top5 = first / done, five / done
    return Accuracy(
        top1,
        _standard_error(top1, done),
        top5,
        _standard_error(top5, done),
        done,
        images.classes,
        time.perf_counter() - start,
    )


def _standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
