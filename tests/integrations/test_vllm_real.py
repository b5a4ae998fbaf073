"""The plugin in vLLM's own classes: loader and fused linears, one rank and two, on the CPU (``make test-vllm``)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import framequant as fq
from framequant.checkpoint import read_json
from framequant.model.walk import quantized_linears
from tests.conftest import ROOT
from tests.model.architectures import make

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
)
SHAPE = {"hidden": 48, "intermediate": 80, "heads": 4, "kv_heads": 2, "head_dim": 12}


@pytest.fixture(
    scope="module", params=[{}, {"code": "trellis", "state_bits": 8, "bits": 2.25}], ids=["scalar", "trellis"]
)
def saved(request, tmp_path_factory):
    model, data = make("llama")
    fq.quantize_(model, data, fq.preset("framequant-scalar", **request.param))
    for layer in quantized_linears(model).values():
        layer.backend = "reference"  # what the plugin computes with
    return model, fq.save_pretrained(model, tmp_path_factory.mktemp("vllm") / "out")


def run_ranks(folder: Path, inputs, ranks: int, dtype, tmp_path: Path):
    job = tmp_path / "job.pt"
    torch.save(
        {
            "ranks": ranks,
            "rendezvous": str(tmp_path / "rendezvous"),
            "weights": str(folder / "model.safetensors"),
            "quantization_config": read_json(folder / "config.json")["quantization_config"],
            "shape": SHAPE,
            "dtype": dtype,
            "inputs": inputs,
        },
        job,
    )
    environment = {**os.environ, "VLLM_PLUGINS": "framequant", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.integrations.vllm_worker", str(job)]
    logs = [(tmp_path / f"log{rank}").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    assert not any(codes), "\n".join((tmp_path / f"log{rank}").read_text()[-3000:] for rank in range(ranks))
    return [torch.load(f"{job}.{rank}", weights_only=False) for rank in range(ranks)]


def expected(model, inputs):
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    x, middle, wide = inputs
    with torch.inference_mode():
        return {
            "q": attention.q_proj(x),
            "k": attention.k_proj(x),
            "v": attention.v_proj(x),
            "o": attention.o_proj(middle),
            "gate": mlp.gate_proj(x),
            "up": mlp.up_proj(x),
            "down": mlp.down_proj(wide),
        }


def joined(results):
    """The whole outputs from those of every rank: slices side by side; sums are whole on every rank."""
    ranks = len(results)
    sizes = {
        "qkv": {
            name: SHAPE[heads] // ranks * SHAPE["head_dim"]
            for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        },
        "gate_up": dict.fromkeys(("gate", "up"), SHAPE["intermediate"] // ranks),
    }
    found = {name: results[-1]["outputs"][name] for name in ("o", "down")}
    for fused, parts in sizes.items():
        slices = [result["outputs"][fused].split(list(parts.values()), dim=-1) for result in results]
        for index, name in enumerate(parts):
            found[name] = torch.cat([rank[index] for rank in slices], dim=-1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllms_own_layers_compute_what_ours_do(saved, ranks, tmp_path):
    model, folder = saved
    dtype = torch.float64
    torch.manual_seed(0)
    inputs = [torch.randn(5, size, dtype=dtype) for size in (48, 48, 80)]
    results = run_ranks(folder, inputs, ranks, dtype, tmp_path)
    assert set(results[0]["methods"].values()) == {"FrameQuantLinearMethod"}
    assert not any(result["parameters"] for result in results), "nothing but packed codes stays"
    found = joined(results)
    for name, value in expected(model, inputs).items():
        if ranks == 1:
            assert torch.equal(found[name], value), name
        else:
            assert (found[name] - value).abs().max() <= 1e-12 * value.abs().max(), name
    if ranks == 2:
        whole = {name: layer.num_bytes() for name, layer in quantized_linears(model).items()}
        held = [sum(result["held"].values()) for result in results]
        block = sum(size for name, size in whole.items() if name.startswith("model.layers.0."))
        assert max(held) <= 0.65 * block, (
            "each rank holds about half of the codes; matrices have 2 to 5 tiles"
        )
        assert sum(held) <= 1.05 * block, "little is held twice"
