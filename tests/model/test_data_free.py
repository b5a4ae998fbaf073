"""Sigma-Delta over whole models: no data, every linear, files equal to memory, figures counted from bytes."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import framequant as fq
from framequant.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from framequant.codes.packing import bytes_per_row
from framequant.integrations.transformers import dequantize_
from framequant.model.walk import quantized_linears
from tests.model.architectures import make as make_architecture
from tests.model.architectures import output


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(20, 31), nn.Linear(31, 20)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.outer(torch.relu(self.inner(inputs)))


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), Block(), nn.Linear(20, 7, bias=False)
    return nn.Sequential(*layers).eval()


def inputs() -> torch.Tensor:
    return torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(1))


CHANGES = {
    "preset": {},
    "columns": {"vectors": "columns"},
    "no signs": {"random_signs": False, "vectors": "columns"},
    "second order": {"order": 2, "levels": 6, "dual": "sobolev", "frame_size_ratio": 3.3},
    "third order columns": {"order": 3, "levels": 10, "vectors": "columns", "frame_size_ratio": 2},
    "memoryless": {"order": 0, "levels": 4},
    "22 levels": {"levels": 22, "flip_passes": 5, "frame_size_ratio": 1.5},
    "float bias": {"quantize_bias": False},
    "stable": {"step": "stable"},
    "value": {"step": 0.3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_reloaded_is_in_memory_bit_for_bit(name, tmp_path):
    model, x = make(), inputs()
    before = model(x)
    report = fq.quantize_(model, config=fq.preset("sigma-delta", **CHANGES[name]))
    after = model(x)
    assert len(quantized_linears(model)) == len(report.linears) == 4
    assert not torch.equal(before, after)
    fq.save_pretrained(model, tmp_path / "out")
    loaded = fq.load(tmp_path / "out", model=make(5))
    assert torch.equal(loaded(x), after)
    assert loaded.framequant_report == report
    assert not any("weight" in key for key in load_file(tmp_path / "out" / WEIGHTS_NAME))
    # The product in the frame is the product with the synthesised weight.
    dense = dequantize_(copy.deepcopy(model))
    assert not quantized_linears(dense)
    torch.testing.assert_close(dense(x), after, rtol=1e-4, atol=1e-5)


def test_more_codes_less_error():
    x, errors = inputs(), []
    for ratio, levels in ((2, 2), (8, 2), (8, 4), (16, 8)):
        model = make().requires_grad_(False)
        exact = model(x)
        fq.quantize_(model, config=fq.preset("sigma-delta", frame_size_ratio=ratio, levels=levels))
        errors.append(float((model(x) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", ["preset", "columns", "22 levels", "float bias"])
def test_bits_are_counted_from_the_file(name, tmp_path):
    model = make()
    config = fq.preset("sigma-delta", **CHANGES[name])
    report = fq.quantize_(model, config=config)
    fq.save_pretrained(model, tmp_path / "out")
    described = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["quantization_config"]["linears"]
    with safe_open(tmp_path / "out" / WEIGHTS_NAME, framework="pt") as file:
        for entry in report.linears:
            keys = [
                key
                for key in file.keys()  # noqa: SIM118 - safe_open is no mapping
                if key.startswith(f"{entry.name}.") and not key.endswith(".bias")
            ]
            stored = sum(file.get_tensor(key).nbytes for key in keys)
            stored += len(json.dumps({entry.name: described[entry.name]})) - 1
            assert entry.bits_per_weight == pytest.approx(
                8 * stored / entry.num_weights, abs=8 * 3 / entry.num_weights
            )
            has_bias = f"{entry.name}.packed_bias" in keys
            assert has_bias == (config.quantize_bias and entry.name != "4")
    # By hand, for the first linear: 20 rows of N = 8 · 12 one-bit codes, 20 scales, 8 · 20 codes and a scale of bias.
    if name == "preset":
        parts = report.linears[0].bytes
        assert parts["packed_codes"] == 20 * bytes_per_row(96, 2) == 20 * 12
        assert (parts["scales"], parts["packed_bias"], parts["bias_scale"]) == (40, 20, 2)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "timm_vit"])
def test_transformers_and_timm(name, tmp_path):
    model, data = make_architecture(name)
    report = fq.quantize_(model, config=fq.preset("sigma-delta", frame_size_ratio=2, levels=4))
    expected = output(model, data)
    assert report.coverage > (0.6 if name in ("llama_tied", "gpt2") else 0.95)
    fq.save_pretrained(model, tmp_path / "out")
    loaded = fq.load(tmp_path / "out")
    assert torch.equal(output(loaded, data), expected)
    if name == "llama_tied":
        assert report.skipped == {"lm_head": "its weight is tied to another module's"}


def test_half_precision_models_keep_their_dtype():
    model = make().to(torch.bfloat16)
    fq.quantize_(model, config=fq.preset("sigma-delta"))
    assert model(inputs().to(torch.bfloat16)).dtype == torch.bfloat16
    assert model[1].scales.dtype == torch.bfloat16


def test_patterns_and_overrides():
    model = make()
    config = fq.preset(
        "sigma-delta", ignore=("^4$",), overrides={"inner": {"levels": 8}, "outer": {"skip": True}}
    )
    report = fq.quantize_(model, config=config)
    assert {entry.name: entry.code for entry in report.linears} == {
        "1": "2 levels, sigma-delta order 1, rows",
        "3.inner": "8 levels, sigma-delta order 1, rows",
    }
    assert report.skipped == dict.fromkeys(["3.outer", "4"], "left in float by a pattern")
    with pytest.raises(fq.ConfigError, match="matches no linear"):
        fq.quantize_(make(), config=fq.preset("sigma-delta", ignore=("attention",)))


def test_same_settings_same_files(tmp_path):
    for folder in ("a", "b"):
        model = make()
        fq.quantize_(model, config=fq.preset("sigma-delta", flip_passes=3))
        fq.save_pretrained(model, tmp_path / folder)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_report_has_bounds_and_nearest_rounding_beside():
    model, x = make(), torch.rand(500, 3, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    exact = model.requires_grad_(False)(x)
    report = fq.quantize_(model, config=fq.preset("sigma-delta"))
    error = float((model(x) - exact).norm(dim=1).max())
    assert report.bounds["radius"] == pytest.approx(math.sqrt(12))
    assert error <= report.bounds["a_posteriori"]["value"] <= report.bounds["a_priori"]["value"]
    assert report.bounds["a_priori"]["vacuous"] is True
    for entry in report.linears:
        details = entry.details
        assert details["overloads"] <= details["coefficients"]
        bounds = details["vector_bounds"]
        assert bounds["measured"] <= min(bounds["a_posteriori"]["value"], bounds["a_priori"]["value"])
        layer = details["layer_bounds"]
        assert layer["a_posteriori"]["value"] <= layer["a_priori"]["value"]
        assert layer["a_posteriori"]["vacuous"] is False
        beside = details["nearest_at_equal_bits"]
        assert beside["bits_per_weight"] <= entry.bits_per_weight
        assert beside["relative_error"] < entry.relative_loss
    assert any("plain rounding to nearest" in warning for warning in report.warnings)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_what_cannot_be_quantized():
    with pytest.raises(fq.DiscoveryError, match="holds no linears"):
        fq.quantize_(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), config=fq.preset("sigma-delta"))
    with pytest.raises(fq.DiscoveryError, match="holds no linears"):
        fq.quantize_(nn.Linear(3, 3), config=fq.preset("sigma-delta"))
    model = make()
    model[1].bias.data[3] = math.nan
    with pytest.raises(fq.NumericalError, match=r"1: its bias contains NaN"):
        fq.quantize_(model, config=fq.preset("sigma-delta"))
    model = make()
    with pytest.raises(fq.FrameError, match=r"1: N = d = 12 is impossible for even d.*N = 13"):
        fq.quantize_(model, config=fq.preset("sigma-delta", frame_size_ratio=1))
    assert not quantized_linears(model)  # refused before anything was touched


@pytest.mark.parametrize("key", ["packed_bias", "bias_scale", "scales"])
def test_a_missing_tensor_is_named(key, tmp_path):
    model = make()
    fq.quantize_(model, config=fq.preset("sigma-delta"))
    fq.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
    del tensors[f"1.{key}"]
    save_file(tensors, tmp_path / "out" / WEIGHTS_NAME)
    with pytest.raises(fq.CheckpointError, match=rf"1\.{key} is missing"):
        fq.load(tmp_path / "out", model=make())


def test_a_skeleton_without_the_bias_is_refused(tmp_path):
    model = make()
    fq.quantize_(model, config=fq.preset("sigma-delta"))
    fq.save_pretrained(model, tmp_path / "out")
    skeleton = make()
    skeleton[1] = nn.Linear(12, 20, bias=False)
    with pytest.raises(fq.CheckpointError, match="has a bias"):
        fq.load(tmp_path / "out", model=skeleton)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 3}, "nearest is 4"),
        ({"order": 2}, "order 2 is unstable with 2 levels"),
        ({"frame_size_ratio": 0.5}, "fewer vectors than dimensions.*2 or more"),
        ({"bits": 4}, "use levels = 16"),
        ({"frame": "fusion"}, "need each other"),
        ({"code": "scalar"}, "need each other"),
        ({"step": "best"}, "expected a positive number or a name"),
        ({"vectors": "row"}, "Did you mean 'rows'"),
        ({"flip_passes": -1}, "flip_passes"),
        ({"quantize_bias": 1}, "expected true or false"),
        ({"overrides": {"head": {"code": "scalar", "frame": "identity"}}}, "one run cannot do both"),
    ],
)
def test_settings_that_do_not_exist(changes, message):
    with pytest.raises(fq.ConfigError, match=message):
        fq.preset("sigma-delta", **changes)
