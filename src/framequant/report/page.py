"""The page: one HTML file that shows runs and tables of results side by side and needs no network.

What is on it is decided here, how it looks in ``templates/``; plotly's library is written into the page.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framequant.errors import ConfigError
from framequant.report import figures, pareto
from framequant.report.results import Results, Row, Run, Table, number

TEMPLATES = Path(__file__).parent / "templates"
#: Tables with more rows than this get a field to filter them by.
ROWS_TO_FILTER = 12
#: A front is drawn where some rows have so many times the bits of others.
MANY_BITS = 1.01
#: Columns that say where a row comes from; shown once where all rows agree.
ORIGIN = ("seed", "commit", "device", "command", "dtype", "torch")


@dataclass
class Figure:
    """A figure of the page: a plotly dictionary or a picture's data URI, and what to read beside it."""

    key: str
    title: str
    data: dict[str, Any] | None = None
    picture: str = ""
    caption: str = ""
    commands: list[str] = field(default_factory=list)


@dataclass
class Sheet:
    """A sortable table of the page: headings, cells as (text, sort key), and what all of its rows share."""

    columns: list[str]
    cells: list[list[tuple[str, str]]]
    shared: dict[str, str] = field(default_factory=dict)
    filtered: bool = False


@dataclass
class Section:
    """A section of the page."""

    key: str
    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    sheets: list[tuple[str, Sheet]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    folded: list[tuple[str, Sheet]] = field(default_factory=list)
    source: str = ""


def write_page(results: Results, out: Path, title: str = "framequant results") -> int:
    """Write the page.

    Args:
        results: what to show.
        out: the file to write; replaced if it exists.
        title: of the page.

    Returns:
        Bytes written.

    Raises:
        ConfigError: plotly or jinja2 is missing, or the file cannot be written.
    """
    html = render(results, title)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give a file, for example --out {out / 'page.html'}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}.") from error
    return len(html.encode())


def render(results: Results, title: str) -> str:
    """The page as text."""
    figures.require_plotly()
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(
            f"the page needs jinja2 ({error}). Run: pip install 'framequant[report]'"
        ) from error
    from plotly.offline import get_plotlyjs

    sections = [section for table in results.tables for section in [table_section(table)]]
    if results.runs:
        sections.append(runs_section(results.runs))
    data = {fig.key: fig.data for section in sections for fig in section.figures if fig.data is not None}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        skipped=results.skipped,
        figures=_script_safe(data),
        plotly=get_plotlyjs(),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
    )


def table_section(table: Table) -> Section:
    """A table with its Pareto fronts and the plots that its plots file asks for."""
    section = Section(f"t-{_key(table.path)}", table.title, table.text, source=str(table.path))
    section.commands = _commands(table.rows)
    for measure in pareto.measures(table):
        for model in pareto.models(table):
            points = pareto.points(table, measure, model)
            bits = [p.bits for p in points if p.bits <= figures.FLOAT_BITS]
            if bits and max(bits) > MANY_BITS * min(bits):
                title = f"{measure.title} against measured bits{f', {model}' if model else ''}"
                data = figures.pareto_figure(points, measure)
                _add_figure(section, title, data=data)
    for plot in table.plots:
        if plot.image:
            _add_figure(section, plot.title, picture=_data_uri(table.path.parent / plot.image))
        else:
            _add_figure(section, plot.title, data=figures.table_figure(table, plot))
        section.figures[-1].caption = plot.caption
    section.sheets.append(("", sheet(table.columns, table.rows)))
    return section


def runs_section(runs: Sequence[Run]) -> Section:
    """Runs side by side: what was measured, settings that differ, and every layer."""
    section = Section("runs", "Runs side by side", source=", ".join(str(run.path) for run in runs))
    section.commands = list(
        dict.fromkeys(
            str(run.report.environment["command"]) for run in runs if run.report.environment.get("command")
        )
    )
    names = [run.name for run in runs]
    measured = [{"": key, **dict(zip(names, values, strict=True))} for key, values in _measured(runs)]
    section.sheets.append(("Measured", sheet(["", *names], measured, fold=False)))
    differing = _differing_settings(runs)
    if differing:
        section.sheets.append(("Settings in which they differ", sheet(["", *names], differing, fold=False)))
    for value, title, log in (
        ("relative_loss", "relative loss, tr(E H Eᵀ) / tr(W H Wᵀ)", True),
        ("bits_per_weight", "measured bits per weight", False),
    ):
        heading = "Loss of every linear" if log else "Bits of every linear"
        _add_figure(section, heading, data=figures.layer_figure(runs, value, title, log))
    _add_figure(section, "What the bits are spent on", data=figures.bytes_figure(runs))
    for run in runs:
        section.folded.append((f"{run.name}: every linear", _linears(run)))
    return section


def _measured(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    reports = [run.report for run in runs]
    losses = [[entry.relative_loss for entry in report.linears] for report in reports]
    worst = [max(report.linears, key=lambda e: e.relative_loss) for report in reports]
    return [
        ("model", [str(report.model.get("class", "")) for report in reports]),
        ("measured bits per weight", [f"{report.bits_per_weight:.4f}" for report in reports]),
        ("true redundancy", [f"{report.redundancy:.4f}" for report in reports]),
        ("quantized linears", [str(len(report.linears)) for report in reports]),
        ("coverage of the blocks", [f"{report.coverage:.1%}" for report in reports]),
        ("mean relative loss", [f"{sum(values) / len(values):.5f}" for values in losses]),
        ("largest relative loss", [f"{entry.relative_loss:.4f} {entry.name}" for entry in worst]),
        ("seconds", [f"{report.seconds:.1f}" for report in reports]),
        ("device", [str(report.environment.get("device_name", "")) for report in reports]),
        ("warnings", [str(len(report.warnings)) for report in reports]),
    ]


def _differing_settings(runs: Sequence[Run]) -> list[Row]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.report.config):
        values = [json.dumps(run.report.config.get(key), ensure_ascii=False) for run in runs]
        if len(set(values)) > 1:
            named = {run.name: value.strip('"') for run, value in zip(runs, values, strict=True)}
            rows.append({"": key, **named})
    return rows


def _linears(run: Run) -> Sheet:
    rows = [
        {
            "linear": entry.name,
            "shape": f"{entry.out_features} × {entry.in_features}",
            "bits": f"{entry.bits_per_weight:.4f}",
            "redundancy": f"{entry.redundancy:.4f}",
            "relative loss": f"{entry.relative_loss:.6g}",
            "target change": f"{entry.target_change:.4g}",
            "damping": f"{entry.damping:g}",
            "code": entry.code,
            "frame in": entry.frame_in,
        }
        for entry in run.report.linears
    ]
    return sheet(list(rows[0]) if rows else ["linear"], rows)


def sheet(columns: Sequence[str], rows: Sequence[Row], fold: bool = True) -> Sheet:
    """A sortable table; columns without any cell are left out, origins that all rows share are folded into one line."""
    shown, shared = [], {}
    for column in columns:
        values = {row.get(column, "") for row in rows}
        if fold and values == {""}:
            continue
        if fold and (column == "command" or (column in ORIGIN and len(values) == 1)):
            if column != "command":
                shared[column] = values.pop()
            continue
        shown.append(column)
    cells = [[(pretty(row.get(column, "")), row.get(column, "")) for column in shown] for row in rows]
    return Sheet(shown, cells, shared, len(rows) > ROWS_TO_FILTER)


def pretty(cell: str) -> str:
    """A number with at most five digits, whole ones in full; anything else as it is, breakable after its colons."""
    value = number(cell)
    if value is None:
        return cell.replace(":", ":\u200b").replace(",", ",\u200b")
    if not math.isfinite(value) or not any(mark in cell for mark in ".e"):
        return cell
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.5g}"


def _add_figure(section: Section, title: str, **values: Any) -> None:
    key = f"{section.key}-f{len(section.figures)}"
    section.figures.append(Figure(key, title, commands=section.commands, **values))


def _commands(rows: Sequence[Row]) -> list[str]:
    return [command for command in dict.fromkeys(row.get("command", "") for row in rows) if command]


def _key(path: Path) -> str:
    return "".join(c if c.isalnum() else "-" for c in str(path)).strip("-").lower()


def _data_uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _script_safe(data: Any) -> str:
    """JSON that cannot end the script element which holds it; numbers that are not finite become null."""
    return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
