"""Mixed precision: other settings for single modules, as in the comparison with ZeroQuant; and PTQ4ViT's steps.

    python experiments/mixed_precision.py --quick

ZeroQuant-like rows (Yao et al. 2022, arXiv 2206.01861) have group-wise round-to-nearest weights and a step per token
for activations. PTQ4ViT's rows are in ``ptq4vit.py``: with its search, without the Hessian, and without twin steps;
"least squares" are static steps of least squared error of what is rounded, with a weight step per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ptq4vit
from bench import Bench, Record, Row, benches, parse, parser, shared

import framequant as fq

ATTENTION = r"attn|attention\.(self|output)"
#: A search on fewer tokens, with fewer candidates and rounds than the paper's.
QUICK_SEARCH = {"tokens": 256, "search": 50, "rounds": 2}


def settings(quick: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, preset and changes of every row; the preset "ptq4vit" has changes of its own."""
    token = {"activation_bits": 8, "activation_space": "input"}
    for weights, rest in ((8, 8), (4, 8), (4, 4)):
        changes = {"bits": weights, "group_size": 64, **token}
        if rest != weights:
            changes["overrides"] = {ATTENTION: {"bits": rest}}
        label = f"W{weights}" if rest == weights else f"W{weights} (attention W{rest})"
        yield f"ZeroQuant-like:{label} A8", "rtn", changes
    for bits in (6, 4) if quick else (8, 6, 4):
        if not quick:
            static = {"bits": bits, "levels": 2**bits if bits != 6 else 64, "grid": "search"}
            rounded = {"activation_bits": bits, "activation_space": "input", "activation_scaling": "static"}
            yield f"least squares:W{bits} A{bits}", "rtn", {**static, **rounded}
        yield from ptq4vit_rows(bits, quick)
    frame = {"redundancy": 1.0, "activation_bits": 8}
    for attention, rest in ((2, 2), (4, 2), (2, 4))[: 2 if quick else 3]:
        overrides = {} if attention == rest else {ATTENTION: {"bits": attention}}
        label = f"W{rest}" if attention == rest else f"W{rest} (attention W{attention})"
        yield f"FrameQuant:{label} A8", "framequant-scalar", {"bits": rest, **frame, "overrides": overrides}
    extra = {ATTENTION: {"redundancy": 1.25}}
    yield "FrameQuant:r = 1, attention r = 1.25, A8", "framequant-scalar", {**frame, "overrides": extra}


def ptq4vit_rows(bits: int, quick: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """PTQ4ViT, and what it is without one of its two ideas or without both."""
    base = {"bits": bits, "activation_bits": bits, **(QUICK_SEARCH if quick else {})}
    yield f"PTQ4ViT:W{bits} A{bits}", "ptq4vit", base
    if bits == 4 or not quick:
        yield f"PTQ4ViT without twin steps:W{bits} A{bits}", "ptq4vit", {**base, "twin": False}
        yield f"PTQ4ViT without Hessian:W{bits} A{bits}", "ptq4vit", {**base, "hessian": False}
    if not quick:
        neither = {**base, "twin": False, "hessian": False}
        yield f"PTQ4ViT without both:W{bits} A{bits}", "ptq4vit", neither


def measured(bench: Bench, preset: str, changes: dict[str, Any]) -> Row:
    """One row."""
    if preset == "ptq4vit":
        return ptq4vit.row(bench, ptq4vit.Settings(**changes))
    return bench.row(fq.preset(preset, **changes))


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="rows whose name contains this, such as PTQ4ViT")
    args = parse(options, __file__, argv)
    record = Record(args, "mixed_precision")
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    for bench in benches(args, record, [deit] if args.quick else [deit, "minilm", "smollm2"]):
        if not args.only:
            record.attempt(bench.float_row, model=bench.name, method="float")
        for method, preset, changes in settings(args.quick):
            if args.only not in method or (preset == "ptq4vit" and bench.kind != "vision"):
                continue
            known = {"model": bench.name, "method": method, "settings": f"{preset} {changes}"}
            record.attempt(lambda b=bench, p=preset, c=changes: measured(b, p, c), **known)
    text = (
        "W: bits of a weight's code, A: bits of an activation. Overrides by regular expression give attention other "
        "settings than the rest. Measured bits count the weights only."
    )
    record.plots("Mixed precision", text)


if __name__ == "__main__":
    main()
