"""Kernels that numba keeps on disk are compiled anew when code of another module that went into them has changed.

Numba's cache compares the file of a function with what it was, and no other file. So a module whose functions call
compiled functions of others carries a stamp of these others' text, and has another text itself when they change.
"""

from __future__ import annotations

import hashlib
import re

import pytest

from tests.conftest import ROOT

KERNELS = ROOT / "src" / "framequant" / "kernels"
STAMP = re.compile(r"^# Compiled in: (\w+)", re.MULTILINE)


def compiled_in(text: str) -> list[str]:
    """Modules of compiled functions that a module imports."""
    lines = re.findall(r"^from framequant\.kernels(?:\.(\w+))? import (\w+|\()", text, re.MULTILINE)
    names = sorted({module or name for module, name in lines})
    return [name for name in names if "from numba" in (KERNELS / f"{name}.py").read_text(encoding="utf-8")]


def stamp_of(names: list[str]) -> str:
    texts = [(KERNELS / f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*_cpu.py")), ids=lambda path: path.stem)
def test_the_stamp_is_that_of_what_is_compiled_in(path):
    text = path.read_text(encoding="utf-8")
    names = compiled_in(text) if "cache=True" in text else []
    found = STAMP.search(text)
    if not names:
        assert found is None
        return
    expected, stamp = stamp_of(names), found and found[1]
    assert stamp == expected, (
        f"{', '.join(names)} changed: write '# Compiled in: {expected}' into {path.name}"
    )


def test_what_is_compiled_in_is_found():
    found = {path.stem: compiled_in(path.read_text(encoding="utf-8")) for path in KERNELS.glob("*_cpu.py")}
    assert found["product_cpu"] == ["cpu_vectors", "transform_cpu"]
    assert found["team_cpu"] == found["dense_cpu"] == ["product_cpu"]
