"""The linear as ``FrameLinear`` runs it on a GPU, transforms included, against fp16 cuBLAS.

    PYTHONPATH=src:. python benchmarks/kernel_linear.py --csv $OUT/linear.csv       # about 60 s on an H100

Random codes and inputs; the operators of ``framequant.kernels.triton_ops`` in a CUDA graph over enough copies of the
codes to make them cold; medians. Each result is compared with the same linear in plain torch, in float32.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kernel_cases import COLD, DEVICE, SCALAR, TRELLIS, Case, graph_us
from measure import commit

from framequant.kernels import reference, triton_linear, triton_ops

SHAPES = ((4096, 4096), (11008, 4096), (22016, 4096), (28672, 8192))
CODES = {"scalar": (SCALAR, 1.125), "trellis": (TRELLIS, 1.0)}
Launch = dict[str, Any]  # names in triton_ops and what they are for the while
TILES = {
    "scalar": ((32, 128, 8, 4, 2), (64, 128, 8, 3, 4), (128, 128, 8, 3, 4)),
    "trellis": ((64, 32, 8, 2, 4), (64, 32, 8, 3, 4), (32, 32, 8, 3, 2)),
}


def launches(code: str, shape: tuple[int, int], tokens: int) -> list[tuple[str, Launch]]:
    """The default and what is tried beside it."""
    found: list[tuple[str, Launch]] = [("default", {})]
    if tokens == 1:
        for one in TILES[code]:
            for programs in (300, 512, 1100):
                name = f"{'x'.join(map(str, one))} {programs}"
                found.append((name, {"tile": lambda *_, one=one: one, "PROGRAMS": programs}))
    else:
        found.append(("vector", {"VECTOR_TOKENS": tokens}))
        found.append(("tiled", {"VECTOR_TOKENS": 0}))
    return found


@contextmanager
def launched(how: Launch) -> Iterator[None]:
    before = {name: getattr(triton_ops, name) for name in how}
    for name, value in how.items():
        setattr(triton_ops, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(triton_ops, name, value)


def make(code: str, shape: tuple[int, int], cold: float) -> tuple[Case, list[triton_linear.TritonPlan]]:
    case = Case(shape, CODES[code][0], CODES[code][1], cold=cold, as_bytes=code == "scalar")
    plans = [triton_linear.TritonPlan(case.spec, case.layout, words, case.scales, case.into, case.out, None)
             for words in case.words]  # fmt: skip
    return case, plans


def jobs() -> Iterator[tuple[str, tuple[int, int], int]]:
    for shape in SHAPES:
        for code in CODES:
            large = shape in SHAPES[2:]
            for tokens in (1, 16) if large and code == "trellis" else (1, 4, 16, 64) if large else (1,):
                yield code, shape, tokens


def compile_part(part: str) -> None:
    """Launch a share of what will be timed, each kernel once."""
    index, count = map(int, part.split("/"))
    for code, shape, tokens in list(jobs())[index::count]:
        plan = make(code, shape, 1.0)[1][0]
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
        for _, how in launches(code, shape, tokens):
            with launched(how):
                triton_linear.linear(plan, x)


def workers() -> None:
    start, count = time.time(), max(2, min(os.cpu_count() or 2, len(list(jobs()))))
    args = [sys.executable, __file__, "--worker"]
    for worker in [subprocess.Popen([*args, f"{i}/{count}"]) for i in range(count)]:
        worker.wait()
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


def error(case: Case, plan: triton_linear.TritonPlan, x: torch.Tensor) -> tuple[float, float]:
    """Relative errors against float64 products of float32 transforms: of the linear and of torch in halves."""
    tensors = {"packed_codes": case.packed[0], "scales": case.scales}

    def plain(dtype: torch.dtype) -> torch.Tensor:
        z = reference.analysis(case.frames[0], x.to(dtype))
        return reference.synthesis(case.frames[1], reference.product(z, case.spec, tensors)).double()

    exact = plain(torch.float64)
    norm = exact.norm()
    mine = triton_linear.linear(plan, x).double()
    return float((mine - exact).norm() / norm), float((plain(torch.float16) - exact).norm() / norm)


class Table:
    """Prints rows as they come and keeps them."""

    def __init__(self) -> None:
        self.rows: list[tuple[object, ...]] = []

    def add(
        self, shape: tuple[int, int], tokens: int, code: str, what: str, run: Callable[[], float]
    ) -> float:
        try:
            value = run()
        except Exception as failure:
            print(f"{shape} {tokens} {code} {what} !! {type(failure).__name__}: {str(failure)[:120]!r}")
            value = float("nan")
        self.rows.append((f"{shape[0]}x{shape[1]}", tokens, code, what, round(value, 2)))
        return value


def measure(table: Table, code: str, shape: tuple[int, int], tokens: int, base: float) -> None:
    case, plans = make(code, shape, COLD)
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
    found = []
    for name, how in launches(code, shape, tokens):
        with launched(how):
            runs = [lambda p=plan: triton_linear.linear(p, x) for plan in plans]
            us = table.add(shape, tokens, code, name, lambda r=runs: graph_us(r))
            splits = triton_ops.split(
                code == "trellis", plans[0].spec.coefficient_shape[0], plans[0].count, tokens
            )
            found.append((us if us == us else 1e9, name, splits[0]))
    default, best = found[0][0], sorted(found)[:3]
    mine, torchs = error(case, plans[0], x)
    mark = "" if mine <= 2 * torchs else " !!"
    others = ", ".join(f"{us:.2f} {name} /{n}" for us, name, n in best)
    print(f"{shape} {tokens:3d} {code:8} {default:7.2f} us {base / default:5.2f}x cuBLAS {base:.2f}; "
          f"error {mine:.1e}, torch {torchs:.1e}{mark}; best {others}", flush=True)  # fmt: skip
    if tokens == 1 or tokens == 16:
        parts(table, plans, shape, tokens, code, x)


def parts(table: Table, plans: list[triton_linear.TritonPlan], shape: tuple[int, int], tokens: int, code: str,
          x: torch.Tensor) -> None:  # fmt: skip
    """The three operators one by one."""
    plan, ops = plans[0], triton_ops
    into, out = plan.into, plan.out

    def first() -> tuple[torch.Tensor, ...]:
        return ops.analysis(x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                            plan.interleave, plan.count, not plan.layout.trellis)  # fmt: skip

    z, unit, sums = first()

    def middle(p: triton_linear.TritonPlan) -> torch.Tensor:
        return ops.product(
            p.words, z, sums, p.scales, p.spec.coefficient_shape[0], p.numbers, p.layout.factor
        )

    u = middle(plan)

    def last() -> torch.Tensor:
        return ops.synthesis(u, unit, out.signs, list(out.matrices), [*out.sizes, *out.padded], out.norm, shape[0],
                             None, x.dtype)  # fmt: skip

    a = table.add(shape, tokens, code, "analysis alone", lambda: graph_us([first] * 40))
    p = table.add(
        shape, tokens, code, "product alone", lambda: graph_us([lambda q=q: middle(q) for q in plans])
    )
    s = table.add(shape, tokens, code, "synthesis alone", lambda: graph_us([last] * 40))
    print(f"      alone: analysis {a:.2f}, product {p:.2f}, synthesis {s:.2f} us, {len(u)} parts", flush=True)


def cublas(table: Table, shape: tuple[int, int], tokens: int) -> float:
    copies = max(1, min(24, -(-int(COLD) // (2 * shape[0] * shape[1]))))
    weights = [torch.randn(*shape, device=DEVICE, dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
    runs = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights] * max(1, 8 // copies)
    return table.add(shape, tokens, "fp16", "cuBLAS", lambda: graph_us(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.worker:
        compile_part(arguments.worker)
        return
    begin, table, bases = time.time(), Table(), {}
    workers()
    for code, shape, tokens in jobs():
        if (shape, tokens) not in bases:
            bases[shape, tokens] = cublas(table, shape, tokens)
        measure(table, code, shape, tokens, bases[shape, tokens])
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {commit()}, {time.time() - begin:.0f} s")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("shape", "tokens", "code", "variant", "microseconds", "device", "commit"))
            writer.writerows((*row, device, commit()) for row in table.rows)


if __name__ == "__main__":
    main()
