import pytest
import torch

from framequant.cli.console import Reporter
from framequant.cli.inputs import CalibrationSource, calibration_tensor
from framequant.errors import CalibrationError
from framequant.evaluation import copying, own_text
from framequant.evaluation.mix import CAUSAL, PLAIN, Mix, calibration_mix
from framequant.evaluation.text import calibration_windows
from framequant.integrations.sources import OpenedModel
from tests.conftest import make_llama, make_text, make_tokenizer
from tests.model.architectures import make

TEXT = make_text(4000)


@pytest.fixture
def marked(monkeypatch):
    """Windows that the model writes hold zeros only, repeated ones hold ones."""
    monkeypatch.setattr(
        own_text,
        "own_windows",
        lambda m, t, count, length, seed, text=None: torch.zeros(count, length, dtype=torch.long),
    )
    monkeypatch.setattr(
        copying,
        "repeated_windows",
        lambda t, count, length, seed: torch.ones(count, length, dtype=torch.long),
    )


def kinds(mix, count=40):
    """How many windows are zeros, ones, and windows of the text as it is."""
    tokenizer = make_tokenizer()
    found = calibration_mix(make_llama(), tokenizer, TEXT, count, 16, mix=mix)
    assert found.shape == (count, 16)
    plain = {tuple(w.tolist()) for w in calibration_windows(tokenizer, TEXT, len(TEXT.split()) // 16, 16)}
    zeros, ones = ((found == value).all(dim=1).sum().item() for value in (0, 1))
    return zeros, ones, sum(tuple(window.tolist()) in plain for window in found)


@pytest.mark.usefixtures("marked")
def test_every_kind_has_its_share():
    # the tiny vocabulary has no punctuation and no names: what is written anew stays the text, windows moved
    zeros, ones, text = kinds(None)
    assert (zeros, ones) == (40 * CAUSAL["generated"], 40 * CAUSAL["repeated"])
    assert text >= 40 * (1 - sum(CAUSAL.values()))
    assert kinds(PLAIN) == (0, 0, 40)
    assert kinds(Mix(generated=1.0)) == (40, 0, 0)
    assert kinds(Mix(repeated=1.0)) == (0, 40, 0)
    assert kinds(Mix(generated=0.0, repeated=0.0))[:2] == (0, 0)
    assert kinds(Mix(generated=0.5, repeated=0.5)) == (20, 20, 0)
    assert kinds(Mix(generated=0.25, continued=0.25, repeated=0.5)) == (20, 20, 0)


def test_a_given_share_shrinks_the_defaults_when_it_must():
    counts = Mix(generated=0.9).counts(make_llama(), make_tokenizer(), 1000)
    assert counts["generated"] == 900
    assert sum(counts.values()) == pytest.approx(1000, abs=3)
    assert counts["word_tokenized"] > counts["repeated"] > 0


def test_models_that_write_nothing_get_text_only():
    counts = Mix().counts(make("bert")[0], make_tokenizer(), 100)
    assert counts == {"word_tokenized": 50, "renamed": 0, "repeated": 0, "generated": 0, "continued": 0}


def test_windows_are_shuffled_and_reproducible():
    found = [
        calibration_mix(make_llama(), make_tokenizer(), TEXT, 12, 16, seed, Mix(generated=0))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_requests_that_cannot_be_met():
    opened = OpenedModel(make_llama(), "transformers", "llama", tokenizer=make_tokenizer())
    with pytest.raises(CalibrationError, match="from 0 to 1"):
        Mix(generated=1.5)
    with pytest.raises(CalibrationError, match=r"exceed 1 together: renamed 0\.6, generated 0\.6"):
        Mix(renamed=0.6, generated=0.6)
    with pytest.raises(CalibrationError, match=r"beside \d+ of other kinds"):
        calibration_tensor(
            CalibrationSource(text=make_text(40)), opened, 1000, 16, 0, Reporter(False), Mix(generated=0.5)
        )
