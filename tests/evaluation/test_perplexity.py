import math

import pytest
import torch
from torch import nn

from framequant.errors import CalibrationError, NumericalError
from framequant.evaluation import forward
from framequant.evaluation.generate import generate
from framequant.evaluation.kl import kl_divergence
from framequant.evaluation.perplexity import perplexity
from tests.conftest import make_llama


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 22, (7, 24), generator=torch.Generator().manual_seed(0))


def direct_losses(model, windows):
    with torch.no_grad():
        log_probabilities = model(windows).logits.double().log_softmax(-1)[:, :-1]
    return -log_probabilities.gather(-1, windows[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_matches_a_direct_computation(model, windows, batch_size, monkeypatch):
    monkeypatch.setitem(forward.ROWS_PER_CHUNK, "cpu", 10)
    seen = []
    result = perplexity(model, windows, batch_size, lambda done, total: seen.append((done, total)))
    expected = direct_losses(model, windows).mean().item()
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.tokens, result.windows, result.sequence_length) == (7 * 23, 7, 24)
    assert seen[-1] == (7, 7)


def test_batches_keep_the_logits_small(model, windows, monkeypatch):
    monkeypatch.setitem(forward.LOGIT_BYTES, "cpu", 2 * 24 * 22 * 4)
    assert [len(batch) for batch in forward.batches(model, windows)] == [2, 2, 2, 1]
    monkeypatch.setitem(forward.LOGIT_BYTES, "cpu", 1)
    assert [len(batch) for batch in forward.batches(model, windows)] == [1] * 7


def test_nan_logits_are_an_error(windows):
    broken = make_llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        perplexity(broken, windows)


def test_a_model_without_a_head_is_refused(model, windows):
    with pytest.raises(CalibrationError, match="no head"):
        perplexity(model.model, windows)


def test_divergence_matches_a_direct_computation(model, windows):
    other = make_llama(seed=1)
    result = kl_divergence(model, other, windows)
    with torch.no_grad():
        log_p, log_q = (m(windows).logits.double().log_softmax(-1) for m in (other, model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result.kl == pytest.approx(expected.mean().item(), rel=1e-5)
    assert result.positions == windows.numel()
    assert result.agreement == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert result.standard_error == pytest.approx(
        (expected.std(unbiased=False) / windows.numel() ** 0.5).item(), rel=1e-4
    )


def test_divergence_from_itself_is_zero(model, windows):
    result = kl_divergence(model, model, windows)
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.agreement == 1


def test_divergence_of_different_vocabularies_is_refused():
    with pytest.raises(CalibrationError, match="4 and 5 classes"):
        kl_divergence(nn.Linear(3, 4), nn.Linear(3, 5), torch.zeros(2, 3))


def test_generate_is_greedy_and_repeatable(model, tokenizer):
    first = generate(model, tokenizer, "the old tiger", 6)
    assert first == generate(model, tokenizer, "the old tiger", 6)
    assert len(first.split()) <= 6
    assert generate(model, tokenizer, "the", 6, temperature=1.0, seed=1) == generate(
        model, tokenizer, "the", 6, temperature=1.0, seed=1
    )
