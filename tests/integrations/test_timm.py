"""timm: linears of every kind of block, timm's own transforms, and accuracy from a plain image folder."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import framequant as fq
from framequant.cli.app import app
from framequant.integrations.preprocessing import settings_of_timm
from framequant.model.walk import quantized_linears
from tests.conftest import make_image
from tests.model.architectures import output, timm_swin

timm = pytest.importorskip("timm")


def convnext(**changes):
    """A ConvNeXt of four stages with two blocks each."""
    torch.manual_seed(0)
    arguments = {"depths": (2, 2, 2, 2), "dims": (16, 24, 16, 24), "num_classes": 4, **changes}
    return timm.create_model("convnext_tiny", **arguments).eval(), arguments


def images(size=32, count=6):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def test_convnext_linears(tmp_path):
    model, arguments = convnext()
    report = fq.quantize_(model, images(), fq.FrameQuantConfig())
    names = [f"stages.{s}.blocks.{b}.mlp.fc{n}" for s in range(4) for b in (0, 1) for n in (1, 2)]
    assert sorted(quantized_linears(model)) == names
    assert report.coverage == 1.0
    fq.save_pretrained(model, tmp_path / "out", model_args=arguments)
    assert torch.equal(output(fq.load(tmp_path / "out"), images()), output(model, images()))


def test_convnext_with_convolutions_for_linears_is_refused():
    model, _ = convnext(conv_mlp=True)
    with pytest.raises(fq.DiscoveryError, match="no repeated blocks"):
        fq.quantize_(model, images(), fq.FrameQuantConfig())


def test_swin_linears_and_its_downsampling(tmp_path):
    torch.manual_seed(0)
    model = timm_swin()
    chosen = fq.FrameQuantConfig(include=(r"blocks\.\d+\.(attn|mlp)", r"downsample\.reduction"))
    fq.quantize_(model, images(56), chosen)
    names = sorted(quantized_linears(model))
    assert len(names) == 2 * 2 * 4 + 1
    assert "layers.1.downsample.reduction" in names
    fq.save_pretrained(model, tmp_path / "out")
    assert torch.equal(output(fq.load(tmp_path / "out"), images(56)), output(model, images(56)))


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224", "deit3_small_patch16_224"],
)
@pytest.mark.parametrize("size", [(320, 300), (200, 400), (640, 512)])
def test_transforms_are_timms(tmp_path, name, size):
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    with torch.device("meta"):
        model = timm.create_model(name)
    make_image(tmp_path / "a.png", size)
    with Image.open(tmp_path / "a.png") as image:
        rgb = image.convert("RGB")
    torch.testing.assert_close(settings_of_timm(model).transform()(rgb), create_transform(**config)(rgb))


def test_accuracy_from_a_plain_image_folder(tmp_path, monkeypatch):
    """``quantize timm/NAME`` and ``evaluate --imagenet``: folders in alphabetical order are classes, as elsewhere."""
    model, _ = convnext()
    create = timm.create_model

    def pretrained(name, pretrained=False, **options):
        return model if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", pretrained)
    monkeypatch.setattr("framequant.integrations.hub.reachable", lambda: False)
    model.pretrained_cfg.update(input_size=(3, 32, 32), crop_pct=1.0, label_names=None)
    monkeypatch.setattr("framequant.integrations.sources._timm_labels", lambda model: None)
    for index in range(12):
        make_image(tmp_path / "val" / "abcd"[index % 4] / f"{index}.png", seed=index)

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    float_top1 = run("evaluate", "timm/convnext_tiny", "--imagenet", tmp_path / "val", "--json")["imagenet"]
    hits = _hits(model, tmp_path / "val")
    assert float_top1["top1"] == pytest.approx(hits / 12)
    out = tmp_path / "out"
    arguments = ["--calibration", tmp_path / "val", "--samples", 8, "--preset", "framequant-scalar", "--json"]
    summary = run("quantize", "timm/convnext_tiny", "--out", out, *arguments)
    assert summary["quantized_linears"] == 16


def _hits(model, folder):
    """Right answers, counted with torchvision's and timm's own tools."""
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder, create_transform(**resolve_model_data_config(model)))
    return sum(int(output(model, pixels[None]).argmax()) == label for pixels, label in data)
