import random

import torch

from framequant.evaluation.copying import PHRASES, renamed, repeated_windows
from tests.conftest import make_tokenizer


def test_names_change_everywhere_alike():
    text = "Soon Anna met Bert, and Anna saw that Bert and the Anna of old were one."
    found = renamed(text, random.Random(0))
    words, before = found.replace(",", "").split(), text.replace(",", "").split()
    made = {old: new for old, new in zip(before, words, strict=True) if old != new}
    assert set(made) == {"Anna", "Bert"}
    assert [made.get(word, word) for word in before] == words
    assert len(set(made.values())) == 2
    assert renamed("no names here", random.Random(0)) == "no names here"


def test_repeated_windows_hold_few_phrases_again_and_again():
    tokenizer = make_tokenizer()
    found = repeated_windows(tokenizer, 3, 512)
    assert found.shape == (3, 512)
    assert int(found.max()) < len(tokenizer)
    assert not set(tokenizer.all_special_ids) & set(found.flatten().tolist())
    for window in found:
        fours = {tuple(window[i : i + 4].tolist()) for i in range(509)}
        # within phrases of at most 32 tokens, and where two of the phrases meet
        assert len(fours) <= PHRASES * 29 + 3 * PHRASES**2
    assert torch.equal(found, repeated_windows(tokenizer, 3, 512))
    assert not torch.equal(found, repeated_windows(tokenizer, 3, 512, seed=1))
    assert repeated_windows(tokenizer, 0, 512).shape == (0, 512)
