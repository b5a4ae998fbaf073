import pytest
import torch

from tests.conftest import make_image

pytest.importorskip("torchvision")
from PIL import Image
from torch import nn

from framequant.errors import CalibrationError
from framequant.evaluation import images
from framequant.evaluation.accuracy import accuracy
from framequant.integrations.preprocessing import ImageSettings, settings_of_processor
from framequant.integrations.sources import open_model

SETTINGS = ImageSettings(32, 32, 40, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("width", "height", "skips"), [(32, 32, True), (35, 50, True), (40, 40, False), (31, 60, False)]
)
def test_only_images_between_crop_and_resize_skip_the_resize(width, height, skips):
    assert SETTINGS.skips_resize(width, height) is skips
    assert SETTINGS.transform()(Image.new("RGB", (width, height))).shape == (3, 32, 32)


def test_cropping_without_resize_keeps_pixels_and_rounds_the_offset_down(tmp_path):
    make_image(tmp_path / "a.png", (35, 37))
    image = Image.open(tmp_path / "a.png")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(37, 35, 3).permute(2, 0, 1)
    cropped = SETTINGS.transform()(image)
    assert torch.equal((cropped * 255).round().to(torch.uint8), pixels[:, 2:34, 1:33])


def test_settings_of_a_transformers_processor():
    class Processor:
        size = {"height": 30, "width": 30}  # noqa: RUF012
        resample = 2
        image_mean = [0.5, 0.5, 0.5]  # noqa: RUF012
        image_std = [0.5, 0.5, 0.5]  # noqa: RUF012

    settings = settings_of_processor(Processor(), None)
    assert (settings.height, settings.resize, settings.interpolation) == (30, (30, 30), "bilinear")
    assert settings.transform()(Image.new("RGB", (50, 20))).shape == (3, 30, 30)


def test_calibration_sample_is_seeded(image_folder):
    first = images.calibration_images(image_folder, SETTINGS, 5, seed=1)
    assert first.shape == (5, 3, 32, 32)
    assert torch.equal(first, images.calibration_images(image_folder, SETTINGS, 5, seed=1))
    assert not torch.equal(first, images.calibration_images(image_folder, SETTINGS, 5, seed=2))
    flat = images.calibration_images(image_folder / "class0", SETTINGS, 3)
    assert flat.shape == (3, 3, 32, 32)


def test_too_few_images_and_empty_folders(image_folder, tmp_path):
    with pytest.raises(CalibrationError, match=r"holds 12 images, 13 are asked for; give --samples 12"):
        images.calibration_images(image_folder, SETTINGS, 13)
    with pytest.raises(CalibrationError, match="holds no images"):
        images.find_images(tmp_path)
    with pytest.raises(CalibrationError, match="no folder"):
        images.find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_images_are_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(CalibrationError, match=r"bad\.png cannot be read as an image"):
        images.calibration_images(tmp_path, SETTINGS, 1)


def test_a_truncated_image_is_named(tmp_path):
    make_image(tmp_path / "whole.jpg", (200, 200))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    with pytest.raises(CalibrationError, match=r"cut\.jpg cannot be read"):
        images.load_image(tmp_path / "cut.jpg", SETTINGS.transform())


def test_classes_come_from_the_file_then_the_model_then_the_folders(tmp_path):
    for name in ("n02", "n01"):
        make_image(tmp_path / "val" / name / "x.png")
    found = images.labelled_images(tmp_path / "val", 2)
    assert found.labels == [0, 1]
    found = images.labelled_images(tmp_path / "val", 3, ["n02", "n03", "n01"])
    assert found.labels == [2, 0]
    (tmp_path / "classes.txt").write_text("n00 zero\nn01 one, uno\nn02 two\n")
    found = images.labelled_images(tmp_path / "val", 3, ["n02", "n03", "n01"])
    assert found.labels == [1, 2]
    assert found.classes == 2


def test_unknown_classes_are_named(tmp_path):
    make_image(tmp_path / "val" / "n09" / "x.png")
    with pytest.raises(CalibrationError, match=r"1 class folders, the model 5 classes"):
        images.labelled_images(tmp_path / "val", 5)
    with pytest.raises(CalibrationError, match="1 class folders, the model 5 classes"):
        images.labelled_images(tmp_path / "val", 5, ["a", "b", "c", "d", "e"])
    (tmp_path / "classes.txt").write_text("n00\nn01\n")
    with pytest.raises(CalibrationError, match=r"class folder 'n09' .* is not among the classes"):
        images.labelled_images(tmp_path / "val", 2)
    make_image(tmp_path / "val" / "loose.png")
    with pytest.raises(CalibrationError, match=r"loose\.png lies in no class folder"):
        images.labelled_images(tmp_path / "val", 2)


class _Brightest(nn.Module):
    """Always ranks the classes 0, 1, 2, … by falling score."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(-torch.arange(float(classes)))

    def forward(self, pixels):
        return self.scores.expand(len(pixels), -1)


def test_accuracy_counts_and_standard_errors(tmp_path):
    for label in range(8):
        make_image(tmp_path / f"c{label}" / "x.png", seed=label)
    found = images.labelled_images(tmp_path, 8)
    result = accuracy(_Brightest(8), found, SETTINGS, batch_size=3)
    assert (result.top1, result.top5, result.images, result.classes) == (1 / 8, 5 / 8, 8, 8)
    assert result.top1_error == pytest.approx((1 / 8 * 7 / 8 / 8) ** 0.5)
    assert len(images.subset(found, 3)) == 3
    assert images.subset(found, 100) is found


@pytest.mark.slow
def test_float_deit_scores_its_known_accuracy(shared):
    opened = open_model(str(shared("models/deit_tiny_patch16_224")))
    found = images.labelled_images(shared("data/imagenet/val"), 1000, opened.labels)
    shared("data/imagenet/classes.txt")
    result = accuracy(opened.model, found, opened.images)
    assert result.images == 1300
    assert round(100 * result.top1, 1) == 80.6
