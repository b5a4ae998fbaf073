"""Pairs of sentences with a score of likeness: calibration for sentence encoders, and how well they rank pairs.

A file is a CSV table of two sentences and a number a row (STS-B's form); a first row whose third cell is no
number is a heading. A sentence's embedding is the mean of the last hidden states over its real tokens, the
likeness of two is their cosine, and the result is Spearman's rank correlation with the scores.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from framequant.errors import CalibrationError, NumericalError
from framequant.evaluation.forward import OnProgress, while_decoded
from framequant.evaluation.text import read_text
from framequant.model.calibration import to_device

SENTENCES_PER_BATCH = 128


@dataclass(frozen=True)
class SentencePairs:
    """Rows of a table of sentence pairs.

    Attributes:
        first: first sentence of each pair.
        second: second sentence.
        scores: how alike people found them; only the order matters.
    """

    first: list[str]
    second: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def sentences(self) -> list[str]:
        """Every sentence once, in order of first appearance."""
        return list(
            dict.fromkeys(text for pair in zip(self.first, self.second, strict=True) for text in pair)
        )

    def head(self, limit: int | None) -> SentencePairs:
        """The first ``limit`` pairs; all of them if it is None."""
        return SentencePairs(self.first[:limit], self.second[:limit], self.scores[:limit])


@dataclass(frozen=True)
class SentenceSimilarity:
    """Result of ``sentence_similarity``.

    Attributes:
        spearman: rank correlation of the cosines with the scores, −1 to 1.
        pairs: number of pairs.
        seconds: wall-clock time.
    """

    spearman: float
    pairs: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def read_pairs(path: str | Path) -> SentencePairs:
    """Read a table of sentence pairs (CSV, UTF-8).

    Raises:
        CalibrationError: the file is missing, no text, empty, or a row has no two sentences and a number; the row
            is named.
    """
    rows = [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]
    if rows and len(rows[0]) >= 3 and _number(rows[0][2]) is None:
        rows = rows[1:]
    pairs = SentencePairs([], [], [])
    for number, row in enumerate(rows, start=1):
        score = _number(row[2]) if len(row) >= 3 else None
        if score is None or not row[0].strip() or not row[1].strip():
            raise CalibrationError(
                f"{path}, row {number} is no sentence pair: expected sentence, sentence, score; found {row[:3]!r}."
            )
        pairs.first.append(row[0])
        pairs.second.append(row[1])
        pairs.scores.append(score)
    if not len(pairs):
        raise CalibrationError(f"{path} holds no sentence pairs.")
    return pairs


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def sentence_batches(
    tokenizer: Any, sentences: Sequence[str], max_length: int, batch_size: int = SENTENCES_PER_BATCH
) -> Iterator[dict[str, Tensor]]:
    """Tokenized batches of neighbouring sentences, each padded to its longest and with its attention mask.

    Raises:
        CalibrationError: the tokenizer has no padding token.
    """
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise CalibrationError("sentences of different length need a tokenizer with a padding token.")
    for start in range(0, len(sentences), batch_size):
        part = list(sentences[start : start + batch_size])
        encoded = tokenizer(
            part, padding=True, truncation=True, max_length=max_length, return_tensors="pt", verbose=False
        )
        yield {key: value for key, value in encoded.items() if isinstance(value, Tensor)}


def calibration_sentences(
    tokenizer: Any, sentences: Sequence[str], max_length: int, samples: int | None = None, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Batches of single sentences for calibration; the walk leaves their padding out of all moments.

    Args:
        tokenizer: of the model; adds its own special tokens.
        sentences: the sentences to choose from.
        max_length: longer sentences are cut to so many tokens.
        samples: how many, a seeded choice; all if None.
        seed: of the choice.

    Raises:
        CalibrationError: fewer sentences than samples, or no padding token.
    """
    if samples is not None and samples < 1:
        raise CalibrationError(f"samples = {samples}: expected a positive integer.")
    if samples is not None and samples > len(sentences):
        raise CalibrationError(
            f"there are {len(sentences)} sentences, {samples} are asked for; give --samples {len(sentences)}."
        )
    order = np.random.RandomState(seed % 2**32).permutation(len(sentences))[:samples]
    chosen = sorted((sentences[index] for index in order), key=len)  # alike in length: little padding
    return list(sentence_batches(tokenizer, chosen, max_length))


@torch.inference_mode()
def embeddings(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]] | Sequence[dict[str, Tensor]],
    total: int | None = None,
    on_progress: OnProgress | None = None,
) -> Float[Tensor, "sentences hidden"]:
    """Embeddings of tokenized sentences: the mean of the last hidden states over real tokens, float32, on the CPU.

    Raises:
        CalibrationError: the model returns no hidden states.
        NumericalError: an embedding is NaN or infinite.
    """
    results: list[Tensor] = []
    done = 0
    for batch in while_decoded(batches, model):
        hidden = getattr(
            model(**to_device(batch, next(model.parameters()).device)), "last_hidden_state", None
        )
        if hidden is None:
            raise CalibrationError(
                f"{type(model).__name__} returns no last hidden states: it is no sentence encoder."
            )
        mask = batch["attention_mask"].to(hidden.device)[:, :, None].float()
        results.append(((hidden.float() * mask).sum(1) / mask.sum(1)).cpu())
        done += len(mask)
        if on_progress:
            on_progress(done, total or done)
    result = torch.cat(results)
    if not torch.isfinite(result).all():
        raise NumericalError(f"{type(model).__name__} returns NaN or infinite hidden states.")
    return result


def sentence_similarity(
    model: nn.Module,
    tokenizer: Any,
    pairs: SentencePairs,
    max_length: int = 256,
    batch_size: int = SENTENCES_PER_BATCH,
    on_progress: OnProgress | None = None,
) -> SentenceSimilarity:
    """Measure how well an encoder ranks sentence pairs by likeness.

    Args:
        model: an encoder that returns ``last_hidden_state``.
        tokenizer: of the model.
        pairs: sentences and scores.
        max_length: longer sentences are cut to so many tokens.
        batch_size: sentences at once.
        on_progress: called with sentences done and in all.

    Raises:
        CalibrationError: no hidden states, no padding token, or fewer than two different scores.
        NumericalError: a hidden state is NaN or infinite.
    """
    start = time.perf_counter()
    if len(set(pairs.scores)) < 2:
        raise CalibrationError("a rank correlation needs at least two different scores.")
    sentences = sorted(pairs.sentences, key=len)
    place = {text: index for index, text in enumerate(sentences)}
    batches = sentence_batches(tokenizer, sentences, max_length, batch_size)
    vectors = functional.normalize(embeddings(model, batches, len(sentences), on_progress).double(), dim=1)
    left, right = (vectors[[place[text] for text in texts]] for texts in (pairs.first, pairs.second))
    cosines = (left * right).sum(1).numpy()
    return SentenceSimilarity(spearman(cosines, pairs.scores), len(pairs), time.perf_counter() - start)


def spearman(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. NaN if one side is constant.

    Examples:
        >>> spearman([1, 2, 3], [10, 30, 20])
        0.5
    """
    a, b = (_ranks(np.asarray(values)) for values in (left, right))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
