"""One number for the bit budget: met in bytes on disk, overrides kept, never predicted worse than one rate."""

import json

import pytest
import torch

import framequant as fq
from framequant.model import allocation
from framequant.model.walk import quantized_linears
from tests.model.architectures import output


def wide() -> tuple[torch.nn.Module, torch.Tensor]:
    """A decoder whose linears are large enough for a tile's padding and an entry's bytes to matter little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=96, intermediate_size=192, **settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    return model, torch.randint(0, 64, (8, 48), generator=torch.Generator().manual_seed(1))


SETTINGS = {"code": "trellis", "redundancy": 1.0, "state_bits": 8, "allocation": "sensitivity"}


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.1, 2.37, 3.0, 6.0])
def test_the_budget_is_met_in_bytes_on_disk(bits, tmp_path):
    model, data = wide()
    report = fq.quantize_(model, data, fq.FrameQuantConfig(bits=bits, output_feedback=True, **SETTINGS))
    assert bits * 0.995 <= report.bits_per_weight <= bits
    path = fq.save_pretrained(model, tmp_path / "out")
    stored = json.loads((path / "framequant_report.json").read_text())
    assert len(stored["allocation"]["choices"]) == len(report.linears)
    assert stored["allocation"]["predicted_loss"] <= stored["allocation"]["uniform_loss"]
    assert torch.equal(output(fq.load(path), data), output(model, data))


def test_more_bits_are_closer_to_the_float_model():
    errors = []
    for bits in (1.6, 2.2, 3.0, 4.0):
        model, data = wide()
        before = output(model, data)
        fq.quantize_(model, data, fq.FrameQuantConfig(bits=bits, token_weights=0.5, **SETTINGS))
        errors.append(float((output(model, data) - before).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_overrides_win_and_the_others_make_up_for_them():
    model, data = wide()
    config = fq.FrameQuantConfig(bits=2.5, overrides={"down_proj": {"bits": 4}}, **SETTINGS)
    report = fq.quantize_(model, data, config)
    rates = {name: layer.spec.code.rate for name, layer in quantized_linears(model).items()}
    assert {rate for name, rate in rates.items() if "down_proj" in name} == {4.0}
    assert 2.5 * 0.995 <= report.bits_per_weight <= 2.5


def test_a_budget_below_the_least_says_what_the_least_is():
    model, data = wide()
    config = fq.FrameQuantConfig(bits=1.5, overrides={"proj": {"bits": 3}}, **SETTINGS)
    with pytest.raises(fq.ConfigError, match=r"1\.5000 bits per weight.*3\.\d+ bits at least"):
        fq.quantize_(model, data, config)


def test_a_budget_below_the_least_is_refused_before_the_model_runs(monkeypatch):
    model, data = wide()
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran first"))
    with pytest.raises(fq.ConfigError, match=r"1\.0000 bits per weight.*1\.\d+ bits at least"):
        fq.quantize_(model, data, fq.FrameQuantConfig(bits=1.0, **SETTINGS))


def test_the_scalar_code_has_no_allocation():
    with pytest.raises(fq.ConfigError, match="trellis"):
        fq.FrameQuantConfig(allocation="sensitivity")


def test_block_rows_are_whole_tiles():
    with pytest.raises(fq.ConfigError, match="multiple of tile_rows"):
        fq.FrameQuantConfig(code="trellis", redundancy=1.0, output_block=24)


def test_a_tilt_gives_later_linears_more():
    rates = {}
    for tilt in (1.0, 16.0):
        model, data = wide()
        config = fq.FrameQuantConfig(bits=3, rate_tilt=tilt, output_feedback=True, **SETTINGS)
        fq.quantize_(model, data, config)
        found = [layer.spec.code.rate for layer in quantized_linears(model).values()]
        half = len(found) // 2
        rates[tilt] = sum(found[half:]) / (len(found) - half) - sum(found[:half]) / half
    assert rates[16.0] > rates[1.0] + 0.5
    assert allocation._tilts(3, fq.preset("framequant")) == [1, 1, 1]
    assert allocation._tilts(3, fq.preset("framequant", train_ahead=1)) == [0.5, 1, 2]


def test_the_spread_of_the_rates_is_scaled():
    rates = {}
    for spread in (0.0, 0.5, 1.0):
        model, data = wide()
        config = fq.FrameQuantConfig(bits=3, rate_spread=spread, output_feedback=True, **SETTINGS)
        report = fq.quantize_(model, data, config)
        assert 3 * 0.995 <= report.bits_per_weight <= 3
        assert report.allocation["predicted_loss"] <= report.allocation["uniform_loss"]
        rates[spread] = torch.tensor([layer.spec.code.rate for layer in quantized_linears(model).values()])
    assert rates[0.0].max() - rates[0.0].min() <= 0.25  # what is left of the budget lifts some by a step
    assert rates[1.0].std() > 0.2
    assert 0.35 < rates[0.5].std() / rates[1.0].std() < 0.65
