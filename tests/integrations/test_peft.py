"""LoRA on quantized linears: gradients, training, saving, and the refusal to merge."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import framequant as fq
from tests.model.architectures import make, output
from tests.test_layers import make_layer

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'framequant[peft]'")
# PEFT 0.21 reads a name of transformers 5.23 that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, data = make("llama")
    fq.quantize_(model, data, fq.preset("framequant-scalar"))
    return fq.save_pretrained(model, tmp_path_factory.mktemp("peft") / "out"), data


def adapted(directory):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(fq.load(directory), config)


def train(model, ids, steps, rate=0.02):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", [{}, {"two_sided": True}, {"code": "trellis", "state_bits": 8}])
def test_gradients_through_the_frozen_linear_are_finite_differences(settings):
    layer = make_layer(8, 12, **settings).double()
    adapter = peft.LoraConfig(r=2)._custom_modules[fq.FrameLinear]
    wrapped = adapter(layer, "default", config=peft.LoraConfig(r=2)).double()
    torch.nn.init.normal_(wrapped.lora_B["default"].weight, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    factors = [wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight]
    assert all(factor.requires_grad for factor in factors)
    assert torch.autograd.gradcheck(lambda *_: wrapped(inputs), (inputs, *factors))


def test_lora_trains_saves_and_reloads(checkpoint, tmp_path):
    directory, data = checkpoint
    model = adapted(directory)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 2 * 3
    assert all("lora_" in name for name in names)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert torch.equal(output(model, data), output(fq.load(directory), data)), (
        "an untrained adapter adds nothing"
    )
    losses = train(model, data, 30, rate=0.05)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    again = peft.PeftModel.from_pretrained(fq.load(directory), tmp_path / "adapter")
    assert torch.equal(output(again, data), output(model, data))
    with model.disable_adapter():
        assert torch.equal(output(model, data), output(fq.load(directory), data))


def test_merging_is_refused_with_an_explanation(checkpoint):
    model = adapted(checkpoint[0])
    with pytest.raises(fq.ConfigError, match=r"cannot be merged.*Keep the adapter beside"):
        model.merge_and_unload()
    with pytest.raises(fq.ConfigError, match="use_dora is not supported"):
        peft.get_peft_model(
            fq.load(checkpoint[0]), peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
        )


def test_peft_knows_us_when_it_was_imported_first():
    code = "import peft, framequant; print(bool(peft.LoraConfig()._custom_modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("True")


@pytest.mark.slow
def test_lora_trains_on_smollm2(tmp_path):
    from framequant.evaluation.text import calibration_windows, king_james
    from framequant.integrations.sources import open_model

    opened = open_model("smollm2")
    data = calibration_windows(opened.tokenizer, king_james("old"), samples=4, sequence_length=128)
    fq.quantize_(opened.model, data, fq.preset("framequant-scalar"))
    directory = fq.save_pretrained(opened.model, tmp_path / "out")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(fq.load(directory), config)
    losses = train(model, data[:2], 8, rate=2e-3)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fq.load(directory), tmp_path / "adapter")
    assert torch.equal(output(again, data[:1]), output(model, data[:1]))
