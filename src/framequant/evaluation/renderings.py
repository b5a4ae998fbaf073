"""Calibration texts written in a second way, so that a model is not fitted to one typography.

Much text that language models are measured on (WikiText, LAMBADA, Penn Treebank) went through a word tokenizer:
punctuation stands apart, hyphens inside words are marked ``@-@``. Calibrated on running text alone, a two-bit
model loses far more on such text than on its own kind. Writing a share of the calibration windows this way
costs nothing on running text (``experiments/quality/README.md``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jaxtyping import Int
from torch import Tensor

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


def written(
    tokenizer: Any, windows: Int[Tensor, "windows length"], write: Callable[[str], str], joint: str
) -> Int[Tensor, "windows length"]:
    """Windows of the same length whose text is written in another way; as many, or as many as that text fills.

    Args:
        tokenizer: decodes and encodes without special tokens.
        windows: token ids of running text, see ``calibration_windows``.
        write: makes the text of one window anew.
        joint: between the texts.
    """
    length = windows.shape[1]
    tokens = tokenize(tokenizer, joint.join(write(tokenizer.decode(window)) for window in windows))
    count = min(len(windows), len(tokens) // length)
    return tokens[: count * length].view(count, length)
