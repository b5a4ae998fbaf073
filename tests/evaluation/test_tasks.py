from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import framequant as fq
from framequant.cli.app import app
from framequant.evaluation import tasks
from tests.conftest import make_llama, make_text, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    text = make_text(64).split()
    goals = [
        {"goal": " ".join(text[i : i + 5]), "sol1": text[i], "sol2": text[i + 1], "label": i % 2}
        for i in range(6)
    ]
    lasts = [{"text": " ".join(text[i : i + 8])} for i in range(6)]
    for name, lines in (("piqa", goals), ("lambada", lasts), ("other", [{"x": 1}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_local_file_says_what_task_it_is(folder):
    assert tasks.local_task(folder / "piqa.jsonl")["output_type"] == "multiple_choice"
    assert tasks.local_task(folder / "lambada.jsonl")["output_type"] == "loglikelihood"
    assert [task["task"] for task in tasks.resolve_tasks(["piqa", "lambada"], folder)] == ["piqa", "lambada"]
    with pytest.raises(fq.CalibrationError, match=r"fields \['x'\] are no task"):
        tasks.local_task(folder / "other.jsonl")
    with pytest.raises(fq.CalibrationError, match="holds no JSON lines"):
        tasks.local_task(folder / "missing.jsonl")


def test_without_lm_eval_the_command_is_in_the_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--tasks", "piqa"])
    assert result.exit_code == 2
    assert "framequant[eval]" in result.output.replace("\n", "")


@pytest.mark.filterwarnings("ignore")  # of lm-eval's dependencies
def test_tasks_of_local_files_are_measured(folder, tmp_path):
    pytest.importorskip("lm_eval", reason=f"lm-eval is not installed: {tasks.INSTALL}")
    tokenizer, model = make_tokenizer(), make_llama()
    found = tasks.evaluate_tasks(model, tokenizer, ["piqa", "lambada"], folder=folder, limit=5)
    assert set(found) == {"piqa", "lambada"}
    assert found["piqa"]["items"] == found["lambada"]["items"] == 5
    assert 0 <= found["piqa"]["acc"] <= 1
    assert found["lambada"]["perplexity"] > 1
    with pytest.raises(fq.ConfigError, match=r"no task 'piqaa'.*Did you mean"):
        tasks.resolve_tasks(["piqaa"], folder)
