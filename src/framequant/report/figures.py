"""Results as plotly figures: Pareto fronts, plots of tables' columns, layers of runs.

Figures are plain JSON-ready dictionaries without colours of background and text: the page sets those, since it knows
whether it is light or dark. plotly is imported when a figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from framequant.errors import ConfigError
from framequant.report.pareto import Measure, Point, family, front
from framequant.report.results import Plot, Row, Run, Table, number

#: Read on white and on near black alike, and told apart by most colour-blind readers.
COLOURS = (
    *("#2f7fd1", "#d9682b", "#189a74", "#a95fc9", "#b98a00", "#e0507f", "#1099b0", "#9c6b3f"),
    *("#6c72dd", "#7d9a1c", "#b0655a", "#4c9a4a"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
#: Bits of a float model's weight; such rows are drawn as a line across, not as a point far to the right.
FLOAT_BITS = 15.5


def require_plotly() -> Any:
    """Import plotly.

    Raises:
        ConfigError: it is not installed; the message has the command.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ConfigError(
            f"the page needs plotly ({error}). Run: pip install 'framequant[report]'"
        ) from error
    return go


def finished(figure: Any) -> dict[str, Any]:
    """A figure as a dictionary, without plotly's own template."""
    figure.update_layout(template="none")
    return figure.to_plotly_json()


def style(index: int) -> dict[str, Any]:
    """Colour and symbol of a line."""
    return {"color": COLOURS[index % len(COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 9}


def pareto_figure(points: Sequence[Point], measure: Measure) -> dict[str, Any]:
    """Quality against measured bits: every method, the front, and the float model as a line across."""
    go = require_plotly()
    figure = go.Figure()
    floats = [p for p in points if p.bits > FLOAT_BITS]
    rest = [p for p in points if p.bits <= FLOAT_BITS and math.isfinite(p.quality)]
    best = front(rest, measure.larger_is_better)
    figure.add_scatter(
        x=[p.bits for p in best],
        y=[p.quality for p in best],
        mode="lines",
        name="front",
        line={"color": "#8a8f98", "width": 2, "dash": "dot"},
        hoverinfo="skip",
    )
    for index, name in enumerate(dict.fromkeys(family(p.method) for p in rest)):
        members = sorted((p for p in rest if family(p.method) == name), key=lambda p: p.bits)
        figure.add_scatter(
            x=[p.bits for p in members],
            y=[p.quality for p in members],
            mode="markers",
            name=name,
            marker=style(index),
            customdata=[p.method for p in members],
            hovertemplate="%{customdata}<br>%{x:.4g} bits, %{y:.5g}<extra></extra>",
        )
    for point in floats[:1]:
        ends = [p.bits for p in rest]
        figure.add_scatter(
            x=[min(ends), max(ends)],
            y=[point.quality] * 2,
            mode="lines",
            name=f"float, {point.quality:g}",
            line={"color": "#8a8f98", "width": 1.5},
            hovertemplate="float model: %{y:.5g}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "measured bits per weight"}},
        yaxis={"title": {"text": measure.title}, "type": "log" if measure.log else "linear"},
        hovermode="closest",
    )
    return finished(figure)


def table_figure(table: Table, plot: Plot) -> dict[str, Any]:
    """Draw columns of a table."""
    go = require_plotly()
    rows = [r for r in table.rows if all(r.get(key) == str(value) for key, value in plot.where.items())]
    figure = go.Figure()
    names = list(dict.fromkeys(row[plot.series] for row in rows)) if plot.series else [""]
    predictions: list[list[tuple[str, str]]] = []
    for index, name in enumerate(names):
        mine = [row for row in rows if not plot.series or row[plot.series] == name]
        mine = [row for row in mine if number(row[plot.y]) is not None]
        if not mine:
            continue
        _add_line(figure, go, plot, mine, name or plot.y, index)
        predicted = [(r[plot.x], r[plot.predicted]) for r in mine if plot.predicted and r[plot.predicted]]
        if predicted and predicted not in predictions:  # lines that share a prediction show it once
            predictions.append(predicted)
            _add_prediction(figure, plot, mine, f"{name}, predicted" if name else "predicted", index)
    figure.update_layout(
        xaxis={"title": {"text": plot.x_title or plot.x}, "type": _axis(rows, plot)},
        yaxis={"title": {"text": plot.y_title or plot.y}, "type": "log" if plot.log_y else "linear"},
        hovermode="closest",
        barmode="group",
    )
    return finished(figure)


def _axis(rows: Sequence[Row], plot: Plot) -> str:
    if any(number(row[plot.x]) is None for row in rows):
        return "category"
    return "log" if plot.log_x else "linear"


def _values(rows: Sequence[Row], column: str) -> list[float | str]:
    numbers = [number(row[column]) for row in rows]
    if any(value is None for value in numbers):
        return [row[column] for row in rows]
    return [value for value in numbers if value is not None]


def _add_line(figure: Any, go: Any, plot: Plot, rows: Sequence[Row], name: str, index: int) -> None:
    x, y = _values(rows, plot.x), [number(row[plot.y]) for row in rows]
    hover = f"{name}<br>{plot.x} %{{x}}<br>{plot.y} %{{y:.5g}}<extra></extra>"
    if plot.kind == "bars":
        figure.add_bar(x=x, y=y, name=name, marker={"color": style(index)["color"]}, hovertemplate=hover)
        return
    mode = "markers" if plot.kind == "points" else "lines+markers" if len(rows) <= 64 else "lines"
    marker = {**style(index), "size": 7}
    figure.add_scatter(x=x, y=y, mode=mode, name=name, marker=marker, hovertemplate=hover)


def _add_prediction(figure: Any, plot: Plot, rows: Sequence[Row], name: str, index: int) -> None:
    assert plot.predicted
    known = [row for row in rows if number(row[plot.predicted]) is not None]
    figure.add_scatter(
        x=_values(known, plot.x),
        y=[number(row[plot.predicted]) for row in known],
        mode="lines",
        name=name,
        line={"color": style(index)["color"], "dash": "dash", "width": 1.5},
        hovertemplate=f"{name}<br>%{{x}}: %{{y:.5g}}<extra></extra>",
    )


def layer_figure(runs: Sequence[Run], value: str, title: str, log: bool) -> dict[str, Any]:
    """A figure of every linear, in the order of the walk, one line per run.

    Args:
        runs: to compare.
        value: attribute of ``LinearReport``.
        title: of the vertical axis.
        log: whether that axis is logarithmic.
    """
    go = require_plotly()
    figure = go.Figure()
    for index, run in enumerate(runs):
        linears = run.report.linears
        figure.add_scatter(
            x=list(range(1, len(linears) + 1)),
            y=[getattr(entry, value) for entry in linears],
            mode="lines+markers" if len(linears) <= 64 else "lines",
            name=run.name,
            line={"color": style(index)["color"], "width": 1.5},
            marker={**style(index), "size": 5},
            customdata=[entry.name for entry in linears],
            hovertemplate="%{customdata}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": "linear, in the order of the walk"}},
        yaxis={"title": {"text": title}, "type": "log" if log else "linear"},
        hovermode="closest",
    )
    return finished(figure)


def bytes_figure(runs: Sequence[Run]) -> dict[str, Any]:
    """Bits per weight of every stored part, stacked, one bar per run."""
    go = require_plotly()
    figure = go.Figure()
    parts = list(dict.fromkeys(part for run in runs for entry in run.report.linears for part in entry.bytes))
    for index, part in enumerate(parts):
        shares = []
        for run in runs:
            weights = sum(entry.num_weights for entry in run.report.linears)
            stored = sum(entry.bytes.get(part, 0) for entry in run.report.linears)
            shares.append(8 * stored / max(weights, 1))
        figure.add_bar(
            y=[run.name for run in runs],
            x=shares,
            orientation="h",
            name=part,
            marker={"color": style(index)["color"]},
            hovertemplate=f"{part}: %{{x:.4f}} bits per weight<extra>%{{y}}</extra>",
        )
    figure.update_layout(
        barmode="stack",
        bargap=0.5,
        xaxis={"title": {"text": "measured bits per weight"}},
        yaxis={"automargin": True, "type": "category"},
        hovermode="closest",
    )
    return finished(figure)
