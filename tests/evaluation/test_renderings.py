import pytest
import torch

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


def test_windows_are_written_anew():
    tokenizer = make_tokenizer()
    windows = calibration_windows(tokenizer, make_text(4000), 8, 50)
    found = renderings.written(tokenizer, windows, lambda text: " ".join(reversed(text.split())), " ")
    assert torch.equal(found, windows.flip(1))
    shorter = renderings.written(tokenizer, windows, lambda text: " ".join(text.split()[::2]), " ")
    assert torch.equal(shorter, windows[:, ::2].reshape(4, 50))
