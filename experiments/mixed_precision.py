"""Mixed precision: other settings for single modules, as in the comparison with ZeroQuant; and PTQ4ViT's steps.

    python experiments/mixed_precision.py --quick

ZeroQuant-like rows (Yao et al. 2022, arXiv 2206.01861) have group-wise round-to-nearest weights and a step per token
for activations; PTQ4ViT-like rows (Yuan et al. 2022, arXiv 2111.12293) static steps, twin ones after GELU. PTQ4ViT
chooses its steps by a Hessian-guided search of outputs; here they have least squared error of what they round, so
the rows stand for the grids, not for the search. Softmax outputs, which are no linear's input, stay float.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench import Record, benches, parse, parser, shared

import framequant as fq

ATTENTION = r"attn|attention\.(self|output)"
AFTER_GELU = r"mlp\.fc2|(?<!attention\.)output\.dense|fc2"


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, preset and changes of every row."""
    token = {"activation_bits": 8, "activation_space": "input"}
    for weights, rest in ((8, 8), (4, 8), (4, 4)):
        changes = {"bits": weights, "group_size": 64, **token}
        if rest != weights:
            changes["overrides"] = {ATTENTION: {"bits": rest}}
        label = f"W{weights}" if rest == weights else f"W{weights} (attention W{rest})"
        yield f"ZeroQuant-like:{label} A8", "rtn", changes
    for bits in (8, 6, 4):
        static = {"bits": bits, "grid": "search", "activation_bits": bits, "activation_space": "input"}
        twin = {AFTER_GELU: {"activation_scaling": "twin"}} if bits <= 8 else {}
        base = {**static, "levels": 2**bits if bits in (4, 8) else None, "activation_scaling": "static"}
        if bits == 6:
            base["levels"] = 64
        yield f"uniform steps:W{bits} A{bits}", "rtn", base
        yield f"PTQ4ViT-like, twin after GELU:W{bits} A{bits}", "rtn", {**base, "overrides": twin}
    frame = {"redundancy": 1.0, "activation_bits": 8}
    for attention, rest in ((2, 2), (4, 2), (2, 4)):
        overrides = {} if attention == rest else {ATTENTION: {"bits": attention}}
        label = f"W{rest}" if attention == rest else f"W{rest} (attention W{attention})"
        yield f"FrameQuant:{label} A8", "framequant-scalar", {"bits": rest, **frame, "overrides": overrides}
    extra = {ATTENTION: {"redundancy": 1.25}}
    yield "FrameQuant:r = 1, attention r = 1.25, A8", "framequant-scalar", {**frame, "overrides": extra}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    record = Record(args, "mixed_precision")
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    for bench in benches(args, record, [deit] if args.quick else [deit, "minilm", "smollm2"]):
        record.attempt(bench.float_row, model=bench.name, method="float")
        for method, preset, changes in settings():
            if bench.kind == "language" and "GELU" in method:
                continue
            known = {"model": bench.name, "method": method, "settings": f"{preset} {changes}"}
            record.attempt(lambda b=bench, p=preset, c=changes: b.row(fq.preset(p, **c)), **known)
    text = (
        "W: bits of a weight's code, A: bits of an activation. Overrides by regular expression give attention other "
        "settings than the rest. Measured bits count the weights only."
    )
    record.plots("Mixed precision", text)


if __name__ == "__main__":
    main()
