"""The paper's tables: method × bits for language, vision and sentence models, with measured bits per weight.

    python experiments/tables.py --quick
    python experiments/tables.py --model meta-llama/Llama-2-7b-hf --dtype bfloat16 --bits 2 --tasks 100

Rows: float, round to nearest, GPTQ with a scale per row and per group, QuIP (Hadamard, one scale of 2.4σ per matrix),
QuIP with the paper's 2σ clip per row, PTQ4ViT (vision, weights only), FrameQuant with redundancy on the input side and
on both, all rounded as the paper does; and this library's own presets at the same bits.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence

import ptq4vit
from bench import Bench, Record, Row, benches, parse, parse_row, parser

from framequant.report.results import Plot

REDUNDANCIES = (1.0, 1.05, 1.1, 1.125, 1.2, 1.25, 1.3)
FEW_REDUNDANCIES = (1.0, 1.1, 1.25)
#: Rows of a quick run: language models take most of a minute for each on two cores, sentence models ten seconds.
QUICK = {
    "language": {
        *("GPTQ:2 bit", "QuIP:2 bit", "FrameQuant, input side:2 bit, r = 1"),
        "FrameQuant, input side:2 bit, r = 1.1",
    },
    "encoder": {
        *("GPTQ:2 bit", "GPTQ groups of 64:2 bit", "QuIP:2 bit", "FrameQuant, input side:2 bit, r = 1"),
        *("FrameQuant, input side:2 bit, r = 1.1", "FrameQuant, both sides:2 bit, r = 1.1"),
    },
}
PAPER = "framequant-paper:clip_coefficients={clip},bits={bits},redundancy={r},two_sided={both}"


def rows(bits: int, redundancies: Sequence[float], own: str, search: str = "") -> Iterator[tuple[str, str]]:
    """Method and settings of every row at a width of code.

    Args:
        bits: of a code.
        redundancies: of the frames.
        own: settings of this library's own presets besides their bits.
        search: settings of PTQ4ViT's search besides its bits.
    """
    yield f"RTN:{bits} bit", f"rtn:bits={bits}"
    yield f"GPTQ:{bits} bit", f"gptq:bits={bits}"
    yield f"GPTQ groups of 64:{bits} bit", f"gptq:bits={bits},group_size=64,grid=search"
    yield f"QuIP:{bits} bit", f"quip:bits={bits}"
    yield f"QuIP + 2σ clip:{bits} bit", f"quip:bits={bits},per_tensor_scale=false,clip_sigmas=2.0"
    for r in redundancies:
        one = PAPER.format(clip="false", bits=bits, r=r, both="false")
        yield f"FrameQuant, input side:{bits} bit, r = {r:g}", one
        if r > 1:
            two = PAPER.format(clip="false", bits=bits, r=r, both="true")
            yield f"FrameQuant, both sides:{bits} bit, r = {r:g}", two
    yield f"PTQ4ViT, weights only:{bits} bit", f"ptq4vit:bits={bits}{search}"
    yield f"framequant-scalar:{bits} bit, r = 1.125", f"framequant-scalar:bits={bits}"
    yield f"framequant (trellis):{bits} bit", f"framequant:bits={bits}{own}"


def measured(bench: Bench, settings: str, tasks: int | None) -> Row:
    """One row; zero-shot tasks too if asked for."""
    if settings.startswith("ptq4vit:"):
        values = (part.split("=") for part in settings.partition(":")[2].split(","))
        return ptq4vit.row(bench, ptq4vit.Settings(**{key: int(value) for key, value in values}))
    config = parse_row(settings)[0]
    if not tasks or bench.kind != "language":
        return bench.row(config)
    model, _, row = bench.quantized(config)
    model = bench.dense(model, config)
    return {**row, **bench.evaluate(model), **bench.tasks(model, tasks)}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=int, action="append", choices=[1, 2, 3, 4, 8])
    options.add_argument("--tasks", type=int, default=0, help="items of PIQA and LAMBADA each; 0 for none")
    options.add_argument(
        "--part", type=part, default=(1, 1), help="of the rows of each width; 2/3 is the second third"
    )
    options.add_argument("--few", action="store_true", help="three redundancies for every width")
    options.add_argument("--states", type=int, help="log2 of the trellis states of our own preset")
    args = parse(options, __file__, argv)
    record = Record(args, "tables")
    own = f",state_bits={args.states or 8}" if args.quick or args.states else ""
    search = ",tokens=256" if args.quick else ""
    for bench in benches(args, record):
        known = {"model": bench.name, "method": "float"}
        record.attempt(lambda bench=bench: float_row(bench, args.tasks), **known)
        for bits in args.bits or ([2] if args.quick else [2, 3, 4]):
            few = args.quick or args.few or bits != 2
            chosen = rows(bits, FEW_REDUNDANCIES if few else REDUNDANCIES, own, search)
            kept = [row for row in chosen if belongs(row, bench, args.quick)]
            for method, settings in piece(kept, *args.part):
                known = {"model": bench.name, "method": method, "settings": settings}
                record.attempt(lambda b=bench, s=settings: measured(b, s, args.tasks), **known)
    describe(record)


def part(text: str) -> tuple[int, int]:
    """``2/3`` as two numbers."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ArgumentTypeError(f"{text!r} is no part; write 1/2 for the first half.")
    return int(number), int(count)


def piece(rows: Sequence[tuple[str, str]], number: int, count: int) -> Sequence[tuple[str, str]]:
    """The ``number``-th of ``count`` pieces, from 1."""
    return rows[len(rows) * (number - 1) // count : len(rows) * number // count]


def belongs(row: tuple[str, str], bench: Bench, quick: bool) -> bool:
    """Whether a row is one for this kind of model, and of a quick run."""
    method, settings = row
    if settings.startswith("ptq4vit") and bench.kind != "vision":
        return False
    return not quick or method in QUICK.get(bench.kind, {method})


def float_row(bench: Bench, tasks: int) -> Row:
    zero_shot = bench.tasks(bench.model, tasks) if tasks and bench.kind == "language" else {}
    return {**bench.float_row(), **zero_shot}


def describe(record: Record) -> None:
    text = (
        "Method × bits. Bits per weight are measured: every byte stored for the quantized linears. The paper's r on "
        "both sides costs r², so its rows stand further right than their names say."
    )
    plot = Plot(
        "Seconds to quantize",
        "quantize_seconds",
        "bits_per_weight",
        series="model",
        kind="points",
        log_y=True,
    )
    record.plots("Tables: method × bits", text, [plot])


if __name__ == "__main__":
    main()
