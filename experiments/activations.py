"""Low-bit activations with low-bit weights: rounded in frame space, or in the original space.

python experiments/activations.py --quick
python experiments/activations.py --model facebook/opt-1.3b --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import Record, benches, parse, parse_row, parser, quality_column, shared

from framequant.report.results import Plot

WEIGHTS = {
    "2 bits, r = 1.125": "framequant-scalar:refine_sweeps=0",
    "4 bits, r = 1": "framequant-scalar:bits=4,redundancy=1.0",
}
#: Weights of a quick run: a row of the ablations.
QUICK = {"2 bits, r = 1.125": "framequant-paper:two_sided=false,redundancy=1.125"}
WIDTHS = (8, 6, 4)


def widths(quick: bool, scaling: str) -> tuple[int, ...]:
    """Bits of an activation; a quick run has one width of static steps, whose fit takes half of a row's time."""
    if not quick:
        return WIDTHS
    return (4,) if scaling == "static" else (8, 4)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    record = Record(args, "activations")
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    for bench in benches(args, record, [deit] if args.quick else ["smollm2", deit]):
        for weights, settings in (QUICK if args.quick else WEIGHTS).items():
            known = {"model": bench.name, "weights": weights}
            floats = {"method": "float activations", "activation_bits": 16, "settings": settings}
            record.attempt(lambda b=bench, s=settings: b.row(parse_row(s)[0]), **known, **floats)
            for space in ("frame", "input"):
                for scaling in ("token", "static"):
                    for bits in widths(args.quick, scaling):
                        row = f"{settings},activation_bits={bits},activation_space={space},activation_scaling={scaling}"
                        place = "frame" if space == "frame" else "original"
                        step = "token" if scaling == "token" else "linear"
                        method = f"{place} space, step per {step}"
                        how = {"method": method, "activation_bits": bits, "settings": row}
                        record.attempt(lambda b=bench, s=row: b.row(parse_row(s)[0]), **known, **how)
    describe(record)


def describe(record: Record) -> None:
    plots = []
    for row in record.table:
        column = quality_column([row])
        where = {"model": row.get("model", ""), "weights": row.get("weights", "")}
        if column and not any(plot.where == where for plot in plots):
            title = f"Activations, {row.get('model')}, weights of {row['weights']}"
            plots.append(
                Plot(title, column, "activation_bits", "method", where, log_y=column == "perplexity")
            )
    text = (
        "Bits per weight are those of the weights; activations are rounded while the model runs. A static step is "
        "fitted to least squared error on calibration data."
    )
    record.plots("Activation quantization", text, plots)


if __name__ == "__main__":
    main()
