"""Kernels have the lines that time stamps go to, and are Python with them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "time_stamps.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("time_stamps", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["time_stamps"] = module
    spec.loader.exec_module(module)
    return module


def test_a_copy_of_the_kernels_has_all_stamps(script: ModuleType, tmp_path: Path) -> None:
    script.stamped(tmp_path)
    for file in {mark.file for mark in script.MARKS}:
        source = (script.SOURCE / "framequant" / "kernels" / f"{file}.py").read_text()
        calls = [
            node
            for node in ast.walk(ast.parse((tmp_path / "framequant" / "kernels" / f"{file}.py").read_text()))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "stamp"
        ]
        assert len(calls) == sum(mark.file == file for mark in script.MARKS)
        assert "stamp(" not in source


def test_kernels_that_lost_a_line_are_told(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = script.MARKS[0]._replace(line="    no such line")
    monkeypatch.setattr(script, "MARKS", (gone,))
    with pytest.raises(ValueError, match=r"no longer.*mend MARKS in time_stamps\.py"):
        script.stamped(tmp_path)
