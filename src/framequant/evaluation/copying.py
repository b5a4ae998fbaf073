"""Calibration windows that ask for copying: made-up names, and random phrases that come again.

What a language model is sure of, because it stands in the context already, hardly shows in gradients; and a calibration
text without rare words hardly asks for it. A two-bit model calibrated on such text loses most on names that it has to
copy letter by letter. A quarter of the windows written as here takes two thirds of that loss away and costs running
text nothing (``experiments/quality/README.md``).
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

#: Words of running text that may be names: a capital in the middle of a sentence.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
#: Parts of a made-up name.
_SYLLABLES = [
    first + vowel + last
    for first in "bdfghjklmnprstvwyz"
    for vowel in "aeiou"
    for last in ("", "n", "r", "l")
]
#: Tokens of a phrase that comes again, and how many phrases a window has.
PHRASE_LENGTHS = (4, 8, 16, 32)
PHRASES = 8


def renamed(text: str, draw: random.Random) -> str:
    """A text whose names are other, made-up names, each the same throughout.

    What a name is can then be read in the text alone: a model has to copy it, letter by letter.
    """
    names = sorted(set(_NAME.findall(text)))
    made = {name: "".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))).capitalize() for name in names}
    if not made:
        return text
    return re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: made[found[0]], text)


def repeated_windows(tokenizer: Any, count: int, length: int, seed: int = 0) -> Int[Tensor, "count length"]:
    """Windows of random phrases that come again and again, in any order.

    Args:
        tokenizer: its ordinary tokens are drawn from.
        count: windows wanted, 0 or more.
        length: tokens of a window.
        seed: the same windows for the same seed.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    tokens = [token for token in range(len(tokenizer)) if token not in special]
    draw = random.Random(seed)
    windows = torch.empty(count, length, dtype=torch.long)
    for window in windows:
        phrases = [draw.choices(tokens, k=draw.choice(PHRASE_LENGTHS)) for _ in range(PHRASES)]
        row: list[int] = []
        while len(row) < length:
            row += draw.choice(phrases)
        window.copy_(torch.tensor(row[:length]))
    return windows
