"""Tiny random instances of the architectures that the walk must find by structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _text(vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (6, 24), generator=torch.Generator().manual_seed(1))


def _images(size: int = 32) -> torch.Tensor:
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(2))


def _transformers(config_class: str, model_class: str, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, config_class)(**settings)
    return getattr(transformers, model_class)(config).eval()


_DECODER = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama() -> nn.Module:
    return _transformers("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2, **_DECODER)


def llama_tied() -> nn.Module:
    return _transformers("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True, **_DECODER)


def gemma2() -> nn.Module:
    return _transformers("Gemma2Config", "Gemma2ForCausalLM", num_key_value_heads=2, head_dim=12, **_DECODER)


def gpt_neox() -> nn.Module:
    return _transformers("GPTNeoXConfig", "GPTNeoXForCausalLM", **_DECODER)


def opt() -> nn.Module:
    return _transformers(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=64,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    )


def gpt2() -> nn.Module:
    return _transformers(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=64
    )


def t5() -> nn.Module:
    return _transformers(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=64,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
    )


def bert() -> nn.Module:
    return _transformers("BertConfig", "BertModel", **_DECODER)


def hf_vit() -> nn.Module:
    return _transformers(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10
    ).eval()


def timm_deit() -> nn.Module:
    import timm

    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=10,
    ).eval()


def timm_swin() -> nn.Module:
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=7,
        num_classes=10,
    ).eval()


def own_model() -> nn.Module:
    return OwnModel()


class OwnModel(nn.Module):
    """A residual network of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(20, 36)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 36), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(36, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


#: name: (model, calibration data, linears per block, linears per block that write to a residual stream)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], int, int]] = {
    "llama": (llama, _text, 7, 2),
    "llama_tied": (llama_tied, _text, 7, 2),
    "gemma2": (gemma2, _text, 7, 0),
    "gpt_neox": (gpt_neox, _text, 4, 2),
    "opt": (opt, _text, 6, 2),
    "gpt2": (gpt2, _text, 4, 2),
    "bert": (bert, _text, 6, 2),
    "hf_vit": (hf_vit, _images, 6, 2),
    "timm_vit": (timm_vit, _images, 4, 2),
    "timm_deit": (timm_deit, _images, 4, 2),
    "timm_swin": (timm_swin, lambda: _images(56), 4, 1),
    "own": (own_model, lambda: torch.randn(40, 20, generator=torch.Generator().manual_seed(3)), 1, 0),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with fixed random weights, and calibration data for it."""
    build, data, _, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return build(), data()


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits, or the hidden states of a headless model."""
    with torch.no_grad():
        result = model(inputs)
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state
