"""How a vision model wants its images: size, crop, interpolation, mean, scale, and the transform of them.

An image whose short side already lies between the crop and the resize size was cropped from a resized one
(ImageNet copies at 227 pixels); resizing it again would zoom and blur it, so it is cropped only, its offset
rounded down (torchvision rounds the half pixel to even, which moves a 227-pixel copy by one pixel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from framequant.errors import ModelSourceError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSettings:
    """Preprocessing of images in evaluation.

    Attributes:
        height: of the model's input, in pixels.
        width: likewise.
        resize: the short side is resized to this before the centre crop; (height, width) squashes instead.
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", …
        mean: per channel, of values in [0, 1].
        std: likewise.
    """

    height: int
    width: int
    resize: int | tuple[int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def skips_resize(self, width: int, height: int) -> bool:
        """Whether an image of this size is cropped without being resized."""
        if not isinstance(self.resize, int):
            return False
        return max(self.height, self.width) <= min(width, height) < self.resize

    def transform(self) -> Callable[[Any], Tensor]:
        """The transform from a PIL image to a tensor (3, height, width).

        Raises:
            ModelSourceError: torchvision is not installed.
        """
        try:
            from torchvision import transforms
        except ImportError as error:
            raise ModelSourceError(
                "images need torchvision. Run: pip install 'framequant[vision]'"
            ) from error
        size = self.resize if isinstance(self.resize, int) else list(self.resize)
        mode = transforms.InterpolationMode(self.interpolation)
        resize = transforms.Resize(size, interpolation=mode)
        normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])
        crop = transforms.CenterCrop((self.height, self.width))

        def apply(image: Any) -> Tensor:
            if not self.skips_resize(*image.size):
                return normalize(crop(resize(image)))
            left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
            return normalize(image.crop((left, top, left + self.width, top + self.height)))

        return apply


def settings_of_timm(model: nn.Module) -> ImageSettings:
    """Settings from a timm model's own data config."""
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    crop_pct = data.get("crop_pct") or 1.0
    scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
    squash = data.get("crop_mode") == "squash" or height != width
    interpolation = data.get("interpolation", "bicubic")
    return ImageSettings(
        height=height,
        width=width,
        resize=scaled if squash else scaled[0],
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def settings_of_processor(processor: Any, config: Any) -> ImageSettings:
    """Settings from a transformers image processor; where there is none, from the model's config."""
    side = getattr(config, "image_size", 224)
    side = side if isinstance(side, int) else side[0]
    if processor is None:
        return ImageSettings(side, side, round(side / 0.875))
    size = _as_mapping(getattr(processor, "size", None)) or {"height": side, "width": side}
    crop = (
        _as_mapping(getattr(processor, "crop_size", None))
        if getattr(processor, "do_center_crop", False)
        else {}
    )
    if "shortest_edge" in size:
        resize: int | tuple[int, int] = int(size["shortest_edge"])
        height, width = int(crop.get("height", side)), int(crop.get("width", side))
    else:
        resize = int(size["height"]), int(size["width"])
        height, width = int(crop.get("height", resize[0])), int(crop.get("width", resize[1]))
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    return ImageSettings(
        height=height,
        width=width,
        resize=resize,
        interpolation=names.get(int(getattr(processor, "resample", 3) or 3), "bicubic"),
        mean=tuple(getattr(processor, "image_mean", None) or IMAGENET_MEAN),
        std=tuple(getattr(processor, "image_std", None) or IMAGENET_STD),
    )


def _as_mapping(value: Any) -> dict[str, int]:
    """A processor's size as a plain mapping without empty entries."""
    if value is None:
        return {}
    items = dict(value) if not hasattr(value, "__dict__") or hasattr(value, "keys") else vars(value)
    return {key: number for key, number in items.items() if number is not None}
