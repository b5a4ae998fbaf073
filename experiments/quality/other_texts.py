"""Texts unlike encyclopedia articles, for ``sweep.py`` to judge settings by: a Bible, manuals and sources.

The manuals and sources are those of the Python packages installed here, in the order of a seeded permutation::

    python experiments/quality/other_texts.py TEXTS
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import typer

from framequant.evaluation.text import king_james

CHARACTERS = 500_000


def installed_text(*patterns: str) -> str:
    """Beginnings of the longer files of installed packages whose names match a pattern."""
    root = Path(torch.__file__).parent.parent
    files = sorted(
        {file for pattern in patterns for file in root.rglob(pattern) if file.stat().st_size > 4000}
    )
    random.Random(0).shuffle(files)
    return "\n\n".join(file.read_text(errors="ignore")[:8000] for file in files[:200])


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bible.txt").write_text(king_james("new")[:CHARACTERS])
    (folder / "manuals.txt").write_text(installed_text("*.md", "METADATA")[:CHARACTERS])
    (folder / "sources.txt").write_text(installed_text("*.py")[:CHARACTERS])


if __name__ == "__main__":
    typer.run(main)
