"""One rank of vLLM's own linear layers on the CPU: ``python -m tests.integrations.vllm_worker JOB.pt RANK``.

Run by ``test_vllm_real.py`` in processes of their own, since vLLM's imports warn and its groups are global. Loads the
first block of a checkpoint as vLLM loads a model and saves what its four linear layers make of given inputs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


def make_block(config: Any, shape: dict[str, int]) -> nn.Module:
    """The linear layers of a Llama block under their names in vLLM's model."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    prefix, hidden, wide = "model.layers.0", shape["hidden"], shape["intermediate"]
    block = nn.ModuleDict({"self_attn": nn.Module(), "mlp": nn.Module()})
    common = {"bias": False, "quant_config": config}
    block["self_attn"].qkv_proj = QKVParallelLinear(
        hidden,
        shape["head_dim"],
        shape["heads"],
        shape["kv_heads"],
        prefix=f"{prefix}.self_attn.qkv_proj",
        **common,
    )
    block["self_attn"].o_proj = RowParallelLinear(
        hidden, hidden, prefix=f"{prefix}.self_attn.o_proj", **common
    )
    block["mlp"].gate_up_proj = MergedColumnParallelLinear(
        hidden, [wide, wide], prefix=f"{prefix}.mlp.gate_up_proj", **common
    )
    block["mlp"].down_proj = RowParallelLinear(wide, hidden, prefix=f"{prefix}.mlp.down_proj", **common)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([block])
    return model


def own_slice(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What a rank has of an input that is divided by features."""
    return x.chunk(ranks, dim=-1)[rank]


def run(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Load, compute, and tell how many bytes of codes the rank holds."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # the wheel is CUDA's and finds no device here
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
    from vllm.model_executor.models.utils import AutoWeightsLoader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    ranks = job["ranks"]
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        init_distributed_environment(ranks, rank, f"file://{job['rendezvous']}", rank, "gloo")
        initialize_model_parallel(ranks, backend="gloo")
        config = get_quantization_config("framequant").from_config(job["quantization_config"])
        config.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
        torch.set_default_dtype(job["dtype"])
        model = make_block(config, job["shape"])
        tensors = {
            name: tensor
            for name, tensor in load_file(job["weights"]).items()
            if name.startswith("model.layers.0.") and "norm" not in name
        }
        AutoWeightsLoader(model).load_weights(tensors.items(), mapper=LlamaModel.hf_to_vllm_mapper)
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "quant_method")}
        for layer in layers.values():
            layer.quant_method.process_weights_after_loading(layer)
        x, middle, wide = job["inputs"]
        block = model.model.layers[0]
        outputs = {
            "qkv": block["self_attn"].qkv_proj(x)[0],
            "o": block["self_attn"].o_proj(own_slice(middle, rank, ranks))[0],
            "gate_up": block["mlp"].gate_up_proj(x)[0],
            "down": block["mlp"].down_proj(own_slice(wide, rank, ranks))[0],
        }
        held = {
            name: sum(b.numel() * b.element_size() for b in layer.buffers()) for name, layer in layers.items()
        }
        methods = {name: type(layer.quant_method).__name__ for name, layer in layers.items()}
        parameters = [name for name, _ in model.named_parameters()]
    return {"outputs": outputs, "held": held, "methods": methods, "parameters": parameters}


if __name__ == "__main__":
    job_file, rank = sys.argv[1], int(sys.argv[2])
    job = torch.load(job_file, weights_only=False)
    with torch.inference_mode():
        result = run(job, rank)
    torch.save(result, f"{job_file}.{rank}")
