"""Calibration windows that a language model writes itself.

A calibration text is of one kind. A two-bit model fitted to it alone stays close to the float model on text of that
kind and drifts away on every other (``experiments/quality/README.md``). What the model samples when nothing is
asked of it spreads over all that it was trained on, names and rare words included, and needs no data: after
Liu et al., "LLM-QAT" (arXiv 2305.17888), who start from a random token as well.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from framequant.errors import CalibrationError

#: Tokens of one sampled text; several fill a window. Short ones cost fewer steps and bring more kinds of text.
PIECE = 128
#: Tokens of the calibration text that a piece goes on from.
BEGINNING = 16
#: Texts sampled side by side, by kind of device; halved as often as memory wants it.
SIDE_BY_SIDE = {"cpu": 512, "cuda": 4096}


def own_windows(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int = 0,
    text: Int[Tensor, " tokens"] | None = None,
) -> Int[Tensor, "count length"]:
    """Sample windows from a language model at temperature 1, in pieces.

    Args:
        model: a causal language model of transformers, on the device it runs on.
        tokenizer: names the special tokens, which start no piece.
        count: windows wanted, 0 or more.
        length: tokens of a window.
        seed: of the beginnings and of sampling; on one device the same windows for the same seed.
        text: each piece goes on from ``BEGINNING`` tokens of it, drawn at random; None for one random token.

    Returns:
        Token ids on the CPU.

    Raises:
        CalibrationError: the model cannot generate, or the text has fewer than ``BEGINNING`` tokens.
    """
    if not can_generate(model):
        raise CalibrationError(
            f"{type(model).__name__} does not generate text, so it cannot write calibration windows: "
            "give --generated 0 and --continued 0."
        )
    if count == 0:
        return torch.empty(0, length, dtype=torch.long)
    piece = min(PIECE, length)
    pieces = -(-count * length // piece)
    first = _first_tokens(model, tokenizer, pieces, seed) if text is None else _beginnings(text, pieces, seed)
    first = first[:, :piece]
    device = next(model.parameters()).device
    model = _writer(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        together = SIDE_BY_SIDE["cpu" if device.type == "cpu" else "cuda"]
        tokens = torch.cat([_sample(model, part, piece) for part in first.split(together)])
    return tokens.reshape(-1)[: count * length].view(count, length)


def can_generate(model: Any) -> bool:
    """Whether a model samples text from its own past."""
    return bool(getattr(model, "can_generate", lambda: False)()) and not getattr(
        model.config, "is_encoder_decoder", False
    )


def _writer(model: Any) -> Any:
    """The model that writes: on a GPU in bfloat16, several times as fast and as good a text."""
    parameter = next(model.parameters())
    if parameter.device.type != "cuda" or parameter.dtype != torch.float32:
        return model
    return copy.deepcopy(model).to(torch.bfloat16)


def _first_tokens(model: Any, tokenizer: Any, count: int, seed: int) -> Int[Tensor, "count 1"]:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (count, 1), generator=generator)]


def _beginnings(text: Int[Tensor, " tokens"], count: int, seed: int) -> Int[Tensor, "count beginning"]:
    if len(text) < BEGINNING:
        raise CalibrationError(
            f"the calibration text has {len(text)} tokens, and the model is to go on from {BEGINNING} of them: give a "
            "longer text, or --continued 0."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - BEGINNING + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(BEGINNING)]


@torch.no_grad()
def _sample(model: Any, first: Int[Tensor, "batch begun"], length: int) -> Int[Tensor, "batch length"]:
    """Texts of ``length`` tokens that go on from some."""
    missing = length - first.shape[1]
    if not missing:
        return first
    tokens = first.to(next(model.parameters()).device)
    with contextlib.suppress(torch.OutOfMemoryError):
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=missing,
            max_new_tokens=missing,
            pad_token_id=0,
        )
        return written[:, :length].cpu()
    if len(first) == 1:
        raise CalibrationError(
            "memory does not suffice for the model to write calibration windows: give --generated 0 and --continued 0."
        )
    torch.cuda.empty_cache()
    return torch.cat([_sample(model, half, length) for half in first.split(-(-len(first) // 2))])
