"""What a page is made from: reports of runs and tables of results, found in the folders that are named.

Three kinds of file are read. ``framequant_report.json``, which every checkpoint has, is a *run*. ``NAME.csv`` is a
*table*: a row per result, with the columns ``seed``, ``commit``, ``device`` and ``command`` where they are known.
``NAME.plots.json`` beside it says which *plots* to draw from that table, and in words what it shows; it holds no
figures, so that a plot cannot differ from its table. Pure reading: nothing here draws.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from framequant.errors import ReportError, nearest
from framequant.model.report import QuantizationReport

REPORT_NAME = "framequant_report.json"
PLOTS_SUFFIX = ".plots.json"
#: Files larger than this are refused: a table of results is small.
MAX_BYTES = 32 * 1024**2

Row = dict[str, str]


@dataclass(frozen=True)
class Plot:
    """A plot of a table's columns.

    Attributes:
        title: what it shows.
        y: column of the vertical axis; empty for an image.
        x: column of the horizontal axis.
        series: column whose values tell the lines apart, or None for one line.
        where: columns and the values that a row must have there.
        kind: "lines", "points" or "bars".
        log_x, log_y: logarithmic axes.
        predicted: column that holds what theory says, drawn as a broken line.
        x_title, y_title: of the axes; the columns' names if empty.
        caption: what to see in it.
        image: a PNG beside the table, instead of columns.
    """

    title: str
    y: str = ""
    x: str = ""
    series: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    kind: str = "lines"
    log_x: bool = False
    log_y: bool = False
    predicted: str | None = None
    x_title: str = ""
    y_title: str = ""
    caption: str = ""
    image: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form without what is left at its default; ``read_plots`` inverts it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value for key, value in values.items() if value and value != "lines"}


@dataclass(frozen=True)
class Table:
    """A CSV of results.

    Attributes:
        name: its file name without the ending.
        path: of the file.
        columns: in order.
        rows: cells as text; empty where there is none.
        title: heading; the name if no plots file gives one.
        text: what it shows and what to think of it.
        plots: to draw from it.
    """

    name: str
    path: Path
    columns: list[str]
    rows: list[Row]
    title: str = ""
    text: str = ""
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True)
class Run:
    """The report of one quantization."""

    name: str
    path: Path
    report: QuantizationReport


@dataclass
class Results:
    """Everything that was found.

    Attributes:
        tables: in order of their names within each folder.
        runs: likewise.
        skipped: files of folders that could not be read, with the reason.
    """

    tables: list[Table] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def collect(paths: Sequence[str | Path]) -> Results:
    """Read results from files and, recursively, from folders.

    A damaged file that is named is an error; one that merely lies in a folder is passed over and listed.

    Raises:
        ReportError: nothing is there, a named file is of another kind, or a folder holds no results.
    """
    results, seen = Results(), set()
    for given in paths:
        path = Path(given).expanduser()
        files = _files(path)
        for file in files:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                _add(results, file, path)
            except ReportError as error:
                if path.is_file():
                    raise
                results.skipped[str(file)] = str(error)
    if not results.tables and not results.runs:
        reasons = "; ".join(results.skipped.values()) or "nothing was named"
        raise ReportError(f"there is nothing to show: {reasons}.")
    return results


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise ReportError(f"no file or folder {path}.")
    found = sorted(p for p in path.rglob("*") if p.suffix == ".csv" or p.name == REPORT_NAME)
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not found:
        raise ReportError(
            f"{path} holds no results: looked for {REPORT_NAME} (in every checkpoint) and for .csv tables, in "
            "subfolders too."
        )
    return found


def _add(results: Results, file: Path, given: Path) -> None:
    if file.suffix == ".csv":
        results.tables.append(read_table(file))
    elif file.suffix == ".json" and not file.name.endswith(PLOTS_SUFFIX):
        results.runs.append(Run(_run_name(file, given), file, read_run(file)))
    else:
        raise ReportError(f"{file} is neither a .csv table nor a {REPORT_NAME}.")


def _run_name(file: Path, given: Path) -> str:
    """The folder of a run, as far as it tells runs apart."""
    folder = file.resolve().parent
    base = given.resolve() if given.is_dir() else folder
    return "/".join(folder.relative_to(base).parts) or folder.name


def read_run(file: Path) -> QuantizationReport:
    """Read the report of a quantization.

    Raises:
        ReportError: unreadable, not JSON, or no report of ours.
    """
    data = _json(file)
    if not isinstance(data, dict) or "linears" not in data or "config" not in data:
        raise ReportError(f"{file} is no report of framequant: it has no settings and no linears.")
    try:
        return QuantizationReport.from_dict(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ReportError(f"{file} is no report that this version reads: {error}.") from error


def read_table(file: Path) -> Table:
    """Read a CSV of results and the plots file beside it.

    Raises:
        ReportError: unreadable, no text, without a heading or rows, rows longer than the heading, or a wrong plots
            file.
    """
    _check_size(file)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{file} cannot be read as a CSV: {error}.") from error
    if not rows:
        raise ReportError(f"{file} holds no rows of results.")
    if len(set(columns)) != len(columns) or any(None in row for row in rows):
        raise ReportError(f"{file} is no table: every row needs one cell for each column of its first line.")
    cells = [{key: value or "" for key, value in row.items()} for row in rows]
    title, text, plots = read_plots(file, columns)
    return Table(file.stem, file, columns, cells, title or file.stem.replace("_", " "), text, plots)


def read_plots(table: Path, columns: Sequence[str]) -> tuple[str, str, tuple[Plot, ...]]:
    """Read ``NAME.plots.json`` of ``NAME.csv``: title, text and plots; nothing if there is none.

    Raises:
        ReportError: an unknown key, or a column that the table has not; the nearest is named.
    """
    file = table.with_name(table.stem + PLOTS_SUFFIX)
    if not file.is_file():
        return "", "", ()
    data = _json(file)
    if not isinstance(data, dict) or not isinstance(data.get("plots", []), list):
        raise ReportError(f"{file}: expected title, text and a list of plots.")
    known = {f.name for f in fields(Plot)}
    plots = []
    for entry in data.get("plots", []):
        for key in entry:
            if key not in known:
                raise ReportError(f"{file}: unknown key {key!r}.{nearest(str(key), known)}")
        plot = Plot(**entry)
        used = [plot.x, plot.y, plot.series, plot.predicted, *plot.where]
        for column in [] if plot.image else [name for name in used if name]:
            if column not in columns:
                raise ReportError(f"{file}: {table.name} has no column {column!r}.{nearest(column, columns)}")
        if plot.image and (Path(plot.image).name != plot.image or not (file.parent / plot.image).is_file()):
            raise ReportError(f"{file}: no picture {plot.image} lies beside it.")
        plots.append(plot)
    return str(data.get("title", "")), str(data.get("text", "")), tuple(plots)


def write_plots(table: Path, title: str, text: str, plots: Sequence[Plot]) -> Path:
    """Write the plots file of a table; ``read_plots`` reads it."""
    file = table.with_name(table.stem + PLOTS_SUFFIX)
    data = {"title": title, "text": text, "plots": [plot.to_dict() for plot in plots]}
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _json(file: Path) -> Any:
    _check_size(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be read as JSON: {error}.") from error


def _check_size(file: Path) -> None:
    if file.stat().st_size > MAX_BYTES:
        raise ReportError(f"{file} is larger than {MAX_BYTES} bytes; this is no table of results.")


def number(cell: str) -> float | None:
    """The number in a cell, or None."""
    try:
        return float(cell)
    except ValueError:
        return None
