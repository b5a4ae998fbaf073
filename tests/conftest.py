"""Fixtures that tests of several folders use: shared data, tiny tokenizers, models, texts and images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    *(
        "the",
        "a",
        "of",
        "in",
        "and",
        "to",
        "frame",
        "model",
        "tiger",
        "lake",
        "walks",
        "reads",
        "writes",
        "finds",
    ),
    *("small", "large", "old", "new", "red", "blue"),
)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the shared folder, or skip naming it; with FRAMEQUANT_REQUIRE_SHARED=1, fail."""

    def find(path: str) -> Path:
        root = Path(os.environ.get("FRAMEQUANT_SHARED", ROOT.parent / "shared"))
        if (root / path).exists():
            return root / path
        message = f"{root / path} is missing (set FRAMEQUANT_SHARED to the folder of shared models and data)"
        if os.environ.get("FRAMEQUANT_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)

    return find


def make_text(words: int, seed: int = 0) -> str:
    """Random words, one token each for ``make_tokenizer``."""
    import random

    return " ".join(random.Random(seed).choices(WORDS, k=words))


def make_tokenizer():
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, **{word: index + 2 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def make_llama(seed: int = 0, layers: int = 2):
    """A Llama of two small blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_image(path: Path, size: tuple[int, int] = (40, 40), seed: int = 0) -> None:
    """Write an image of random pixels."""
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of whole words."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama with its tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2000 words."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(make_text(2000))
    return file


@pytest.fixture(scope="session")
def vit_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float timm vision transformer with four classes, in timm's local-directory form."""
    import json

    timm = pytest.importorskip("timm")
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
    folder = tmp_path_factory.mktemp("vit") / "tiny-vit"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "crop_pct": 0.8,
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 4,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four classes, in folders by class."""
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("images") / "val"
    for index in range(12):
        make_image(folder / f"class{index % 4}" / f"{index}.png", seed=index)
    return folder
