"""The vLLM plugin against stand-ins of vLLM's classes; ``test_vllm_real.py`` runs it in vLLM's own where installed."""

from __future__ import annotations

import sys
import tomllib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import framequant as fq
from framequant.checkpoint import parse_quantization, read_json
from framequant.integrations import vllm, vllm_layer
from framequant.model.walk import quantized_linears
from tests.conftest import ROOT
from tests.model.architectures import make


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """As vLLM's: asks the config for a method, which makes the weights; ``outputs`` are those of this rank."""

    def __init__(self, inputs, outputs, config, prefix, rank=0, ranks=1):
        super().__init__()
        self.tp_rank, self.tp_size = rank, ranks
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self,
            inputs,
            outputs,
            inputs * ranks,
            sum(outputs) * ranks,
            torch.float32,
            weight_loader=None,
        )


INTERFACE = SimpleNamespace(
    QuantizationConfig=QuantizationConfig,
    LinearMethodBase=LinearMethodBase,
    UnquantizedLinearMethod=UnquantizedLinearMethod,
    LinearBase=LinearBase,
    get_tensor_model_parallel_world_size=lambda: 2,
    tensor_model_parallel_all_gather=None,
)
#: name in the checkpoint, name in vLLM, shard: the table that every Llama-like model of vLLM has.
STACKED = [
    ("q_proj", "qkv_proj", "q"),
    ("k_proj", "qkv_proj", "k"),
    ("v_proj", "qkv_proj", "v"),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
]


def load(layers, tensors):
    """What ``load_weights`` of vLLM's Llama does with a checkpoint."""
    parameters = {f"{prefix}.{k}": p for prefix, layer in layers.items() for k, p in layer.named_parameters()}
    for name, tensor in tensors.items():
        for part, fused, shard in STACKED:
            if f".{part}." in name and (key := name.replace(part, fused)) in parameters:
                parameters[key].weight_loader(parameters[key], tensor, shard)
                break
        else:
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture(
    scope="module", params=[{}, {"code": "trellis", "state_bits": 8, "bits": 2.25}], ids=["scalar", "trellis"]
)
def checkpoint(request, tmp_path_factory):
    model, data = make("llama")
    fq.quantize_(model, data, fq.preset("framequant-scalar", **request.param))
    for layer in quantized_linears(model).values():
        layer.backend = "reference"  # what the plugin computes with
    folder = fq.save_pretrained(model, tmp_path_factory.mktemp("vllm") / "out")
    return (
        model,
        load_file(folder / "model.safetensors"),
        read_json(folder / "config.json")["quantization_config"],
    )


def make_config(data):
    return vllm.make_classes(INTERFACE)[0].from_config(data)


def test_fused_layers_compute_what_their_parts_do(checkpoint):
    model, tensors, data = checkpoint
    config, block, prefix = make_config(data), model.model.layers[0], "model.layers.0"
    layers = {
        f"{prefix}.self_attn.qkv_proj": LinearBase(48, [48, 24, 24], config, f"{prefix}.self_attn.qkv_proj"),
        f"{prefix}.mlp.gate_up_proj": LinearBase(48, [80, 80], config, f"{prefix}.mlp.gate_up_proj"),
        f"{prefix}.mlp.down_proj": LinearBase(80, [48], config, f"{prefix}.mlp.down_proj"),
    }
    load(layers, tensors)
    x, wide = torch.randn(5, 48), torch.randn(5, 80)
    qkv, gate_up, down = layers.values()
    attention, mlp = block.self_attn, block.mlp
    expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    assert torch.equal(qkv.quant_method.apply(qkv, x), expected)
    assert torch.equal(
        gate_up.quant_method.apply(gate_up, x), torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)
    )
    bias = torch.randn(48)
    assert torch.equal(down.quant_method.apply(down, wide, bias), mlp.down_proj(wide) + bias)
    assert not list(qkv.named_parameters()), "nothing but packed codes stays"


def test_the_common_input_is_transformed_once(checkpoint, monkeypatch):
    _, tensors, data = checkpoint
    config, calls = make_config(data), []
    layer = LinearBase(48, [48, 24, 24], config, "model.layers.1.self_attn.qkv_proj")
    load({"model.layers.1.self_attn.qkv_proj": layer}, tensors)
    analysis = vllm_layer.reference.analysis
    monkeypatch.setattr(vllm_layer.reference, "analysis", lambda *a: calls.append(1) or analysis(*a))
    layer.quant_method.apply(layer, torch.randn(2, 48))
    assert len(calls) == 1


def test_what_is_not_quantized_is_left_to_vllm(checkpoint):
    config = make_config(checkpoint[2])
    assert config.get_name() == "framequant"
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    linear = LinearBase.__new__(LinearBase)
    nn.Module.__init__(linear)
    assert type(config.get_quant_method(linear, "model.layers.0.router")) is UnquantizedLinearMethod
    with pytest.raises(fq.ConfigError, match="heads and embeddings must stay in float"):
        config.get_quant_method(nn.Embedding(2, 2), "model.layers.0.mlp.down_proj")


def test_what_cannot_be_served_is_refused(checkpoint):
    data = checkpoint[2]
    config = make_config(data)
    with pytest.raises(fq.ConfigError, match="among 3 ranks of its own"):
        LinearBase(48, [16, 8, 8], config, "model.layers.0.self_attn.qkv_proj", ranks=3)
    with pytest.raises(fq.CheckpointError, match="vLLM 48"):
        LinearBase(48, [48, 24, 96], config, "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(fq.CheckpointError, match="on each of 2 ranks"):
        LinearBase(48, [16, 8, 8], config, "model.layers.0.self_attn.qkv_proj", ranks=2)
    layer = LinearBase(80, [48], config, "model.layers.0.mlp.down_proj")
    with pytest.raises(fq.CheckpointError, match=r"down_proj\.packed_codes is missing"):
        load({"model.layers.0.mlp.down_proj": layer}, {})
    layer = LinearBase(80, [48], config, "model.layers.0.mlp.down_proj")
    with pytest.raises(fq.CheckpointError, match="does not fit its scheme"):
        layer.packed_codes.weight_loader(layer.packed_codes, torch.zeros(3))
    with pytest.raises(fq.CheckpointError, match="dense weight"):
        layer.weight.weight_loader(layer.weight, torch.zeros(48, 80))
    linears = dict(parse_quantization(data).linears)
    del linears["model.layers.0.self_attn.k_proj"]
    with pytest.raises(fq.CheckpointError, match=r"k_proj are not, and vLLM fuses them"):
        vllm.part_names("model.layers.0.self_attn.qkv_proj", linears)


def test_the_entry_point_registers_the_config(monkeypatch):
    registered = {}
    names = [
        "vllm",
        "vllm.distributed",
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.model_executor.layers.linear",
        "vllm.model_executor.layers.quantization",
        "vllm.model_executor.layers.quantization.base_config",
    ]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for key in ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"):
        setattr(sys.modules[names[4]], key, getattr(INTERFACE, key))
    for key in ("get_tensor_model_parallel_world_size", "tensor_model_parallel_all_gather"):
        setattr(sys.modules[names[1]], key, getattr(INTERFACE, key))
    sys.modules[names[6]].QuantizationConfig = QuantizationConfig
    sys.modules[names[5]].QUANTIZATION_METHODS = registered
    sys.modules[names[5]].register_quantization_config = lambda name: (
        lambda cls: registered.setdefault(name, cls)
    )
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "vllm.general_plugins"
    ]
    module, _, function = entry["framequant"].partition(":")
    for _ in range(2):
        getattr(__import__(module, fromlist=[function]), function)()
    assert list(registered) == ["framequant"]
    assert issubclass(registered["framequant"], QuantizationConfig)
