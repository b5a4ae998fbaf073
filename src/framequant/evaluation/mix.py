"""What a language model is calibrated on: a text as it is and written in other ways, copying, and its own text.

A two-bit model is fitted to its calibration text far more than the loss of a layer shows. Each kind of window mends
what the others leave: another typography (``renderings``), names and phrases to be copied (``copying``), everything
else that the model was trained on (``own_text``). Shares were chosen on texts of other kinds than what the tests
measure; figures in ``experiments/quality/README.md``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from framequant.errors import CalibrationError
from framequant.evaluation import copying, own_text, renderings, text

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Mix:
    """Shares of the calibration windows; what they leave is the text as it is. None stands for the default.

    Attributes:
        word_tokenized: of the text, with its punctuation apart.
        renamed: of the text, with made-up names.
        repeated: random phrases that come again.
        generated: sampled from the model itself, from a random token on.
        continued: sampled from the model itself, going on from a few words of the text.

    Raises:
        CalibrationError: a share is not from 0 to 1, or those given exceed 1 together.
    """

    word_tokenized: float | None = None
    renamed: float | None = None
    repeated: float | None = None
    generated: float | None = None
    continued: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            share = getattr(self, field.name)
            if share is not None and not 0 <= share <= 1:
                name = field.name.replace("_", "-")
                raise CalibrationError(f"{name} share {share}: expected a number from 0 to 1.")
        if sum(self.given.values()) > 1 + 1e-9:
            told = ", ".join(f"{name.replace('_', '-')} {share:g}" for name, share in self.given.items())
            raise CalibrationError(f"the shares of the calibration windows exceed 1 together: {told}.")

    @property
    def given(self) -> dict[str, float]:
        """The shares that do not stand for a default, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: share for name, share in found.items() if share is not None}

    def counts(self, model: Any, tokenizer: Any, total: int) -> dict[str, int]:
        """Windows of each kind for a model."""
        given, default = self.given, defaults(model, tokenizer)
        rest = sum(share for name, share in default.items() if name not in given)
        shrink = min(1.0, (1 - sum(given.values())) / rest) if rest else 1.0
        shares = {name: given.get(name, share * shrink) for name, share in default.items()}
        return {name: int(total * share + 1e-9) for name, share in shares.items()}


#: Nothing but the text.
PLAIN = Mix(0, 0, 0, 0, 0)
#: How often the text may be gone through, each time cut at other places, where other kinds of windows stand beside it.
PASSES = 8
#: Shares for models that write text from left to right.
CAUSAL = {"word_tokenized": 0.2, "renamed": 0.15, "repeated": 0.1, "generated": 0.4, "continued": 0.0}
#: Shares for others whose tokenizer sets no frame around a window.
OTHERS = {"word_tokenized": 0.5, "renamed": 0.0, "repeated": 0.0, "generated": 0.0, "continued": 0.0}


def defaults(model: Any, tokenizer: Any) -> dict[str, float]:
    """Shares for a model when none are given; an encoder's framed windows stay as they are."""
    if text.is_framed(tokenizer):
        return dict.fromkeys(CAUSAL, 0.0)
    return CAUSAL if own_text.can_generate(model) else OTHERS


def calibration_mix(
    model: Any, tokenizer: Any, content: str, count: int, length: int, seed: int = 0, mix: Mix | None = None
) -> Int[Tensor, "count length"]:
    """Calibration windows of several kinds, shuffled, so that what a tuning holds out has a share of each.

    Args:
        model: the float model; it samples its share, on the device it runs on.
        tokenizer: of the model.
        content: the text.
        count: windows wanted, 1 or more.
        length: tokens of a window, 2 or more.
        seed: of the choice of windows, of sampling, and of the order.
        mix: shares; the defaults for the model if None.

    Raises:
        CalibrationError: the text is too short, or the model cannot generate and should.
    """
    counts = (mix or Mix()).counts(model, tokenizer, count)
    own, further, again = counts["generated"], counts["continued"], counts["repeated"]
    made = own + further + again
    parts = []
    if made < count:
        of_text = text.calibration_windows(
            tokenizer, content, count - made, length, seed, made, PASSES if made else 1
        )
        parts += _in_other_ways(tokenizer, of_text, counts, seed)
    if again:
        parts.append(copying.repeated_windows(tokenizer, again, length, seed))
    if own:
        parts.append(own_text.own_windows(model, tokenizer, own, length, seed))
    if further:
        tokens = text.tokenize(tokenizer, content)
        parts.append(own_text.own_windows(model, tokenizer, further, length, seed + 1, tokens))
    if len(parts) == 1:
        return parts[0]
    windows = torch.cat(parts)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _in_other_ways(tokenizer: Any, windows: Tensor, counts: dict[str, int], seed: int) -> list[Tensor]:
    """The first windows written anew, the rest as they are."""
    draw = random.Random(seed)
    ways: tuple[tuple[str, Callable[[str], str], str], ...] = (
        ("word_tokenized", renderings.word_tokenized, " \n "),
        ("renamed", lambda content: copying.renamed(content, draw), "\n\n"),
    )
    parts, first = [], 0
    for name, write, joint in ways:
        if counts[name]:
            found = renderings.written(tokenizer, windows[first : first + counts[name]], write, joint)
            parts.append(found)
            first += len(found)
    return [*parts, windows[first:]] if first < len(windows) else parts
