"""Which claims of the paper hold on these models, said from the tables alone: ``tables.csv``, ``one_bit.csv``.

python experiments/claims.py --out experiments/results/paper

Run the experiments first. A claim without its rows is said to be open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from bench import Record, Row, parse, parser

from framequant.report.pareto import MEASURES, Measure, Point, points
from framequant.report.results import ReportError, Table, read_table

#: Settings of the paper's rows, as ``tables.py`` names them.
ORDER = ("FrameQuant, input side:2 bit, r = 1", "QuIP:2 bit", "GPTQ:2 bit")
CLIPPED = "QuIP + 2σ clip:2 bit"


class Judge:
    """The rows of one model under one measure.

    Args:
        found: points of a table.
        measure: of quality.
    """

    def __init__(self, found: Sequence[Point], measure: Measure) -> None:
        self.by_name = {point.method: point for point in found}
        self.measure = measure
        self.sign = 1 if measure.larger_is_better else -1

    def better(self, one: Point, other: Point) -> bool:
        return self.sign * one.quality > self.sign * other.quality

    def doubt(self, pairs: Sequence[tuple[Point, Point]]) -> str:
        """A remark if two rows differ by less than twice the standard error of their difference, where it is known."""
        for one, other in pairs:
            errors = [float(p.row.get(f"{self.measure.column}_error") or 0) for p in (one, other)]
            if 0 < abs(one.quality - other.quality) < 2 * math.hypot(*errors):
                return " (within 2 standard errors)"
        return ""

    def chain(self, names: Sequence[str]) -> Row:
        """Whether each of some rows is better than the next."""
        if any(name not in self.by_name for name in names):
            return {"holds": "open", "figures": "rows are missing"}
        rows = [self.by_name[name] for name in names]
        holds = all(self.better(one, other) for one, other in pairwise(rows))
        return {"holds": yes(holds) + self.doubt(list(pairwise(rows))), "figures": "; ".join(map(show, rows))}

    def rising(self, prefix: str) -> Row:
        """Whether quality rises with redundancy, step by step from r = 1, which has no sides."""
        rows = sorted(
            (p for name, p in self.by_name.items() if name.startswith(prefix) or name == ORDER[0]),
            key=lambda p: p.bits,
        )
        if len(rows) < 2:
            return {"holds": "open", "figures": "rows are missing"}
        steps = [self.better(more, less) for less, more in pairwise(rows)]
        holds = (
            "yes"
            if all(steps)
            else "mostly"
            if self.better(rows[-1], rows[0]) and sum(steps) * 2 > len(steps)
            else "NO"
        )
        return {"holds": holds + self.doubt([(rows[0], rows[-1])]), "figures": "; ".join(map(show, rows))}

    def costs(self, prefix: str) -> Row:
        """Whether rows of a method take r times the bits of r = 1, as the paper counts, up to three in a hundred."""
        rows = [
            (p, name.rpartition("r = ")[2]) for name, p in self.by_name.items() if name.startswith(prefix)
        ]
        counted = [(p, float(r)) for p, r in rows if float(r) > 1]
        if not counted or ORDER[0] not in self.by_name:
            return {"holds": "open", "figures": "rows are missing"}
        one = self.by_name[ORDER[0]].bits
        holds = all(p.bits <= 1.03 * r * one for p, r in counted)
        figures = "; ".join(f"{p.method} {p.bits:g} bits, counted as {r:g} · {one:g}" for p, r in counted)
        return {"holds": yes(holds), "figures": figures}

    def beaten_at_equal_bits(self, prefix: str, others: Callable[[str], bool]) -> Row:
        """Whether every row of a method is better than all others of as few bits."""
        mine = [p for name, p in self.by_name.items() if name.startswith(prefix)]
        rivals = [p for name, p in self.by_name.items() if others(name) and p.bits < 15]
        if not mine or not rivals:
            return {"holds": "open", "figures": "rows are missing"}
        lost = [(p, q) for p in mine for q in rivals if q.bits <= p.bits * 1.005 and not self.better(p, q)]
        figures = "; ".join(f"{show(p)} loses to {show(q)}" for p, q in lost) or "; ".join(map(show, mine))
        return {"holds": yes(not lost) + self.doubt(lost), "figures": figures}


def yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def show(point: Point) -> str:
    return f"{point.method} {point.quality:g} at {point.bits:g} bits"


def verdicts(case: Judge) -> list[tuple[str, Row]]:
    """Every claim, and whether it holds."""
    one, both = "FrameQuant, input side:2 bit", "FrameQuant, both sides:2 bit"
    groups = case.beaten_at_equal_bits(both, lambda name: name.startswith("GPTQ groups"))
    sides = case.beaten_at_equal_bits(both, lambda name: name.startswith(one))
    front = case.beaten_at_equal_bits(one, lambda name: not name.lower().startswith("framequant"))
    own = case.beaten_at_equal_bits(one, lambda name: name.startswith("framequant"))
    return [
        ("at 2 bits FrameQuant is better than QuIP, and QuIP than GPTQ", case.chain(ORDER)),
        ("the 2σ clip makes QuIP better", case.chain((CLIPPED, "QuIP:2 bit"))),
        ("a frame (r = 1) is better than Hadamard with the same clip", case.chain((ORDER[0], CLIPPED))),
        ("quality rises with r, input side, 2 bits", case.rising(one)),
        ("quality rises with r, both sides, 2 bits", case.rising(both)),
        ("r on both sides costs bits · r on disk, as the paper counts", case.costs(both)),
        ("r on the input side alone costs bits · r on disk", case.costs(one)),
        ("two-bit FrameQuant, both sides, beats GPTQ with groups of as many measured bits", groups),
        ("redundancy on both sides is worth its bits (against input side of as many)", sides),
        ("two-bit FrameQuant, input side, beats all the paper's rivals of as many measured bits", front),
        ("no code of this library's own presets beats it at as many measured bits", own),
    ]


def judge(record: Record, table: Table) -> None:
    """Every claim on every model that the table has rows of."""
    for measure in MEASURES:
        if measure.column not in table.columns or measure.column in ("top5", "kl"):
            continue
        for model in dict.fromkeys(row.get("model", "") for row in table.rows):
            found = points(table, measure, model)
            if not found:
                continue
            for claim, result in verdicts(Judge(found, measure)):
                record.add(
                    claim=claim,
                    holds=result["holds"],
                    model=model,
                    measure=measure.column,
                    figures=result["figures"],
                )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    record = Record(args, "claims")
    source = Path(args.out) / "tables.csv"
    try:
        judge(record, read_table(source))
        if not record.rows:
            record.add(claim="all", holds="open", figures=f"{source} has no row with a quality.")
    except (ReportError, OSError) as error:
        record.add(claim="all", holds="open", figures=f"{error}. Run experiments/tables.py first.")
    text = (
        "The paper's claims against the rows of this page, at measured bits. Where one does not hold, it says NO. "
        "The paper counts bits · r; files on disk hold bits · r² where frames stand on both sides."
    )
    record.plots("Does it hold?", text)


if __name__ == "__main__":
    main()
