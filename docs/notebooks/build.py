"""Write the notebooks from the scripts beside this one and keep what they print: ``python docs/notebooks/build.py``.

Cells run in this process in order, without Jupyter; the test suite runs them the same way.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def execute(notebook: dict[str, Any], namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the code cells of a notebook in order, replacing their outputs by what they print.

    Returns:
        The namespace they leave.
    """
    names = {"__name__": "__main__", **(namespace or {})}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        text = printed.getvalue()
        cell["outputs"] = (
            [{"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}]
            if text
            else []
        )
    return names


def cell(kind: str, text: str, number: int) -> dict[str, Any]:
    """A cell in nbformat 4.5."""
    lines = text.strip("\n").splitlines(keepends=True)
    base = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
    return {**base, "execution_count": None, "outputs": []} if kind == "code" else base


def notebook(script: str) -> dict[str, Any]:
    """A notebook from a script whose parts are headed ``# %%`` (code) or ``# %% [markdown]`` (comments)."""
    cells = []
    for number, part in enumerate(script.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        if "markdown" in head:
            body = "\n".join(
                line.removeprefix("#").removeprefix(" ") for line in body.strip("\n").splitlines()
            )
        cells.append(cell("markdown" if "markdown" in head else "code", body, number))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(names: list[str]) -> None:
    for script in [HERE / f"{name}.py" for name in names] or sorted(
        set(HERE.glob("*.py")) - {Path(__file__)}
    ):
        content = notebook(script.read_text(encoding="utf-8"))
        execute(content)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        script.with_suffix(".ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
