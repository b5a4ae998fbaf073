"""Calibration texts written in a second way, so that a model is not fitted to one typography.

Much text that language models are measured on (WikiText, LAMBADA, Penn Treebank) went through a word tokenizer:
punctuation stands apart, hyphens inside words are marked ``@-@``. Calibrated on running text alone, a two-bit
model loses far more on such text than on its own kind. Writing a share of the calibration windows this way
costs nothing on running text (``experiments/quality/README.md``).
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from framequant.errors import CalibrationError
from framequant.evaluation.text import tokenize

#: Pattern and replacement, in order: marks inside words and numbers, endings, then marks between words.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\w)-(?=\w)", " @-@ "),
        (r"(?<=\d),(?=\d)", " @,@ "),
        (r"(?<=\d)\.(?=\d)", " @.@ "),
        (r"(?<=\w)('s|n't|'re|'ve|'ll|'d|'m)\b", r" \1"),
        (r"(?<![ @])([,;:!?()\[\]\"%])", r" \1"),
        (r"([(\[\"$])(?! )", r"\1 "),
        (r"(?<=[\w)\]\"])\.(?=\s|$)", " ."),
        (r"\n+", " \n "),
    )
)


def word_tokenized(text: str) -> str:
    """A text as word tokenizers of the Moses kind leave it: every mark of punctuation a word of its own.

    Examples:
        >>> word_tokenized("A well-known (1,200 m) hill.")
        'A well @-@ known ( 1 @,@ 200 m ) hill .'
    """
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


#: Words of running text that may be names: a capital in the middle of a sentence.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")
#: Parts of a made-up name.
_SYLLABLES = [
    first + vowel + last
    for first in "bdfghjklmnprstvwyz"
    for vowel in "aeiou"
    for last in ("", "n", "r", "l")
]


def renamed(text: str, draw: random.Random) -> str:
    """A text whose names are other, made-up names, each the same throughout.

    What a name is can then be read in the text alone: a model has to copy it, letter by letter.
    """
    names = sorted(set(_NAME.findall(text)))
    made = {name: "".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))).capitalize() for name in names}
    if not made:
        return text
    return re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: made[found[0]], text)


def mixed(
    tokenizer: Any, windows: Int[Tensor, "windows length"], share: float
) -> Int[Tensor, "windows length"]:
    """Write the first windows the other way; their number and length stay.

    Args:
        tokenizer: decodes and encodes without special tokens.
        windows: token ids of running text, see ``calibration_windows``.
        share: of the windows to write anew, 0 to 1.

    Raises:
        CalibrationError: the share is out of range.
    """
    if not 0 <= share <= 1:
        raise CalibrationError(f"word-tokenized share {share}: expected a number from 0 to 1.")
    count, length = round(share * len(windows)), windows.shape[1]
    if count == 0:
        return windows
    text = " \n ".join(word_tokenized(tokenizer.decode(window)) for window in windows[:count])
    tokens = tokenize(tokenizer, text)
    count = min(count, len(tokens) // length)
    return torch.cat([tokens[: count * length].view(count, length), windows[count:]])
