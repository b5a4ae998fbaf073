"""``framequant evaluate``: perplexity, ImageNet accuracy, sentence similarity, divergence from a float model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequant.cli.console import Reporter, count, facts, seconds
from framequant.cli.inputs import sequence_length_for
from framequant.cli.options import DeviceOption, DtypeOption, JsonOption, choose_device
from framequant.errors import ConfigError, ModelSourceError

if TYPE_CHECKING:
    from framequant.integrations.sources import OpenedModel

NAME = "evaluate"
EXAMPLES = (
    "Examples:\n\n"
    "framequant evaluate smol-2bit --perplexity wiki.test.txt --sequence-length 1024\n\n"
    "framequant evaluate smol-2bit --kl-to smollm2 wiki.test.txt --limit 16\n\n"
    "framequant evaluate deit-2bit --imagenet imagenet/val --json\n\n"
    "framequant evaluate minilm-2bit --sts stsb-test.csv"
)


def run(
    model: Annotated[
        str, typer.Argument(help="A checkpoint of framequant, or any model that quantize accepts.")
    ],
    perplexity: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text file to measure perplexity on.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; 1024, or what the model reads.")
    ] = None,
    imagenet: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with one subfolder of images per class.")
    ] = None,
    sts: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Table of sentence, sentence, score for a sentence encoder."),
    ] = None,
    kl_to: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="MODEL TEXT", help="Float model, and text file or image folder, for the divergence."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows, images or pairs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows, images or sentences at once.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure MODEL: perplexity, top-1 and top-5 on images, ranking of sentence pairs, divergence from a model."""
    if perplexity is None and imagenet is None and sts is None and kl_to is None:
        raise ConfigError(
            "nothing to measure: give --perplexity TEXT, --imagenet FOLDER, --sts CSV or --kl-to MODEL TEXT."
        )
    from framequant.evaluation.sentences import read_pairs

    reporter = Reporter(as_json)
    text = _read(perplexity)
    pairs = None if sts is None else read_pairs(sts)
    kl_data = _read(kl_to[1]) if kl_to else None
    place = choose_device(device)
    opened = _open(model, dtype, place, reporter)
    results: dict[str, Any] = {"model": model, "device": place}
    if perplexity is not None:
        result = _perplexity(opened, text, sequence_length, limit, batch_size, reporter)
        results["perplexity"] = {"text": perplexity, **result}
    if imagenet is not None:
        result = _accuracy(opened, imagenet, limit, batch_size, reporter)
        results["imagenet"] = {"folder": str(imagenet), **result}
    if pairs is not None:
        result = _similarity(opened, pairs.head(limit), sequence_length, batch_size, reporter)
        results["sts"] = {"table": str(sts), **result}
    if kl_to is not None:
        reference = _open(kl_to[0], dtype, place, reporter)
        result = _divergence(opened, reference, kl_to[1], kl_data, sequence_length, limit, reporter)
        results["kl"] = {"reference": kl_to[0], "data": kl_to[1], **result}
    reporter.print(facts(f"Evaluated {model}", describe(results)))
    reporter.print_json(results)


def _read(name: str | None) -> str | None:
    from framequant.evaluation.text import read_text

    return None if name is None or Path(name).is_dir() else read_text(name)


def _open(name: str, dtype: str, device: str, reporter: Reporter) -> OpenedModel:
    from framequant.integrations.sources import open_model

    with reporter.stage(f"loading {name}"):
        opened = open_model(name, dtype, device)
    for note in opened.notes:
        reporter.notice(note)
    return opened


def _perplexity(
    opened: OpenedModel,
    text: str | None,
    sequence_length: int | None,
    limit: int | None,
    batch_size: int | None,
    reporter: Reporter,
) -> dict[str, Any]:
    from framequant.errors import CalibrationError
    from framequant.evaluation import perplexity as measure
    from framequant.evaluation.text import evaluation_windows

    if text is None:
        raise CalibrationError("--perplexity names a folder; expected a text file.")
    tokenizer = opened.require_tokenizer()
    can_generate = getattr(opened.model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise ModelSourceError(f"{opened.name} is no causal language model, so it has no perplexity.")
    with reporter.stage("tokenizing the text"):
        windows = evaluation_windows(tokenizer, text, sequence_length_for(opened, sequence_length), limit)
    with reporter.bar("perplexity", "windows") as update:
        return measure.perplexity(opened.model, windows, batch_size, update).to_dict()


def _accuracy(
    opened: OpenedModel, folder: Path, limit: int | None, batch_size: int | None, reporter: Reporter
) -> dict[str, Any]:
    from framequant.evaluation import accuracy as measure
    from framequant.evaluation import images

    settings = opened.require_images()
    found = images.labelled_images(folder, _num_classes(opened), opened.labels)
    found = images.subset(found, limit)
    with reporter.bar("classifying", "images") as update:
        return measure.accuracy(opened.model, found, settings, batch_size or 32, update).to_dict()


def _similarity(
    opened: OpenedModel, pairs: Any, sequence_length: int | None, batch_size: int | None, reporter: Reporter
) -> dict[str, Any]:
    from framequant.evaluation import sentences

    tokenizer, length = opened.require_tokenizer(), sequence_length_for(opened, sequence_length)
    size = batch_size or sentences.SENTENCES_PER_BATCH
    with reporter.bar("embedding", "sentences") as update:
        return sentences.sentence_similarity(opened.model, tokenizer, pairs, length, size, update).to_dict()


def _num_classes(opened: OpenedModel) -> int:
    config = getattr(opened.model, "config", None)
    number = getattr(opened.model, "num_classes", None) or getattr(config, "num_labels", None)
    if not number:
        raise ModelSourceError(f"{opened.name} is no classifier: it has no classes.")
    return int(number)


def _divergence(
    opened: OpenedModel,
    reference: OpenedModel,
    name: str,
    text: str | None,
    sequence_length: int | None,
    limit: int | None,
    reporter: Reporter,
) -> dict[str, Any]:
    from framequant.evaluation import images, kl
    from framequant.evaluation.text import evaluation_windows

    if text is None:
        files = images.find_images(name)[:limit]
        batches = images.batches_of_files(files, opened.require_images())
        with reporter.bar("divergence", "images") as update:
            return kl.kl_divergence(opened.model, reference.model, batches, len(files), update).to_dict()
    length = sequence_length_for(opened, sequence_length)
    windows = evaluation_windows(opened.require_tokenizer(), text, length, limit)
    with reporter.bar("divergence", "windows") as update:
        return kl.kl_divergence(opened.model, reference.model, windows, None, update).to_dict()


def describe(results: dict[str, Any]) -> dict[str, str]:
    """Rows of the final table."""
    rows: dict[str, str] = {}
    if "perplexity" in results:
        value = results["perplexity"]
        rows["perplexity"] = f"{value['perplexity']:.4g}"
        rows["on"] = (
            f"{value['text']}: {value['tokens']} predicted tokens in {value['windows']} windows of "
            f"{value['sequence_length']} ({seconds(value['seconds'])})"
        )
    if "imagenet" in results:
        value = results["imagenet"]
        rows["top-1"] = f"{value['top1']:.1%} ± {value['top1_error']:.1%} (standard error)"
        rows["top-5"] = f"{value['top5']:.1%} ± {value['top5_error']:.1%}"
        rows["of"] = f"{value['images']} images of {value['classes']} classes ({seconds(value['seconds'])})"
    if "sts" in results:
        value = results["sts"]
        rows["Spearman"] = f"{value['spearman']:.4f}"
        rows["between"] = (
            f"cosines and the scores of {value['pairs']} pairs of {value['table']} ({seconds(value['seconds'])})"
        )
    if "kl" in results:
        value = results["kl"]
        rows["KL to float"] = f"{value['kl']:.4g} ± {value['standard_error']:.2g} nats per position"
        rows["same top-1"] = f"{value['agreement']:.1%} of {count(value['positions'])} positions"
        rows["against"] = f"{value['reference']} on {value['data']} ({seconds(value['seconds'])})"
    return rows
