"""What each step of FrameQuant brings: clip, frame, feedback, damping, order of columns, sides, data, seeds.

    python experiments/ablations.py --quick
    python experiments/ablations.py --model timm/vit_base_patch16_224 --imagenet val/ --calibration train/ --only clip

All else stays as in the base: two bits, redundancy 1.125 on the input side, 2σ, damping 0.01, the paper's rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import Bench, Record, Row, benches, parse, parse_row, parser, quality_column, shared, spread

from framequant.errors import FrameQuantError
from framequant.report.results import Plot

BASE = "framequant-paper:two_sided=false,redundancy=1.125"
NONE = "gptq:zero_point=float"
CLIPS = (1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
SEEDS = 5
#: Lines that a quick run leaves out.
NOT_QUICK = {"frame space, clamped first", "nearest", "r = 1", "no frame", "r = 1.2", "r = 1.3"}
#: Redundancies on one side or both; a quick run has those that the tables measure.
SIDES = (1.0625, 1.1, 1.125, 1.25)


def settings(quick: bool) -> Iterator[tuple[str, str, str | float, str]]:
    """Ablation, line of its plot, value, and settings of every row."""
    for clip in CLIPS[:: 2 if quick else 1]:
        yield "clip", "weight space", clip, f"{NONE},grid=sigma_clip,clip_sigmas={clip}"
        yield "clip", "frame space", clip, f"{BASE},clip_sigmas={clip}"
        yield "clip", "frame space, clamped first", clip, f"{BASE},clip_sigmas={clip},clip_coefficients=true"
    yield "no clip", "weight space", "min–max", NONE
    yield "no clip", "frame space", "min–max", f"{BASE},grid=min_max"
    for name, changes in (
        ("nothing", f"{NONE},grid=sigma_clip,clip_sigmas=2.0"),
        ("Hadamard", "quip:per_tensor_scale=false,zero_point=float,clip_sigmas=2.0"),
        ("frame, r = 1", "framequant-paper:two_sided=false,redundancy=1.0"),
        ("frame, r = 1.125", BASE),
    ):
        yield "transform", "error feedback", name, changes
        yield "transform", "nearest", name, f"{changes},rounding=nearest"
    for damping in (1e-4, 1e-3, 1e-2, 1e-1)[2 if quick else 0 :]:
        yield "damping", "r = 1.125", damping, f"{BASE},damping={damping}"
        yield "damping", "r = 1", damping, f"framequant-paper:redundancy=1.0,damping={damping}"
    for order in ("natural", "descending"):
        yield "order", "r = 1.125", order, f"{BASE},column_order={order}"
        yield "order", "no frame", order, f"{NONE},grid=sigma_clip,column_order={order}"
    for order in ("natural", "spread"):
        for r in (1.2, 1.3):
            yield (
                "order",
                f"r = {r}",
                order,
                f"framequant-paper:two_sided=false,redundancy={r},column_order={order}",
            )
    for r in SIDES[1::2] if quick else SIDES:
        yield "sides", "input", r, f"framequant-paper:two_sided=false,redundancy={r}"
        yield "sides", "both", r, f"framequant-paper:two_sided=true,redundancy={r}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--only", action="append", help="clip, no clip, transform, damping, order, sides, samples, seeds"
    )
    args = parse(options, __file__, argv)
    record = Record(args, "ablations")
    default = [str(shared() / "models" / "deit_tiny_patch16_224")]
    for bench in benches(args, record, default if args.quick else ["smollm2", *default]):
        for name, line, value, row in settings(args.quick):
            if (not args.only or name in args.only) and not (args.quick and line in NOT_QUICK):
                add(record, bench, name, line, value, row)
        if not args.only or "samples" in args.only:
            add_samples(record, bench, (8, 16, 32) if args.quick else (8, 16, 32, 64, 128, 256))
        if not args.only or "seeds" in args.only:
            add_seeds(record, bench, 3 if args.quick else SEEDS)
    describe(record)


def add(
    record: Record,
    bench: Bench,
    name: str,
    line: str,
    value: str | float,
    row: str,
    samples: int | None = None,
) -> Row:
    known = {"model": bench.name, "ablation": name, "line": line, "value": value, "settings": row}
    return record.attempt(lambda: bench.row(parse_row(row)[0], samples), **known)


def add_samples(record: Record, bench: Bench, counts: Sequence[int]) -> None:
    """Numbers of calibration samples; all there are instead of more."""
    try:
        most = bench.at_hand()
    except FrameQuantError:  # every row says why
        most = max(counts)
    for count in dict.fromkeys(min(count, most) for count in counts):
        add(record, bench, "samples", "r = 1.125", count, BASE, count)


def add_seeds(record: Record, bench: Bench, count: int) -> None:
    """Seeds of the random signs, and their mean and spread."""
    column = bench.quality()[0]
    found = [add(record, bench, "seeds", "r = 1.125", seed, f"{BASE},seed={seed}") for seed in range(count)]
    values = [row[column] for row in found if column in row]
    if len(values) > 1:
        mean, deviation = spread(values)
        note = f"mean {mean:.4g} ± {deviation:.2g} over {len(values)} seeds"
        record.add(model=bench.name, ablation="seeds", line="mean", value="all", note=note)


def describe(record: Record) -> None:
    plots = []
    for model in dict.fromkeys(row["model"] for row in record.table if "ablation" in row):
        rows = [row for row in record.table if row.get("model") == model]
        column = quality_column(rows)
        for name in dict.fromkeys(row["ablation"] for row in rows if column and column in row):
            words = name in ("transform", "order", "no clip", "seeds")
            where = {"model": model, "ablation": name}
            title = f"{name}, {model}"
            plots.append(
                Plot(
                    title, column, "value", "line", where, "bars" if words else "lines",
                    log_x=name in ("damping", "samples"), log_y=column == "perplexity", x_title=name,
                )
            )  # fmt: skip
    record.plots(
        "Ablations", "One step of the method changed at a time; measured bits are in the table.", plots
    )


if __name__ == "__main__":
    main()
