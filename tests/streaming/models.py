"""Tiny float models on disk, and comparisons of checkpoints, for the tests of streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import framequant as fq
from tests.conftest import make_llama
from tests.model.architectures import make_family

IDS = torch.randint(0, 20, (8, 32), generator=torch.Generator().manual_seed(0))


def save_llama(folder: Path, layers: int = 3, tied: bool = True, seed: int = 0) -> Path:
    model = make_llama(seed, layers)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=24, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_mixture(folder: Path, name: str = "mixtral", layers: int = 2, **settings: Any) -> Path:
    """A tiny mixture of experts of ``FAMILIES``, with other settings if given."""
    model, _ = make_family(name)
    if settings or layers != 2:
        torch.manual_seed(0)
        model = type(model)(
            type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers, **settings})
        )
    model.save_pretrained(folder)
    return folder


def in_memory(source: Path, out: Path, data, config, dtype=torch.float32, kind=AutoModelForCausalLM):
    model = kind.from_pretrained(source, dtype=dtype).eval()
    fq.quantize_(model, data, config)
    fq.save_pretrained(model, out, source=str(source))
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found


def same_tensors(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    different = [
        key
        for key in first
        if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])
    ]
    assert not different


def files(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "framequant_report.json"}
