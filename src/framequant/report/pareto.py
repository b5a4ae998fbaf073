"""Quality against measured bits: which columns of a table say how good a model is, and which rows nobody beats.

Pure functions of numbers and of rows as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from framequant.report.results import Row, Table, number

#: Columns that hold measured bits per weight, the first one that a table has counts.
BITS = ("bits_per_weight", "measured_bits")
#: Columns that name a method, likewise.
METHOD = ("method", "row", "preset")


@dataclass(frozen=True)
class Measure:
    """A measure of quality.

    Attributes:
        column: its name in tables.
        title: in words.
        larger_is_better: otherwise smaller is.
        log: whether differences are read as ratios.
    """

    column: str
    title: str
    larger_is_better: bool
    log: bool = False


MEASURES = (
    Measure("perplexity", "perplexity", larger_is_better=False, log=True),
    Measure("kl", "KL divergence from the float model [nats]", larger_is_better=False, log=True),
    Measure("top1", "top-1 accuracy [%]", larger_is_better=True),
    Measure("top5", "top-5 accuracy [%]", larger_is_better=True),
    Measure("spearman", "Spearman rank correlation", larger_is_better=True),
    Measure("piqa_acc", "PIQA accuracy", larger_is_better=True),
    Measure("lambada_acc", "LAMBADA accuracy", larger_is_better=True),
)


@dataclass(frozen=True)
class Point:
    """A row as a point: measured bits, quality, method, and its row."""

    bits: float
    quality: float
    method: str
    row: Row


def front(points: Sequence[Point], larger_is_better: bool) -> list[Point]:
    """The points that no other one beats with as few bits, by rising bits.

    A point is beaten by one of at most its bits and at least its quality, unless both are equal in both.

    Examples:
        >>> points = [Point(2, 30, "a", {}), Point(2, 20, "b", {}), Point(3, 25, "c", {}), Point(4, 10, "d", {})]
        >>> [point.method for point in front(points, larger_is_better=False)]
        ['b', 'd']
    """
    sign = 1 if larger_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, -sign * p.quality)):
        if not best or sign * point.quality > sign * best[-1].quality:
            best.append(point)
    return best


def first_column(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that there is."""
    return next((name for name in wanted if name in columns), None)


def family(method: str) -> str:
    """What a row's method belongs to: ``gptq:bits=3`` to ``gptq``."""
    return method.partition(":")[0].strip()


def models(table: Table) -> list[str]:
    """The models that a table has rows of, in order; one empty name where it does not say."""
    return list(dict.fromkeys(row.get("model", "") for row in table.rows))


def points(table: Table, measure: Measure, model: str = "") -> list[Point]:
    """The rows of a table that have both measured bits and a quality.

    Args:
        table: the results.
        measure: of quality.
        model: whose rows; "" for those that name none.
    """
    bits, method = first_column(table.columns, BITS), first_column(table.columns, METHOD)
    if bits is None or method is None:
        return []
    found = []
    for row in table.rows:
        x, y = number(row[bits]), number(row.get(measure.column, ""))
        if row.get("model", "") == model and x is not None and y is not None and x == x and y == y:
            found.append(Point(x, y, row[method], row))
    return found


def measures(table: Table) -> list[Measure]:
    """The measures of quality that a table with measured bits has."""
    if first_column(table.columns, BITS) is None or first_column(table.columns, METHOD) is None:
        return []
    return [measure for measure in MEASURES if measure.column in table.columns]
