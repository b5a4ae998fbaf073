"""A scalar whose gradients have the Fisher information of a model as covariance.

With logits it is the negative log-likelihood of labels drawn from the model's own distribution; without, the product
of the output with a random Gaussian cotangent.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from framequant.model.replay import first_tensor

#: Tokens whose labels are drawn at once.
LOGITS_AT_ONCE = 4096
#: Of these, rows that a CPU works on while they are in its cache: a third of the time.
ROWS_IN_CACHE = 16


def _rows(logits: Tensor, mask: Tensor | None) -> Float[Tensor, "tokens vocabulary"]:
    flat = logits.reshape(-1, logits.shape[-1])
    if mask is not None and mask.numel() == flat.shape[0]:
        flat = flat[mask.to(flat.device)]
    return flat


def sampled_loss(
    model: nn.Module,
    output: Any,
    mask: Tensor | None,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """A scalar whose gradients have the Fisher information as covariance; see the module's text."""
    logits = _logits(model, output)
    if logits is not None:
        flat = _rows(logits, mask)
        pieces = flat.split(LOGITS_AT_ONCE)
        losses = (_label_loss(rows, _draw(rows, generator)) for rows in pieces)
        return sum(losses, start=flat.new_zeros(()).float())
    hidden = first_tensor(list(output.values()) if isinstance(output, Mapping) else [output])
    cotangent = torch.randn(hidden.shape, generator=generator).to(hidden)
    if mask is not None and mask.numel() == hidden.shape[:-1].numel():  # padding's outputs are nobody's loss
        cotangent *= mask.reshape(*hidden.shape[:-1], 1).to(hidden)
    return (hidden * cotangent).float().sum()


def skip_labels(batch: Any, mask: Tensor | None, generator: torch.Generator) -> None:
    """Draw what ``sampled_loss`` would for a batch of token ids that another process runs, and forget it."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    tokens = ids.numel() if mask is None else int(mask.sum())
    for first in range(0, tokens, LOGITS_AT_ONCE):
        torch.rand(min(LOGITS_AT_ONCE, tokens - first), 1, generator=generator)


@torch.no_grad()
def _draw(logits: Tensor, generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """A class for each token from the model's own distribution."""
    draws = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    rows = ROWS_IN_CACHE if logits.device.type == "cpu" else max(len(logits), 1)
    found = []
    for part, draw in zip(logits.split(rows), draws.split(rows), strict=True):
        totals = part.float().softmax(dim=-1).cumsum(dim=-1)
        found.append((totals < draw * totals[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1))
    return torch.cat(found)


def _label_loss(logits: Tensor, labels: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


def _logits(model: nn.Module, output: Any) -> Tensor | None:
    """The logits of an output, or None for a model that ends in features."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor) and getattr(model, "num_classes", 0):
        return output
    return None
