"""``framequant report``: one HTML page from reports of runs and tables of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from framequant.cli.console import Reporter, facts, size
from framequant.cli.options import JsonOption

NAME = "report"
EXAMPLES = (
    "Examples:\n\n"
    "framequant report smol-2bit smol-3bit --out compare.html\n\n"
    "framequant report experiments/results --out page.html --title 'SmolLM2 and DeiT-Tiny'"
)


def run(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…", help="Checkpoints, folders with .csv results, or single files of these kinds."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write; replaced if it exists.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "framequant results",
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained page: sortable tables, interactive plots, runs side by side."""
    from framequant.report.page import write_page
    from framequant.report.results import collect

    reporter = Reporter(as_json)
    results = collect(paths)
    written = write_page(results, out, title)
    for reason in results.skipped.values():
        reporter.notice(f"passed over: {reason}")
    summary = {
        "out": str(out),
        "bytes": written,
        "runs": [run.name for run in results.runs],
        "tables": [str(table.path) for table in results.tables],
        "skipped": results.skipped,
    }
    rows = {
        "page": f"{out} ({size(written)}, self-contained)",
        "runs": str(len(results.runs)),
        "tables": str(len(results.tables)),
    }
    reporter.print(facts("Written", rows))
    reporter.print_json(summary)
