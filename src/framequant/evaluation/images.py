"""Folders of images: for calibration a seeded sample, for accuracy every image with the number of its class.

Classes are subfolders, named by WordNet id or by class name. Their numbers come from ``classes.txt`` in or
above the folder (one class a line, its first word the folder's name), else from the model's own labels, else
from the sorted names if there are as many folders as classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.errors import CalibrationError
from framequant.integrations.preprocessing import ImageSettings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
#: Folders above the image folder in which ``classes.txt`` is looked for.
LEVELS_ABOVE = 2


@dataclass(frozen=True)
class LabelledImages:
    """Image files and the numbers of their classes, in order of path.

    Attributes:
        paths: image files.
        labels: class numbers, one per file.
        classes: how many classes occur.
    """

    paths: list[Path]
    labels: list[int]
    classes: int

    def __len__(self) -> int:
        return len(self.paths)


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below a folder, sorted by path.

    Raises:
        CalibrationError: the folder is missing, a file, or holds no image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise CalibrationError(
            f"{folder} is a file; expected a folder of images." if root.exists() else f"no folder {folder}."
        )
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise CalibrationError(f"{folder} holds no images (looked for {', '.join(sorted(SUFFIXES))}).")
    return files


def labelled_images(
    folder: str | Path, num_classes: int, model_labels: Sequence[str] | None = None
) -> LabelledImages:
    """Find the images of a folder of class folders, and their class numbers.

    Args:
        folder: holds one subfolder per class.
        num_classes: of the model.
        model_labels: names of the model's classes in order, if they are known.

    Raises:
        CalibrationError: images lie outside class folders, or a folder names no known class.
    """
    root = Path(folder).expanduser()
    files = find_images(root)
    loose = next((path for path in files if path.parent == root), None)
    if loose is not None:
        raise CalibrationError(f"{loose} lies in no class folder; accuracy needs {folder}/CLASS/IMAGE.")
    names = sorted({path.relative_to(root).parts[0] for path in files})
    numbers = _class_numbers(root, names, num_classes, model_labels)
    labels = [numbers[path.relative_to(root).parts[0]] for path in files]
    return LabelledImages(files, labels, len(names))


def _class_numbers(
    root: Path, names: list[str], num_classes: int, model_labels: Sequence[str] | None
) -> dict[str, int]:
    listed = _classes_file(root)
    if listed is not None:
        source, order = str(listed[0]), listed[1]
    elif model_labels and any(name in model_labels for name in names):
        source, order = "the model's labels", list(model_labels)
    elif len(names) == num_classes:
        source, order = "the folder", names
    else:
        raise CalibrationError(
            f"{root} has {len(names)} class folders, the model {num_classes} classes, and neither a "
            "classes.txt nor the model's labels name them. Put a classes.txt with one folder name a line, in "
            "class order, beside it."
        )
    numbers = {name: index for index, name in enumerate(order)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise CalibrationError(f"class folder {unknown[0]!r} of {root} is not among the classes of {source}.")
    if len(order) != num_classes:
        raise CalibrationError(f"{source} has {len(order)} classes, the model {num_classes}.")
    return numbers


def _classes_file(root: Path) -> tuple[Path, list[str]] | None:
    resolved = root.resolve()
    for folder in [resolved, *resolved.parents][: LEVELS_ABOVE + 1]:
        file = folder / "classes.txt"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return file, [line.split()[0] for line in lines if line.strip()]
    return None


def load_image(path: Path, transform: Callable[[Any], Tensor]) -> Float[Tensor, "3 height width"]:
    """Read one image and transform it.

    Raises:
        CalibrationError: the file cannot be read as an image; it is named.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need Pillow. Run: pip install 'framequant[vision]'") from error
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"{path} cannot be read as an image: {error}.") from error
    return transform(rgb)


def calibration_images(
    folder: str | Path, settings: ImageSettings, samples: int, seed: int = 0
) -> Float[Tensor, "samples 3 height width"]:
    """A seeded sample of the images of a folder, with or without subfolders.

    Raises:
        CalibrationError: fewer images than samples, or one of them is unreadable.
    """
    if samples < 1:
        raise CalibrationError(f"samples = {samples}: expected a positive integer.")
    files = find_images(folder)
    if len(files) < samples:
        raise CalibrationError(
            f"{folder} holds {len(files)} images, {samples} are asked for; give --samples {len(files)}."
        )
    order = np.random.RandomState(seed % 2**32).permutation(len(files))[:samples]
    transform = settings.transform()
    return torch.stack([load_image(files[index], transform) for index in order])


def subset(images: LabelledImages, limit: int | None, seed: int = 0) -> LabelledImages:
    """A seeded sample of labelled images, in order of path; all of them if ``limit`` is None or larger."""
    if limit is None or limit >= len(images):
        return images
    chosen = sorted(np.random.RandomState(seed).permutation(len(images))[:limit])
    labels = [images.labels[index] for index in chosen]
    return LabelledImages([images.paths[index] for index in chosen], labels, len(set(labels)))


def batches_of_files(
    files: Sequence[Path], settings: ImageSettings, batch_size: int = 32
) -> Iterator[Float[Tensor, "batch 3 height width"]]:
    """Batches of transformed images, in order.

    Raises:
        CalibrationError: an image is unreadable; it is named.
    """
    transform = settings.transform()
    for start in range(0, len(files), batch_size):
        yield torch.stack([load_image(path, transform) for path in files[start : start + batch_size]])


def image_batches(
    images: LabelledImages, settings: ImageSettings, batch_size: int = 32
) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]]:
    """Batches of transformed images and class numbers, in order.

    Raises:
        CalibrationError: an image is unreadable; it is named.
    """
    pixels = batches_of_files(images.paths, settings, batch_size)
    yield from zip(pixels, torch.tensor(images.labels).split(batch_size), strict=True)
