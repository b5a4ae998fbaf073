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


def _decoder(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    merged = {**_DECODER, **settings}
    return lambda: _transformers(f"{kind}Config", f"{kind}ForCausalLM", **merged)


_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _vision(kind: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    merged = {**_VISION, **settings}
    return lambda: _transformers(f"{kind}Config", model, **merged)


def hf_swin() -> nn.Module:
    return _transformers(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=56,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=7,
    )


def two_towers(kind: str) -> nn.Module:
    text = {**_DECODER, "projection_dim": 32, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    return _transformers(
        f"{kind}Config",
        f"{kind}Model",
        text_config=text,
        vision_config=_VISION,
        **({"projection_dim": 32} if kind == "CLIP" else {}),
    )


def whisper_config(config_class: Any) -> Any:
    return config_class(
        vocab_size=64,
        num_mel_bins=16,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def whisper_whole() -> nn.Module:
    import transformers

    return transformers.WhisperForConditionalGeneration(whisper_config(transformers.WhisperConfig)).eval()


def _speech() -> dict[str, torch.Tensor]:
    features = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "decoder_input_ids": _text()[:4]}


def _pairs() -> dict[str, torch.Tensor]:
    return {"input_ids": _text().clamp(min=3), "pixel_values": _images()[:6]}


def _translation() -> dict[str, torch.Tensor]:
    return {"input_ids": _text(), "decoder_input_ids": _text().flip(1)}


def gemma3() -> nn.Module:
    return _transformers(
        "Gemma3TextConfig", "Gemma3ForCausalLM", num_key_value_heads=2, head_dim=12, **_DECODER
    )


_EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def llama4() -> nn.Module:
    experts = {"num_local_experts": 4, "head_dim": 12, "intermediate_size_mlp": 80, "num_key_value_heads": 2}
    return _transformers("Llama4TextConfig", "Llama4ForCausalLM", **_DECODER, **experts)


#: Further families of transformers: name: (model, calibration data, share of the blocks' weights that is quantized).
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], float]] = {
    "mistral": (_decoder("Mistral", num_key_value_heads=2, sliding_window=8), _text, 1.0),
    "qwen2": (_decoder("Qwen2", num_key_value_heads=2), _text, 1.0),
    "qwen3": (_decoder("Qwen3", num_key_value_heads=2, head_dim=12), _text, 1.0),
    "gemma3": (gemma3, _text, 1.0),
    "phi": (_decoder("Phi"), _text, 1.0),
    "phi3": (_decoder("Phi3", pad_token_id=0), _text, 1.0),
    "mixtral": (_decoder("Mixtral", num_key_value_heads=2, num_local_experts=4), _text, 1.0),
    "qwen2_moe": (
        _decoder("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=40, **_EXPERTS),
        _text,
        0.998,
    ),
    "qwen3_moe": (_decoder("Qwen3Moe", num_experts=4, head_dim=12, **_EXPERTS), _text, 1.0),
    "deepseek_v3": (_decoder("DeepseekV3", n_routed_experts=4, **_LATENT), _text, 1.0),
    "gpt_oss": (_decoder("GptOss", num_local_experts=4, head_dim=12, **_EXPERTS), _text, 1.0),
    "granite_moe": (_decoder("GraniteMoe", num_local_experts=4, **_EXPERTS), _text, 1.0),
    "jetmoe": (_decoder("JetMoe", num_local_experts=4, num_key_value_heads=2, kv_channels=12), _text, 1.0),
    "llama4": (llama4, _text, 1.0),
    "deit": (_vision("DeiT", "DeiTForImageClassification"), _images, 1.0),
    "swin": (hf_swin, lambda: _images(56), 1.0),
    "dinov2": (_vision("Dinov2", "Dinov2ForImageClassification", mlp_ratio=2), _images, 1.0),
    "clip": (lambda: two_towers("CLIP"), _pairs, 1.0),
    "siglip": (lambda: two_towers("Siglip"), _pairs, 1.0),
    "whisper": (whisper_whole, _speech, 1.0),
    "t5": (t5, _translation, 1.0),
}


def make_family(name: str) -> tuple[nn.Module, Any]:
    """A model of ``FAMILIES`` with fixed random weights, and calibration data for it."""
    build, data, _ = FAMILIES[name]
    torch.manual_seed(0)
    return build(), data()


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with fixed random weights, and calibration data for it."""
    build, data, _, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return build(), data()


def output(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Logits, or the hidden states of a headless model."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(result, torch.Tensor):
        return result
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in result:
            return result[name]
    raise KeyError(f"no output known among {list(result)}")
