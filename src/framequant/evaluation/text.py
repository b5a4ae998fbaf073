"""Texts as windows of tokens, for calibration and for perplexity.

A text is tokenized whole, without special tokens, and cut into non-overlapping windows of one length; what
fills no window is dropped. Calibration takes a seeded permutation of all windows, perplexity all of them
in order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from framequant.errors import CalibrationError, nearest
from framequant.integrations import hub
from framequant.integrations.packages import KING_JAMES

#: The first book of the New Testament in the King James Bible.
FIRST_NEW_BOOK = "Matthew"


def read_text(path: str | Path) -> str:
    """Read a text file (UTF-8).

    Raises:
        CalibrationError: the file is missing, a folder, empty, or not text.
    """
    file = Path(path).expanduser()
    if not file.exists():
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = nearest(file.name, names) if len(names) < 1000 else ""
        raise CalibrationError(f"no such file: {path}.{hint if 'Did you mean' in hint else ''}")
    if file.is_dir():
        raise CalibrationError(f"{path} is a folder; expected a text file.")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from error
    if b"\0" in data:
        raise CalibrationError(f"{path} is not text: it holds zero bytes.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: byte {error.start} is no character.") from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty.")
    return text


def tokenize(tokenizer: Any, text: str) -> Int[Tensor, " tokens"]:
    """Token ids of a whole text, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def windows(tokens: Int[Tensor, " tokens"], sequence_length: int) -> Int[Tensor, "windows length"]:
    """Cut tokens into consecutive non-overlapping windows; a view without the rest.

    Raises:
        CalibrationError: a window has fewer than two tokens, or the text fills none.
    """
    if sequence_length < 2:
        raise CalibrationError(f"sequence length {sequence_length}: a window needs at least two tokens.")
    count = len(tokens) // sequence_length
    if count == 0:
        raise CalibrationError(
            f"the text is too short: it has {len(tokens)} tokens, one window needs {sequence_length}. "
            "Give a longer text or a smaller --sequence-length."
        )
    return tokens[: count * sequence_length].view(count, sequence_length)


def evaluation_windows(
    tokenizer: Any, text: str, sequence_length: int, limit: int | None = None
) -> Int[Tensor, "windows length"]:
    """All full windows of a text, in order, or the first ``limit`` of them.

    Raises:
        CalibrationError: the text fills no window.
    """
    return windows(tokenize(tokenizer, text), sequence_length)[:limit]


def calibration_windows(
    tokenizer: Any,
    text: str,
    samples: int,
    sequence_length: int,
    seed: int = 0,
    others: int = 0,
    passes: int = 1,
) -> Int[Tensor, "samples length"]:
    """Choose windows of a text for calibration: the first ``samples`` of a seeded permutation of all.

    An encoder's tokenizer (one with a class and a separator token) frames each window with these two, within
    the sequence length.

    Args:
        tokenizer: of the model.
        text: to take windows of.
        samples: windows wanted.
        sequence_length: tokens of a window.
        seed: of the choice.
        others: windows that come from elsewhere; it only changes what the error says.
        passes: how often the text may be gone through, each time cut at other places, until there are enough.

    Raises:
        CalibrationError: the text has fewer windows than samples are asked for; the message says how many.
    """
    if samples < 1:
        raise CalibrationError(f"samples = {samples}: expected a positive integer.")
    frame = _encoder_frame(tokenizer)
    tokens = tokenize(tokenizer, text)
    inner = sequence_length - (2 if frame else 0)
    available = passes * (len(tokens) // max(inner, 1))
    if 0 < available < samples:
        raise CalibrationError(
            f"the calibration text is too short: {len(tokens)} tokens make {available} windows of "
            f"{sequence_length}{_passing(passes)}, {samples} are asked for ({samples * inner} tokens)"
            f"{_beside(others)}. Give a longer text, or --samples {available * (samples + others) // samples}, or a "
            f"smaller --sequence-length{', or larger shares of these' if others else ''}."
        )
    chosen = _drawn(tokens, inner, samples, seed)
    if frame:
        first, last = (torch.full((samples, 1), token) for token in frame)
        chosen = torch.cat([first, chosen, last], dim=1)
    return chosen


def _drawn(tokens: Tensor, length: int, samples: int, seed: int) -> Tensor:
    """Windows in random order, first those that lie one behind the other from the start, then from other places."""
    draw, parts, missing, start = np.random.RandomState(seed % 2**32), [], samples, 0
    while missing > 0:
        pieces = windows(tokens[start:], length)
        parts.append(pieces[torch.from_numpy(draw.permutation(len(pieces))[:missing])])
        missing -= len(parts[-1])
        start = int(draw.randint(min(length, len(tokens) - length + 1)))
    return torch.cat(parts)


def _passing(passes: int) -> str:
    return f" in {passes} passes" if passes > 1 else ""


def _beside(others: int) -> str:
    return f" beside {others} of other kinds (--generated, --continued, --repeated)" if others else ""


def is_framed(tokenizer: Any) -> bool:
    """Whether calibration windows of this tokenizer stand between special tokens, as encoders read them."""
    return _encoder_frame(tokenizer) is not None


def _encoder_frame(tokenizer: Any) -> tuple[int, int] | None:
    first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    return None if first is None or last is None else (first, last)


def dataset_text(name: str, max_characters: int = 1 << 25) -> str:
    """The text of a dataset on the hub: rows of the training split's text column, joined by blank lines.

    Args:
        name: ``NAME`` or ``NAME:CONFIG``.
        max_characters: reading stops there.

    Raises:
        CalibrationError: the dataset or the hub cannot be reached, or it has no column of text.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{name} is no file, and datasets, which would look for it on the hub, is not installed. "
            "Give a text file, or run: pip install 'framequant[datasets]'"
        ) from error
    path, _, config = name.partition(":")
    with hub.cache_only_if_unreachable() as online:
        try:
            rows = datasets.load_dataset(path, config or None, split="train", streaming=online)
        except Exception as error:
            where = str(error).splitlines()[0] if online else "the Hugging Face hub cannot be reached"
            raise CalibrationError(
                f"{name} is no file here, and no dataset by this name can be opened: {where}."
            ) from error
        return _join_rows(name, rows, max_characters)


def _join_rows(name: str, rows: Any, max_characters: int) -> str:
    pieces: list[str] = []
    total = 0
    column = None
    for row in rows:
        if column is None:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            if not strings:
                raise CalibrationError(
                    f"dataset {name} has no column of text; its columns are: {', '.join(row)}."
                )
            column = "text" if "text" in strings else strings[0]
        pieces.append(row[column] or "")
        total += len(pieces[-1])
        if total > max_characters:
            break
    if total == 0:
        raise CalibrationError(f"dataset {name} holds no text.")
    return "\n\n".join(pieces)


def king_james(testament: str) -> str:
    """The Old or the New Testament of the King James Bible, from an installed package; a chapter a paragraph.

    Args:
        testament: "old" or "new".

    Raises:
        ModelSourceError: the package is not installed.
    """
    with KING_JAMES.locate().open(encoding="utf-8") as file:
        verses = [json.loads(line) for line in file]
    start = next(index for index, verse in enumerate(verses) if verse["book"] == FIRST_NEW_BOOK)
    chapters: dict[tuple[str, int], list[str]] = {}
    for verse in verses[:start] if testament == "old" else verses[start:]:
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    return "\n\n".join(" ".join(verses) for verses in chapters.values())
