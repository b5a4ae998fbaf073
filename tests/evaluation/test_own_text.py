"""Calibration windows that a model writes itself."""

from types import SimpleNamespace

import pytest
import torch

from framequant.errors import CalibrationError
from framequant.evaluation import own_text
from framequant.evaluation.own_text import own_windows
from tests.conftest import make_llama, make_tokenizer
from tests.model.architectures import make


def test_windows_follow_the_seed_and_leave_the_random_state_alone():
    model, tokenizer = make_llama(), make_tokenizer()
    state = torch.get_rng_state()
    windows = own_windows(model, tokenizer, 5, 24, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert windows.shape == (5, 24)
    assert int(windows.min()) >= 0
    assert int(windows.max()) < model.config.vocab_size
    assert torch.equal(windows, own_windows(model, tokenizer, 5, 24, seed=3))
    assert not torch.equal(windows, own_windows(model, tokenizer, 5, 24, seed=4))


def test_long_windows_are_several_texts(monkeypatch):
    monkeypatch.setattr(own_text, "PIECE", 10)
    seen = []
    sample = own_text._sample
    monkeypatch.setattr(own_text, "_sample", lambda *a: seen.append(tuple(a[1].shape)) or sample(*a))
    assert own_windows(make_llama(), make_tokenizer(), 2, 24).shape == (2, 24)
    assert seen == [(5, 1)]


def test_the_model_says_what_the_windows_hold():
    model, tokenizer = make_llama(), make_tokenizer()
    with torch.no_grad():  # a model that repeats itself: the next token is the last one
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.nn.functional.normalize(embedding, dim=1) * 30)
        model.lm_head.weight.copy_(embedding)
    windows = own_windows(model, tokenizer, 4, 12)
    assert torch.equal(windows, windows[:, :1].expand_as(windows))


def test_pieces_go_on_from_words_of_a_text(monkeypatch):
    monkeypatch.setattr(own_text, "PIECE", 20)
    model, tokenizer = make_llama(), make_tokenizer()
    text = torch.arange(model.config.vocab_size)  # ascending, so a beginning is known when it is seen
    windows = own_windows(model, tokenizer, 3, 40, text=text)
    pieces = windows.view(-1, 20)
    assert torch.equal(pieces[:, 1:16], pieces[:, :15] + 1)
    assert len(pieces[:, 0].unique()) > 1
    assert not torch.equal(pieces[:, 16:], pieces[:, 12:16] + 4)
    assert torch.equal(windows, own_windows(model, tokenizer, 3, 40, text=text))
    assert own_windows(model, tokenizer, 3, 10, text=text).shape == (3, 10)
    with pytest.raises(CalibrationError, match="continued 0"):
        own_windows(model, tokenizer, 1, 40, text=text[:15])


def test_short_memory_halves_the_batch(monkeypatch):
    model, tokenizer = make_llama(), make_tokenizer()
    generate = model.generate

    def limited(tokens, **settings):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return generate(tokens, **settings)

    monkeypatch.setattr(model, "generate", limited)
    assert own_windows(model, tokenizer, 5, 8).shape == (5, 8)


def test_an_encoder_cannot():
    model, _ = make("bert")
    with pytest.raises(CalibrationError, match="give --generated 0"):
        own_windows(model, make_tokenizer(), 1, 8)


class OnGpu:
    """What ``_writer`` asks of a model, on a device that this machine need not have."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def parameters(self):
        return iter([SimpleNamespace(device=torch.device("cuda"), dtype=self.dtype)])

    def to(self, dtype: torch.dtype) -> "OnGpu":
        self.dtype = dtype
        return self


def test_a_float32_model_on_a_gpu_writes_in_bfloat16_and_stays_what_it_is():
    model, half, on_cpu = OnGpu(torch.float32), OnGpu(torch.float16), make_llama()
    assert own_text._writer(model).dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert own_text._writer(half) is half
    assert own_text._writer(on_cpu) is on_cpu
