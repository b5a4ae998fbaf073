import numpy as np
import pytest
import torch
from scipy import stats

import framequant as fq
from framequant.errors import CalibrationError
from framequant.evaluation.sentences import (
    SentencePairs,
    calibration_sentences,
    embeddings,
    read_pairs,
    sentence_batches,
    sentence_similarity,
    spearman,
)
from framequant.integrations.sources import open_model
from framequant.model.walk import quantized_linears
from tests.conftest import WORDS, make_text


def make_encoder(seed: int = 0):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    return BertModel(config).eval()


def sentences(count: int, seed: int = 0) -> list[str]:
    return [make_text(3 + number % 7, seed=1000 * seed + number) for number in range(count)]


def table(path, count=12):
    rows = zip(sentences(count, 1), sentences(count, 2), range(count), strict=True)
    path.write_text("".join(f"{first},{second},{score}\n" for first, second, score in rows))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys_with_and_without_ties(seed):
    draw = np.random.default_rng(seed)
    for left, right in (
        (draw.normal(size=50), draw.normal(size=50)),
        (draw.integers(0, 5, 50), draw.integers(0, 9, 50)),
    ):
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_tables_are_read_with_and_without_a_heading(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('sentence1,sentence2,score\n"One, two.",Three.,4.5\n\nOne.,Three.,1,extra\n')
    pairs = read_pairs(file)
    assert (pairs.first, pairs.second, pairs.scores) == (["One, two.", "One."], ["Three."] * 2, [4.5, 1.0])
    assert pairs.sentences == ["One, two.", "Three.", "One."]
    assert len(pairs.head(1)) == 1


@pytest.mark.parametrize("row", ["a,b", "a,b,", "a,b,nan", "a,,1", "a,b,high"])
def test_bad_rows_are_named(tmp_path, row):
    file = tmp_path / "pairs.csv"
    file.write_text(f"x,y,1\n{row}\n")
    with pytest.raises(CalibrationError, match="row 2 is no sentence pair"):
        read_pairs(file)


def test_a_heading_alone_is_no_table(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a,b,score\n")
    with pytest.raises(CalibrationError, match="holds no sentence pairs"):
        read_pairs(file)


def test_embeddings_do_not_depend_on_padding(tokenizer):
    model, texts = make_encoder(), sentences(9)
    together = embeddings(model, sentence_batches(tokenizer, texts, 64, batch_size=9))
    alone = embeddings(model, sentence_batches(tokenizer, texts, 64, batch_size=1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({len(text.split()) for text in texts}) > 1


def test_quantization_does_not_depend_on_padding(tokenizer):
    """Moments count real tokens only: one sentence a batch, unpadded, gives the same codes as one padded batch."""
    texts, codes = sentences(16), []
    for size in (1, 16):
        model = make_encoder()
        batches = list(sentence_batches(tokenizer, texts, 64, batch_size=size))
        config = fq.FrameQuantConfig(walk_dtype="float64")
        report = fq.quantize_(model, batches, config)
        assert {entry.tokens for entry in report.linears} == {sum(len(text.split()) for text in texts)}
        codes.append({name: layer.tensors for name, layer in quantized_linears(model).items()})
    same = [
        (codes[0][name]["packed_codes"] == other["packed_codes"]).float().mean()
        for name, other in codes[1].items()
    ]
    assert min(same) > 0.99


def test_calibration_takes_a_seeded_choice(tokenizer):
    texts = sentences(20)
    chosen = calibration_sentences(tokenizer, texts, 64, samples=5, seed=1)
    assert sum(len(batch["input_ids"]) for batch in chosen) == 5
    again = calibration_sentences(tokenizer, texts, 64, samples=5, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(chosen, again, strict=True))
    everything = calibration_sentences(tokenizer, texts, 64)
    assert sum(int(batch["attention_mask"].sum()) for batch in everything) == sum(
        len(t.split()) for t in texts
    )
    with pytest.raises(CalibrationError, match=r"20 sentences, 21 are asked for; give --samples 20"):
        calibration_sentences(tokenizer, texts, 64, samples=21)
    with pytest.raises(CalibrationError, match="positive"):
        calibration_sentences(tokenizer, texts, 64, samples=0)


def test_similarity_ranks_equal_sentences_first(tokenizer):
    texts = sentences(6)
    pairs = SentencePairs([*texts, *texts], [*texts, *texts[::-1]], [1.0] * 6 + [0.0] * 6)
    model = make_encoder()
    result = sentence_similarity(model, tokenizer, pairs)
    assert result.pairs == 12
    assert result.spearman > 0.8
    flipped = SentencePairs(pairs.first, pairs.second, [-score for score in pairs.scores])
    assert sentence_similarity(model, tokenizer, flipped).spearman == pytest.approx(-result.spearman)


def test_models_and_tables_that_cannot_be_measured(tokenizer, llama_directory):
    pairs = SentencePairs(sentences(3, 1), sentences(3, 2), [1.0, 2.0, 3.0])
    with pytest.raises(CalibrationError, match="no sentence encoder"):
        sentence_similarity(open_model(str(llama_directory)).model, tokenizer, pairs)
    with pytest.raises(CalibrationError, match="two different scores"):
        sentence_similarity(make_encoder(), tokenizer, SentencePairs(["a"], ["b"], [1.0]))

    class Unpadded:
        pad_token_id = None

    with pytest.raises(CalibrationError, match="padding token"):
        list(sentence_batches(Unpadded(), ["a"], 8))


@pytest.mark.slow
def test_float_minilm_scores_its_known_correlation(shared):
    opened = open_model("minilm")
    pairs = read_pairs(shared("data/stsb/stsb-en-test.csv"))
    result = sentence_similarity(opened.model, opened.require_tokenizer(), pairs)
    assert result.pairs == 1379
    assert round(result.spearman, 4) == 0.8203
