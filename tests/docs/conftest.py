"""A folder with tiny stand-ins of everything that the pages name."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from framequant.integrations import hub, packages
from tests.conftest import WORDS, make_image, make_text, make_tokenizer


@dataclass(frozen=True)
class StandIn:
    """In the place of a packaged model."""

    path: Path

    def locate(self) -> Path:
        """Where it lies."""
        return self.path


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Float models: a Llama, a BERT, and a timm vision transformer; and the data that pages call by name."""
    timm = pytest.importorskip("timm")
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("stand-ins")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(WORDS) + 2, "max_position_embeddings": 64, "pad_token_id": 1}
    llama = LlamaConfig(
        **sizes, num_key_value_heads=2, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True
    )
    for name, model in (("smollm2", LlamaForCausalLM(llama)), ("minilm", BertModel(BertConfig(**sizes)))):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 2,
        "embed_dim": 64,
        "num_heads": 2,
        "num_classes": 4,
    }
    vit = timm.create_model("vit_tiny_patch16_224", **arguments)
    data = root / "data"
    for folder in ("train", "val"):
        for index in range(8):
            make_image(data / folder / "abcd"[index % 4] / f"{index}.png", seed=index)
    (data / "wiki.txt").write_text(make_text(9000))
    (data / "test.txt").write_text(make_text(1500, seed=1))
    for file in ("stsb-dev.csv", "stsb-test.csv"):
        generator = random.Random(file)
        with (data / file).open("w", newline="") as stream:
            rows = [
                (make_text(6, seed=i), make_text(5, seed=99 + i), generator.uniform(0, 5)) for i in range(24)
            ]
            csv.writer(stream).writerows(rows)
    return root, vit, arguments


@pytest.fixture
def workspace(stand_ins, tmp_path, monkeypatch):
    """The current folder of a page: data lie in it, and names mean the stand-ins."""
    import timm

    root, vit, arguments = stand_ins
    for entry in (root / "data").iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    models = {name: StandIn(root / name) for name in ("smollm2", "minilm")}
    monkeypatch.setattr(packages, "PACKAGED_MODELS", models)
    monkeypatch.setattr("framequant.integrations.sources.PACKAGED_MODELS", models)
    monkeypatch.setattr("framequant.evaluation.text.king_james", lambda part: make_text(9000))
    monkeypatch.setattr("framequant.integrations.sources._timm_labels", lambda model: list("abcd"))
    monkeypatch.setattr("framequant.cli.inputs.DEFAULT_SAMPLES", 8)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        """The stand-in, with fresh weights, in the place of a pretrained model."""
        if not pretrained:
            return create(name, **options)
        model = create("vit_tiny_patch16_224", **arguments)
        model.load_state_dict(vit.state_dict())
        model.pretrained_cfg.update(input_size=(3, 32, 32), crop_pct=1.0)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path
