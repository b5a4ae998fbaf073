"""The house: imports point one way, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "framequant"

#: Layers from the bottom up; a file may import from its own layer and those below.
LAYERS = [
    {"errors", "memory"},
    {"frames", "codes"},
    {"config", "spec"},
    {"storage"},
    {"kernels"},
    {"quantizers"},
    {"layers", "fused"},
    {"model"},
    {"integrity", "untrusted"},
    {"checkpoint"},
    {"report"},
    {"integrations", "pretrained"},
    {"streaming"},
    {"evaluation"},
    {"cli", "__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _top(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Our own modules that a file imports anywhere, as top-level names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "framequant" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path):
    own = _top(path)
    upward = {name for name in _imports(path) if LEVEL[name] > LEVEL[own]}
    assert not upward, f"{own} must not import {upward}"


def test_every_file_has_a_layer():
    assert {_top(path) for path in SOURCE.rglob("*.py")} <= set(LEVEL)


def test_importing_the_package_imports_no_heavy_library():
    heavy = ("torch", "transformers", "triton", "numba", "timm", "datasets", "typer")
    code = f"import sys, framequant; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["framequant, transformers", "transformers, framequant"])
def test_transformers_knows_us_whichever_is_imported_first(order):
    code = (
        f"import {order}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; "
        "print('framequant' in m)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("True")


def test_every_public_name_is_there():
    import framequant

    assert all(getattr(framequant, name) is not None for name in framequant.__all__)
    assert set(framequant.__all__) == set(framequant._HOMES)
    with pytest.raises(AttributeError, match="quantise_"):
        _ = framequant.quantise_
