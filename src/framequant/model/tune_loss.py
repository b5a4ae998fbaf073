"""What tuning compares: the outputs of the quantized and of the float model, over the real positions of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import CalibrationError
from framequant.model.calibration import to_device
from framequant.model.replay import call_model

#: Bytes of one model's outputs, and tokens, that are worked on at once.
OUTPUT_BYTES = {"cpu": 1 << 28, "cuda": 2 << 30}
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}


def probe(teacher: nn.Module, sample: Any, kind: str) -> tuple[str, int]:
    """Find out which loss suits a model, and how many numbers it returns per sample.

    Args:
        teacher: the float model.
        sample: a batch of one row.
        kind: "kl", "mse" or "auto".

    Raises:
        CalibrationError: the model returns nothing that the loss could compare.
    """
    reference = next(teacher.parameters())
    with torch.no_grad():
        result = call_model(teacher, to_device(sample, reference.device, reference.dtype))
    if kind == "auto":
        classes = isinstance(result, Tensor) and getattr(teacher, "num_classes", 0)
        kind = "kl" if classes or getattr(result, "logits", None) is not None else "mse"
    return kind, output_of(result, kind).numel()


def samples_at_once(sample: Any, outputs: int, device: str, most: int) -> int:
    """How many samples may be run together, 1 to ``most``.

    Args:
        sample: a batch of one row.
        outputs: numbers that the model returns for it.
        device: kind of device.
        most: samples of a step.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    first = tensors_of(sample)[0]
    tokens = first.shape[1] if first.ndim == 2 and not first.is_floating_point() else 64
    return max(min(OUTPUT_BYTES[kind] // (4 * outputs), TOKENS_AT_ONCE[kind] // max(tokens, 1), most), 1)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    values = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, dict) else batch
    return [value for value in values if isinstance(value, Tensor)]


def output_of(result: Any, kind: str) -> Tensor:
    """The tensor of a model's result that the loss compares, (…, features).

    Raises:
        CalibrationError: the result has none of this kind.
    """
    if isinstance(result, Tensor):
        return result
    for name in ("logits",) if kind == "kl" else ("last_hidden_state", "logits"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    both = [getattr(result, name, None) for name in ("image_embeds", "text_embeds")]
    if kind == "mse" and all(isinstance(value, Tensor) for value in both):  # two towers, as CLIP's
        return torch.cat(both)
    if kind == "mse" and isinstance(result, tuple) and isinstance(result[0], Tensor):
        return result[0]
    raise CalibrationError(
        f"{type(result).__name__} holds no {'logits' if kind == 'kl' else 'hidden states'} to train on: leave --tune "
        "out, and give --set train_ahead=0."
    )


class _Divergence(torch.autograd.Function):
    """Divergence of distributions from logits, with few copies of them: those of a vocabulary are large."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        log_q = output.log_softmax(-1, dtype=torch.float32)
        log_p = target.log_softmax(-1, dtype=torch.float32)
        p = log_p.exp()
        ctx.save_for_backward(p, log_q)
        ctx.dtype = output.dtype
        return log_p.sub_(log_q).mul_(p).sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        p, log_q = ctx.saved_tensors
        return (log_q.exp().sub_(p).mul_(gradient[:, None])).to(ctx.dtype), None


def distance(output: Tensor, target: Tensor, mask: Tensor | None, kind: str) -> tuple[Tensor, int]:
    """Sum over positions of how far an output is from its target, and the number of positions.

    Args:
        output: (…, features).
        target: likewise.
        mask: real positions, flat; ignored where the output has other positions than the input.
        kind: "kl": divergence of the target's distribution from the output's, in nats; "mse": squared error
            over the target's squared norm.
    """
    output, target = output.flatten(0, -2), target.flatten(0, -2)
    if kind == "kl":
        values = _Divergence.apply(output, target)
    else:
        output, target = output.float(), target.float()
        values = (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    if mask is not None and mask.numel() == len(values):
        values = values[mask.to(values.device)]
    return values.sum(), len(values)


def weight_of(batch: Any) -> int:
    """Real tokens of a batch, or its samples; only the ratio between batches of one kind counts."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is not None:
        return max(int(mask.sum()), 1)
    return len(tensors_of(batch)[0])
