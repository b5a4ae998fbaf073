import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import framequant as fq
from framequant.codes.activation import ActivationSpec, fit_steps, round_activations
from framequant.errors import CalibrationError, CheckpointError, ConfigError
from framequant.frames import FrameKind, FrameSpec
from framequant.model.walk import quantized_linears
from framequant.model.without_data import quantize_without_data_
from framequant.spec import LinearSpec
from tests.model.architectures import make, output

TOKENS = torch.randn(64, 48, generator=torch.Generator().manual_seed(3))


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_a_token_is_rounded_to_within_half_a_step_of_its_largest_entry(bits, scale, seed):
    values = scale * torch.randn(5, 33, generator=torch.Generator().manual_seed(seed))
    spec = ActivationSpec(bits)
    rounded = round_activations(values, spec)
    step = values.abs().amax(-1, keepdim=True) / spec.largest
    assert ((rounded - values).abs() <= 0.5001 * step).all()
    assert max(len(row.unique()) for row in rounded) <= 2**bits - 1
    assert torch.allclose(round_activations(2 * values, spec), 2 * rounded, rtol=1e-6)


def test_zeros_stay_zeros_and_dtypes_stay():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = round_activations(torch.zeros(2, 8, dtype=dtype), ActivationSpec(4))
        assert found.dtype == dtype
        assert not found.any()


def test_a_static_step_beats_the_largest_entry_and_a_twin_beats_it_on_skewed_values():
    spec = ActivationSpec(4, "static")
    heavy = TOKENS**3
    widest = heavy.abs().max() / spec.largest

    def error(values, spec, steps):
        return float((round_activations(values, spec, steps) - values).square().mean())

    assert error(heavy, spec, fit_steps(heavy, spec)) < 0.7 * error(heavy, spec, widest.reshape(1))
    skewed = torch.nn.functional.gelu(4 * TOKENS)
    twin = ActivationSpec(4, "twin")
    steps = fit_steps(skewed, twin)
    assert steps[1] / steps[0] == 2.0 ** round(float((steps[1] / steps[0]).log2()))
    assert error(skewed, twin, steps) < error(skewed, spec, fit_steps(skewed, spec))


def test_gradients_pass_as_if_nothing_was_rounded():
    values = TOKENS.clone().requires_grad_()
    round_activations(values, ActivationSpec(4)).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


def test_steps_of_nothing_and_of_zeros_are_usable():
    for sample in (torch.zeros(3, 4), torch.empty(0, 4), torch.ones(2, 4)):
        for scaling in ("static", "twin"):
            assert (fit_steps(sample, ActivationSpec(4, scaling)) > 0).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("scaling", ["token", "static", "twin"])
@pytest.mark.parametrize("space", ["frame", "input"])
def test_the_reloaded_model_is_the_evaluated_one(bits, scaling, space, tmp_path):
    model, data = make("llama")
    plain = make("llama")[0]
    settings = {"activation_scaling": scaling, "activation_space": space, "bits": 3, "refine_sweeps": 0}
    fq.quantize_(model, data, fq.FrameQuantConfig(activation_bits=bits, **settings))
    fq.quantize_(plain, data, fq.FrameQuantConfig(**settings))
    expected = output(model, data)
    assert not torch.equal(expected, output(plain, data))
    fq.save_pretrained(model, tmp_path / "out")
    loaded = fq.load(tmp_path / "out")
    assert torch.equal(output(loaded, data), expected)
    assert torch.equal(output(loaded, data[:1, :2]), output(model, data[:1, :2]))  # few tokens: other kernels
    specs = {layer.spec.activation for layer in quantized_linears(loaded).values()}
    assert specs == {ActivationSpec(bits, scaling, space)}


def test_more_bits_bring_the_logits_nearer():
    base, data = make("llama")
    settings = {"bits": 8, "redundancy": 1.0, "refine_sweeps": 0}
    fq.quantize_(base, data, fq.FrameQuantConfig(**settings))
    reference, distances = output(base, data), []
    for bits in (4, 6, 8):
        model, _ = make("llama")
        fq.quantize_(model, data, fq.FrameQuantConfig(activation_bits=bits, **settings))
        distances.append(float((output(model, data) - reference).norm()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


def test_a_frame_spreads_outliers():
    model, data = make("opt")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            with torch.no_grad():
                module.weight[:2] *= 60
    distances = {}
    for space in ("frame", "input"):
        other = copy.deepcopy(model)
        plain = copy.deepcopy(model)
        settings = {"bits": 8, "redundancy": 1.0, "refine_sweeps": 0, "activation_space": space}
        fq.quantize_(plain, data, fq.FrameQuantConfig(**settings))
        fq.quantize_(other, data, fq.FrameQuantConfig(activation_bits=4, **settings))
        distances[space] = float((output(other, data) - output(plain, data)).norm())
    assert distances["frame"] < distances["input"]


def test_overrides_choose_activations_of_single_linears():
    model, data = make("llama")
    config = fq.FrameQuantConfig(
        activation_bits=8,
        overrides={"down_proj": {"activation_bits": None}, "q_proj": {"activation_bits": 4}},
    )
    fq.quantize_(model, data, config)
    found = {name: layer.spec.activation for name, layer in quantized_linears(model).items()}
    assert all(
        spec == (None if "down_proj" in name else ActivationSpec(4 if "q_proj" in name else 8))
        for name, spec in found.items()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_bits": 1}, "from 2 to 8"),
        ({"activation_bits": 4.0}, "an integer from 2"),
        ({"activation_bits": True}, "an integer from 2"),
        ({"activation_bits": 4, "activation_scaling": "tokens"}, "Did you mean 'token'"),
        ({"activation_bits": 4, "activation_space": "fram"}, "Did you mean 'frame'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        fq.FrameQuantConfig(**changes)


def test_sigma_delta_and_missing_data_are_refused():
    with pytest.raises(ConfigError, match="leave it out for Sigma-Delta"):
        fq.preset("sigma-delta", activation_bits=8)
    model, _ = make("llama")
    with (
        pytest.raises(CalibrationError, match="use activation_scaling = 'token'"),
        pytest.warns(match="without calib"),
    ):
        quantize_without_data_(model, fq.FrameQuantConfig(activation_bits=8, activation_scaling="static"))


def test_a_damaged_scheme_is_refused():
    frame = FrameSpec(FrameKind.IDENTITY, 8)
    spec = LinearSpec(8, 8, frame, frame, fq.FrameQuantConfig().code_spec(), ActivationSpec(4))
    data = spec.to_dict()
    assert LinearSpec.from_dict(data) == spec
    assert "activation" not in LinearSpec(8, 8, frame, frame, spec.code).to_dict()
    for bad in ({"bits": 4}, {"bits": 99, "scaling": "token", "space": "frame"}, "x", None):
        with pytest.raises(CheckpointError):
            LinearSpec.from_dict({**data, "activation": bad})


def test_export_refuses_what_a_float_model_cannot_hold(tmp_path):
    model, data = make("llama")
    fq.quantize_(model, data, fq.FrameQuantConfig(activation_bits=8, redundancy=1.0))
    fq.save_pretrained(model, tmp_path / "out")
    assert "frame coefficients in 8 bits, step per token" in model.framequant_report.linears[0].code
    with pytest.raises(fq.ModelSourceError, match="without activation_bits"):
        fq.export(tmp_path / "out", tmp_path / "float")
