import random

import pytest
import torch

from framequant.errors import CalibrationError
from framequant.evaluation import renderings
from framequant.evaluation.text import calibration_windows
from tests.conftest import make_text, make_tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("well-known", "well @-@ known"),
        ("1,200.5 km", "1 @,@ 200 @.@ 5 km"),
        ("It's here, isn't it?", "It 's here , is n't it ?"),
        ('He said "no" (twice).', 'He said " no " ( twice ) .'),
    ],
)
def test_punctuation_stands_apart(text, expected):
    found = renderings.word_tokenized(text)
    assert found.split() == expected.split()


def test_words_stay_what_they_were():
    text = make_text(500)
    assert renderings.word_tokenized(text) == text


def test_a_share_of_the_windows_is_written_anew():
    tokenizer = make_tokenizer()
    windows = calibration_windows(tokenizer, make_text(4000), 8, 50)
    mixed = renderings.mixed(tokenizer, windows, 0.5)
    assert mixed.shape == windows.shape
    assert torch.equal(mixed[4:], windows[4:])
    assert renderings.mixed(tokenizer, windows, 0.0) is windows


def test_a_share_out_of_range_is_refused():
    with pytest.raises(CalibrationError, match="from 0 to 1"):
        renderings.mixed(make_tokenizer(), torch.zeros(2, 4, dtype=torch.long), 1.5)


def test_names_change_everywhere_alike():
    text = "Soon Anna met Bert, and Anna saw that Bert and the Anna of old were one."
    found = renderings.renamed(text, random.Random(0))
    words, before = found.replace(",", "").split(), text.replace(",", "").split()
    made = {old: new for old, new in zip(before, words, strict=True) if old != new}
    assert set(made) == {"Anna", "Bert"}
    assert [made.get(word, word) for word in before] == words
    assert len(set(made.values())) == 2
    assert renderings.renamed("no names here", random.Random(0)) == "no names here"
