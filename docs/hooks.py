"""A table from a CSV of this repository wherever a page says ``<!-- csv: FILE | COLUMN, COLUMN=HEADING, … -->``.

Pages so hold no figure of their own: they show what the last run wrote, with the command's device and commit.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"<!--\s*csv:\s*(?P<file>\S+)\s*\|\s*(?P<columns>[^>]*?)\s*-->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Mkdocs calls this for every page."""
    return MARK.sub(lambda match: table(match["file"], match["columns"]), markdown)


def table(file: str, columns: str) -> str:
    """The Markdown table of a CSV.

    Args:
        file: relative to the repository, under ``experiments/results`` or ``benchmarks``.
        columns: names of columns, each with ``=HEADING`` if it is to be headed otherwise.

    Raises:
        ValueError: the file lies elsewhere, or has no such column.
    """
    if not file.startswith(("experiments/results/", "benchmarks/", "tests/faults/")):
        raise ValueError(f"{file}: figures come from experiments/results, benchmarks or tests/faults")
    with (ROOT / file).open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    wanted = [entry.strip().partition("=") for entry in columns.split(",")]
    for name, _, _ in wanted:
        if name not in rows[0]:
            raise ValueError(f"{file} has no column {name!r}; its columns are {', '.join(rows[0])}")
    lines = [
        "| " + " | ".join(heading or name for name, _, heading in wanted) + " |",
        "|---" * len(wanted) + "|",
        *("| " + " | ".join(_cell(row[name]) for name, _, _ in wanted) + " |" for row in rows),
    ]
    sources = sorted({f"{row['device']}, commit {row['commit']}" for row in rows if row.get("device")})
    return "\n".join(lines) + f"\n\n*From `{file}`{': ' + '; '.join(sources) if sources else ''}.*\n"


def _cell(value: str) -> str:
    """A number with at most six digits, whole ones in full; anything else as it is, breakable at its colons."""
    try:
        number = float(value)
    except ValueError:
        return value.replace(":", ": ")
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.6g}"
