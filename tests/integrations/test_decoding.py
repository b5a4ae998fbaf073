"""Decoding with a static cache: the tokens of transformers' own ``generate``, and graphs only where they agree."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from framequant.errors import ConfigError
from framequant.integrations import compiled_blocks as compiled_blocks_
from framequant.integrations import decoding
from framequant.integrations.compiled_blocks import ATTENTION, compiled_blocks, repeated_blocks
from framequant.integrations.decoding import Decoder
from tests.conftest import make_llama

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_models():
    torch.manual_seed(0)
    return {
        "llama": make_llama(),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        "opt": OPTForCausalLM(
            OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        "sliding": MistralForCausalLM(
            MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=8)
        ),
    }


@pytest.fixture(scope="module")
def models():
    return {name: model.eval() for name, model in make_models().items()}


def expected(model, ids, count):
    return model.generate(
        ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "sliding"])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_those_of_generate(models, name, batch):
    model, ids = models[name], torch.randint(1, 10, (batch, 5), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, 24, batch=batch)
    for prompt in (ids, ids[:, 2:]):  # the second begins anew
        assert torch.equal(decoder.generate(prompt, 12), expected(model, prompt, 12))
    assert decoder.graph is None  # no GPU


def test_steps_take_chosen_tokens(models):
    model, ids = models["llama"], torch.tensor([[3, 7, 9, 4]])
    decoder = Decoder(model, 8)
    decoder.prompt(ids[:, :2])
    with torch.no_grad():
        for number in (2, 3):
            logits = decoder.step(ids[:, number : number + 1])
            torch.testing.assert_close(logits, model(ids[:, : number + 1]).logits[:, -1])
    found = decoder.generate(ids, 3, choose=lambda logits: torch.full((1, 1), 11))
    assert found.tolist() == [[3, 7, 9, 4, 11, 11, 11]]
    assert decoder.generate(ids, 3, choose=lambda logits: torch.full((1, 1), 11), stop=11).tolist() == [
        [3, 7, 9, 4, 11]
    ]


def test_what_does_not_fit_is_refused(models):
    decoder = Decoder(models["llama"], 8)
    with pytest.raises(ConfigError, match="larger max_length"):
        decoder.generate(torch.ones(1, 4, dtype=torch.long), 5)
    for ids in (torch.ones(1, 9), torch.ones(2, 3), torch.ones(1, 0), torch.ones(3)):
        with pytest.raises(ConfigError, match="does not fit"):
            decoder.prompt(ids.long())
    with pytest.raises(ConfigError, match="no language model"):
        Decoder(torch.nn.Linear(2, 2), 8)
    with pytest.raises(ConfigError, match="positive"):
        Decoder(models["llama"], 0)


class Replay:
    """Stands in for a CUDA graph: does what it is told."""

    def __init__(self, run):
        self.replay = run


@pytest.mark.parametrize(
    ("fault", "message"), [("", None), ("wrong", "differs from eager"), ("error", "no capture")]
)
def test_a_graph_is_kept_only_where_it_does_what_eager_steps_do(models, monkeypatch, fault, message):
    def capture(decoder):
        if fault == "error":
            raise RuntimeError("no capture")

        def replay():
            decoder._advance()
            if fault == "wrong":
                decoder.logits.neg_()

        return Replay(replay)

    monkeypatch.setattr(Decoder, "_capture", capture)
    ids = torch.tensor([[5, 6]])
    if message is None:
        decoder = Decoder(models["llama"], 12, graph=True)
    else:
        with pytest.warns(RuntimeWarning, match=message):
            decoder = Decoder(models["llama"], 12, graph=True)
    assert (decoder.graph is None) == bool(message)
    assert torch.equal(decoder.generate(ids, 8), expected(models["llama"], ids, 8))


def test_without_a_compiler_blocks_are_captured_as_they_are(models, monkeypatch):
    def capture(decoder):
        if "forward" in vars(models["llama"].model.layers[0]):
            raise RuntimeError("no compiler")
        return Replay(decoder._advance)

    monkeypatch.setattr(Decoder, "_capture", capture)
    with pytest.warns(RuntimeWarning, match=r"no compiler.*not compiled"):
        assert Decoder(models["llama"], 12, graph=True, compile_blocks=True).graph is not None


def test_where_fused_blocks_fail_they_are_compiled_as_they_are(models, monkeypatch):
    def capture(decoder):
        if decoder.model.config._attn_implementation == ATTENTION:
            raise RuntimeError("no room")
        return Replay(decoder._advance)

    monkeypatch.setattr(decoding, "can_fuse", lambda *_: True)
    monkeypatch.setattr(Decoder, "_capture", capture)
    before = models["llama"].config._attn_implementation
    with pytest.warns(
        RuntimeWarning, match=r"fused decoding step failed.*no room; blocks are compiled as they are"
    ):
        decoder = Decoder(models["llama"], 12, graph=True, compile_blocks=True)
    assert decoder.graph is not None
    assert models["llama"].config._attn_implementation == before
    ids = torch.tensor([[5, 6]])
    assert torch.equal(decoder.generate(ids, 8), expected(models["llama"], ids, 8))


@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_only_half_precision_and_whole_caches_are_fused(models, name):
    decoder = Decoder(models[name], 24)
    assert not compiled_blocks_.can_fuse(models[name], decoder.cache)  # float32, and no GPU


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sliding_window": 4}, "sliding_window"), ({"softcap": 30.0}, "softcap"), ({}, "mask")],
)
def test_our_attention_refuses_what_it_does_not_know(options, message):
    state = compiled_blocks_.Waiting(torch.ones(1, 1, 1, 32), torch.ones(1, 1, 4, 32), torch.tensor(0))
    mask = None if options else torch.ones(1, 1, 1, 4)
    with pytest.raises(ConfigError, match=message):
        compiled_blocks_.attend(torch.nn.Module(), torch.ones(1, 1, 1, 32), state, state, mask, **options)


def test_blocks_are_compiled_once_for_all(models):
    model = models["llama"]
    decoder = Decoder(model, 16)
    blocks = repeated_blocks(model, len(decoder.cache.layers))
    assert len(blocks) == len(model.model.layers) > 1
    before = decoder._first_logits()
    counter = CompileCounterWithBackend("eager")
    with compiled_blocks(model, decoder.cache, backend=counter), torch.no_grad():
        torch.testing.assert_close(decoder._first_logits(), before)
    assert counter.frame_count == 1
    assert all("forward" not in vars(block) for block in blocks)
    assert repeated_blocks(model, 77) == []
