"""One-bit codes, which the paper reports as a failure, up to redundancy 2; and what else costs as many bits.

python experiments/one_bit.py --quick
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import Record, benches, parse, parse_row, parser, shared

REDUNDANCIES = (1.0, 1.25, 1.5, 2.0)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    record = Record(args, "one_bit")
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    states = ",state_bits=8" if args.quick else ""
    ratios = REDUNDANCIES[:: 3 if args.quick else 1]
    for bench in benches(args, record, [deit] if args.quick else [deit, "smollm2"]):
        record.attempt(bench.float_row, model=bench.name, method="float")
        rows = [
            (
                f"FrameQuant, input side:1 bit, r = {r:g}",
                f"framequant-paper:bits=1,two_sided=false,redundancy={r}",
            )
            for r in ratios
        ]
        rows += [
            (f"framequant-scalar:1 bit, r = {r:g}", f"framequant-scalar:bits=1,redundancy={r}")
            for r in (ratios[-1:] if args.quick else ratios)
        ]
        rows += [
            (f"framequant (trellis):{b} bits", f"framequant:bits={b:g}{states}")
            for b in ((1.5, 2.0) if args.quick else (1.25, 1.5, 2.0))
        ]
        rows += [("FrameQuant, input side:2 bit, r = 1", "framequant-paper:two_sided=false,redundancy=1.0")]
        for method, settings in rows:
            known = {"model": bench.name, "method": method, "settings": settings}
            record.attempt(lambda b=bench, s=settings: b.row(parse_row(s)[0]), **known)
    text = "One bit a coefficient, as it comes out; two-bit and trellis codes of as many measured bits beside it."
    record.plots("One bit", text)


if __name__ == "__main__":
    main()
