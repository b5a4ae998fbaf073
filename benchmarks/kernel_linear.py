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

from framequant.kernels import launches, reference, triton_linear, triton_ops
from framequant.kernels.launches import Tile

SHAPES = ((4096, 4096), (11008, 4096), (22016, 4096), (28672, 8192))
CODES = {"scalar": (SCALAR, 1.125), "trellis": (TRELLIS, 1.0)}
Patch = dict[tuple[Any, str], Any]  # module, name and value for the while
Found = tuple[str, Patch]


def fixed(value: object) -> Callable[..., object]:
    return lambda *_: value


def tiles(name: str, *found: Tile) -> list[tuple[str, dict[tuple[Any, str], Any]]]:
    return [("x".join(map(str, tile)), {(launches, name): fixed(tile)}) for tile in found]


def one_token(code: str, shape: tuple[int, int]) -> list[Found]:
    """One, two and three launches, each with several tiles."""
    small = shape[0] <= 8192
    if code == "trellis":
        if shape not in SHAPES[2:]:
            return []
        product = tiles("half_tile", Tile(64, 32, 8, 3, 4, 1100), Tile(32, 32, 8, 3, 2, 1100))
        both = tiles("fused_tile", Tile(64, 32, 8, 2, 4, 1100), Tile(64, 32, 8, 3, 4, 1100),
                     Tile(32, 32, 8, 3, 2, 1100), Tile(64, 32, 8, 4, 4, 1100))  # fmt: skip
    elif small:
        product = tiles("byte_tile", Tile(32, 128, 8, 4, 2, 512, 1), Tile(32, 128, 8, 4, 2, 512, 3))
        both = tiles("fused_tile", Tile(64, 128, 8, 3, 4, 192, 3), Tile(64, 128, 8, 3, 4, 320, 2),
                     Tile(64, 128, 8, 3, 4, 128, 5), Tile(64, 128, 8, 3, 4, 576, 1), Tile(32, 128, 8, 3, 2, 384, 3),
                     Tile(128, 128, 8, 3, 4, 160, 2), Tile(128, 128, 8, 3, 8, 160, 2))  # fmt: skip
    else:
        found = (
            Tile(128, 128, 8, 3, 4, 512, 1),
            Tile(64, 128, 8, 3, 4, 1024, 1),
            Tile(32, 128, 8, 4, 2, 1100, 1),
        )
        more = (Tile(128, 128, 8, 3, 4, 512, 2), Tile(64, 128, 8, 3, 4, 1024, 2))
        product, both = tiles("byte_tile", *found), tiles("fused_tile", *found, *more)
    count = (launches, "num_launches")
    tried = [("3: " + name, patch | {count: fixed(3)}) for name, patch in product]
    name, patch = product[0]
    tried.append(("3 late: " + name, patch | {count: fixed(3), (triton_ops, "LATE"): True}))
    tried += [("2: " + name, patch | {count: fixed(2)}) for name, patch in (both[:2] if small else both)]
    if small:
        tried += [("1: " + name, patch | {count: fixed(1)}) for name, patch in both]
    return tried


def variants(code: str, shape: tuple[int, int], tokens: int) -> list[Found]:
    """What is tried beside the default."""
    if tokens == 1:
        return one_token(code, shape)
    if code == "trellis":
        return tiles(
            "half_tile",
            Tile(128, 32, 16, 2, 8, 900),
            Tile(64, 32, 16, 2, 4, 700),
            Tile(64, 32, 16, 3, 4, 700),
        )
    if tokens <= launches.BYTE_TOKENS:
        return [("halves", {(launches, "BYTE_TOKENS"): 2}), ("tiled", {(launches, "VECTOR_TOKENS"): 0})]
    if tokens <= 16:
        found = (Tile(128, 64, 16, 3, 8, 400), Tile(64, 64, 16, 3, 4, 900), Tile(64, 64, 16, 2, 4, 512))
    else:
        found = (Tile(64, 32, 64, 3, 4, 512), Tile(128, 64, 64, 2, 8, 512), Tile(256, 32, 64, 2, 8, 260))
    tile = Tile(64, 128, min(64, 4 * tokens), 3, 4, 512)
    bytes_: Patch = {(launches, "BYTE_TOKENS"): 64, (launches, "byte_tile"): fixed(tile)}
    return [*tiles("half_tile", *found), ("bytes", bytes_)]


@contextmanager
def patched(how: Patch) -> Iterator[None]:
    before = {key: getattr(*key) for key in how}
    for (module, name), value in how.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def make(code: str, shape: tuple[int, int], cold: float) -> tuple[Case, list[triton_linear.TritonPlan]]:
    case = Case(shape, CODES[code][0], CODES[code][1], cold=cold)
    plans = [triton_linear.TritonPlan(case.spec, case.layout, words, case.scales, case.into, case.out, None,
                                      {-1: torch.zeros(3, dtype=torch.int32, device=DEVICE)})
             for words in case.words]  # fmt: skip
    return case, plans


def jobs(shapes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, tuple[int, int], int]]:
    for shape in shapes:
        for code in CODES:
            large = shape in SHAPES[2:]
            for tokens in (1, 16) if large and code == "trellis" else (1, 4, 16, 64) if large else (1,):
                yield code, shape, tokens


def compile_part(part: str, shapes: tuple[tuple[int, int], ...]) -> None:
    """Launch a share of what will be timed, each kernel once; "probe": the defaults, several times."""
    found = [(job, how) for job in jobs(shapes) for how in (("default", {}), *variants(*job))]
    if part == "probe":
        found = [(job, how) for job, how in found if how[0] == "default" and job[2] == 1]
    else:
        index, count = map(int, part.split("/"))
        found = found[index::count]
    made: dict[tuple[str, tuple[int, int]], triton_linear.TritonPlan] = {}
    for (code, shape, tokens), (name, how) in found:
        if (code, shape) not in made:
            made[code, shape] = make(code, shape, 1.0)[1][0]
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
        try:
            with patched(how):
                for _ in range(20 if part == "probe" else 1):
                    triton_linear.linear(made[code, shape], x)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            print(
                f"{code} {shape} {tokens} {name}: !! {type(failure).__name__} {str(failure)[:150]}",
                flush=True,
            )
            if part == "probe":
                raise SystemExit(1) from failure


def workers(limit: float) -> bool:
    """Compile in parallel; False if the defaults did not come to their end, as when programs wait for ever."""
    start, count = time.time(), max(2, (os.cpu_count() or 2) - 1)
    args = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    running = [subprocess.Popen([*args, part]) for part in ("probe", *(f"{i}/{count}" for i in range(count)))]
    results = []
    for worker in running:
        try:
            results.append(worker.wait(max(1.0, limit - (time.time() - start))))
        except subprocess.TimeoutExpired:
            worker.kill()
            results.append(-1)
    print(f"compiled in {time.time() - start:.0f} s, {sum(map(bool, results))} not to their end", flush=True)
    return results[0] == 0


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
    """Writes rows as they come."""

    def __init__(self, path: Path | None) -> None:
        self.file = path.open("w", newline="") if path else None
        self.device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        self.commit = commit()
        self._write(("shape", "tokens", "code", "variant", "microseconds", "device", "commit"))

    def _write(self, row: tuple[object, ...]) -> None:
        if self.file:
            csv.writer(self.file, lineterminator="\n").writerow(row)
            self.file.flush()

    def add(
        self, shape: tuple[int, int], tokens: int, code: str, what: str, timed: Callable[[], float]
    ) -> float:
        try:
            value = timed()
        except Exception as failure:
            print(
                f"    {code} {shape} {tokens} {what}: !! {type(failure).__name__} {str(failure)[:150]}",
                flush=True,
            )
            value = float("nan")
        self._write((f"{shape[0]}x{shape[1]}", tokens, code, what, round(value, 2), self.device, self.commit))
        return value


def measure(table: Table, code: str, shape: tuple[int, int], tokens: int, base: float) -> None:
    case, plans = make(code, shape, COLD)
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
    found, first = [], None
    for name, how in (("default", {}), *variants(code, shape, tokens)):
        with patched(how):
            try:
                y = triton_linear.linear(plans[0], x).float()
            except Exception as failure:
                print(f"    {name}: !! {type(failure).__name__} {str(failure)[:150]}", flush=True)
                continue
            first = y if first is None else first
            off = float((y - first).norm() / first.norm())
            if not off < 2e-3:
                print(f"    {name}: !! differs from the default by {off:.1e}", flush=True)
            runs = [lambda p=plan: triton_linear.linear(p, x) for plan in plans]
            us = table.add(shape, tokens, code, name, lambda r=runs: graph_us(r))
            found.append((us if us == us else 1e9, name))
    default, best = found[0][0], sorted(found)[:4]
    mine, torchs = error(case, plans[0], x)
    mark = "" if mine <= 2 * torchs else " !!"
    others = ", ".join(f"{us:.2f} {name}" for us, name in best)
    print(f"{shape} {tokens:3d} {code:8} {default:7.2f} us {base / default:5.2f}x cuBLAS {base:.2f}; "
          f"error {mine:.1e}, torch {torchs:.1e}{mark}; best {others}", flush=True)  # fmt: skip
    if tokens == 1 or tokens == 16:
        parts(table, plans, shape, tokens, code, x)


def parts(table: Table, plans: list[triton_linear.TritonPlan], shape: tuple[int, int], tokens: int, code: str,
          x: torch.Tensor) -> None:  # fmt: skip
    """The three operators one by one."""
    plan, ops = plans[0], triton_ops
    into, out, words = plan.into, plan.out, plan.codes(tokens)

    def first() -> tuple[torch.Tensor, ...]:
        return ops.analysis(x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                            plan.interleave(words), plan.count(words), words.dtype == torch.int8)  # fmt: skip

    z, unit, sums = first()

    def middle(p: triton_linear.TritonPlan) -> torch.Tensor:
        return ops.product(
            p.codes(tokens), z, sums, p.scales, p.spec.coefficient_shape[0], p.numbers(words), p.layout.factor
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
    parser.add_argument("--shapes", type=int, nargs="*", default=[0, 1, 2, 3], help="which of the four")
    parser.add_argument("--limit", type=float, default=90, help="seconds for compiling")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    shapes = tuple(SHAPES[i] for i in arguments.shapes)
    torch.manual_seed(0)
    if arguments.worker:
        compile_part(arguments.worker, shapes)
        return
    begin, bases = time.time(), {}
    if not workers(arguments.limit):
        print("!! joint launches do not come to their end: three launches only", flush=True)
        launches.num_launches = fixed(3)
        globals()["one_token"] = lambda code, shape, whole=one_token: [
            v for v in whole(code, shape) if v[0][0] == "3"
        ]
    table = Table(arguments.csv)
    for code, shape, tokens in jobs(shapes):
        if (shape, tokens) not in bases:
            bases[shape, tokens] = cublas(table, shape, tokens)
        measure(table, code, shape, tokens, bases[shape, tokens])
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    print(f"{table.device}, torch {torch.__version__}, {table.commit}, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
