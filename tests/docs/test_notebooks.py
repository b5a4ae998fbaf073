"""The notebooks: made from their scripts, with outputs, and executed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("language", "vision")

_spec = importlib.util.spec_from_file_location("build_notebooks", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def _load(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_with_outputs(name):
    made, kept = build.notebook((FOLDER / f"{name}.py").read_text()), _load(name)
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in kept["cells"]]
    assert any(cell.get("outputs") for cell in kept["cells"])
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 50_000


def test_execution_keeps_what_is_printed_and_stops_at_an_error():
    made = build.notebook("# %% [markdown]\n# # Title\n# %%\nvalue = 6 * 7\nprint(value)\n")
    assert build.execute(made)["value"] == 42
    assert made["cells"][0]["source"] == ["# Title"]
    assert made["cells"][1]["outputs"][0]["text"] == ["42\n"]
    with pytest.raises(ZeroDivisionError):
        build.execute(build.notebook("# %%\n1 / 0\n"))


@pytest.mark.slow
def test_the_language_notebook_runs():
    names = build.execute(_load("language"))
    assert names["equal"] is True
    assert 1 < names["after"] / names["before"] < 4


@pytest.mark.slow
def test_the_vision_notebook_runs(monkeypatch, shared):
    monkeypatch.setenv("FRAMEQUANT_SHARED", str(shared("data/mnist").parents[1]))
    names = build.execute(_load("vision"))
    assert names["accuracy"](names["model"]) > 0.9
