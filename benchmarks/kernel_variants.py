"""Which tile sizes, splits and launch modes are fast: variants of the inference kernels, one table for each section.

    PYTHONPATH=src:. python benchmarks/kernel_variants.py --csv $OUT/variants.csv       # about 100 s on an H100
    PYTHONPATH=src:. python benchmarks/kernel_variants.py --sections one linear

Codes and inputs are random. Each figure is the median of several replays of a CUDA graph that runs through
buffers of more than twice the L2 cache, so codes are cold; cuBLAS is timed alike. Workers compile the variants
in parallel first. A variant that fails is a row, not the end; the fastest of a table is checked against float64.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_cases import COLD, DEVICE, SCALAR, TRELLIS, Case, Config, graph_us
from measure import commit

SHAPES = ((4096, 4096), (11008, 4096), (22016, 4096), (28672, 8192))
SPLITS = (1, 2, 3, 5, 9)
# kind: code, whether as bytes, configurations for one token and for 16
KINDS: dict[str, tuple[object, bool, tuple[Config, ...], tuple[Config, ...]]] = {
    "bytes": (
        SCALAR,
        True,
        ((64, 128, 8, 4, 4), (64, 128, 8, 3, 4), (64, 128, 8, 6, 4), (64, 256, 8, 3, 4), (128, 128, 8, 3, 4),
         (128, 128, 8, 4, 8), (32, 128, 8, 4, 2), (32, 256, 8, 3, 2), (16, 128, 8, 4, 1), (16, 256, 8, 3, 1)),
        ((64, 128, 64, 3, 4), (128, 128, 64, 3, 8), (64, 128, 64, 4, 4), (128, 128, 64, 3, 4)),
    ),
    "halves": (
        SCALAR,
        False,
        ((64, 64, 8, 4, 4), (64, 128, 8, 3, 4), (32, 64, 8, 4, 2), (16, 64, 8, 4, 1)),
        ((64, 64, 16, 3, 4), (128, 64, 16, 3, 8), (64, 128, 16, 3, 4)),
    ),
    "trellis": (
        TRELLIS,
        False,
        ((64, 32, 8, 3, 4), (64, 32, 8, 2, 4), (32, 32, 8, 3, 2), (16, 32, 8, 3, 1), (128, 32, 8, 3, 8)),
        ((64, 32, 16, 3, 4), (128, 32, 16, 2, 8)),
    ),
}  # fmt: skip


class Table:
    """Prints rows as they come and keeps them for the CSV file."""

    def __init__(self) -> None:
        self.rows: list[tuple[object, ...]] = []

    def add(self, section: str, shape: str, tokens: int, what: str, run: Callable[[], float]) -> float:
        try:
            value, note = run(), ""
        except Exception as error:
            value, note = float("nan"), f"!! {type(error).__name__}: {str(error)[:90]!r}"
        if note or section != "product":
            print(f"{section:8} {shape:11} {tokens:4d} {what:36} {value:8.2f} us {note}", flush=True)
        self.rows.append((section, shape, tokens, what, round(value, 2)))
        return value


def cublas(table: Table, shape: tuple[int, int], tokens: int) -> float:
    o, i = shape
    copies = max(1, min(24, -(-int(COLD) // (2 * o * i))))
    weights = [torch.randn(o, i, device=DEVICE, dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(tokens, i, device=DEVICE, dtype=torch.float16)
    runs = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights] * max(1, 8 // copies)
    return table.add("cublas", f"{o}x{i}", tokens, "fp16", lambda: graph_us(runs))


def variants(table: Table, case: Case, kind: str, tokens: int, base: float) -> tuple[float, Config, int, int]:
    """Time product variants; print the fastest three and return the first."""
    found, shape = [], f"{case.shape[0]}x{case.shape[1]}"
    for config in KINDS[kind][2 if tokens == 1 else 3]:
        steps = -(-case.count // config[1])
        for wanted in SPLITS:
            span = -(-steps // wanted) * config[1]
            splits = -(-case.count // span)
            if splits != wanted or case.rows * splits > 64 * 4096:
                continue
            case.tensors(tokens, splits)
            runs = [lambda c=c, a=(config, splits, span): case.product(c, *a) for c in range(len(case.words))]
            name = f"{kind} {'x'.join(map(str, config))} / {splits}"
            us = table.add("product", shape, tokens, name, lambda r=runs: graph_us(r))
            found.append((us, config, splits, span))
    found.sort(key=lambda row: row[0] if row[0] == row[0] else 1e9)
    us, config, splits, span = found[0]
    case.tensors(tokens, splits)
    case.transform(True)
    case.product(0, config, splits, span)
    others = ", ".join(f"{row[0]:.2f} {'x'.join(map(str, row[1]))} / {row[2]}" for row in found[1:4])
    print(f"--> {shape} {tokens} {kind}: {us:.2f} us {'x'.join(map(str, config))} / {splits}, "
          f"{case.bytes / us / 1e6:.2f} TB/s, {base / us:.2f}x cuBLAS, error {case.product_error():.1e}; {others}",
          flush=True)  # fmt: skip
    return found[0]


MODES = {
    "plain": (False, False, 4),
    "early": (True, False, 4),
    "early, prefetch": (True, True, 4),
    "early, 8 warps": (True, False, 8),
}


def linear(table: Table, case: Case, tokens: int, best: tuple, base: float) -> None:  # type: ignore[type-arg]
    """Time the three launches of a linear in a chain, with and without early starts, and the transforms alone."""
    _, config, splits, span = best
    shape = f"{case.shape[0]}x{case.shape[1]}"
    case.tensors(tokens, splits)

    def one(copy: int, pdl: bool, prefetch: bool, warps: int) -> None:
        case.transform(True, pdl=pdl, warps=warps)
        case.product(copy, config, splits, span, pdl=pdl, prefetch=prefetch)
        case.transform(False, parts=splits, pdl=pdl, warps=warps)

    first = case.y
    for name, mode in MODES.items():
        runs = [lambda c=c, m=mode: one(c, *m) for c in range(len(case.words))]
        us = table.add("linear", shape, tokens, name, lambda r=runs: graph_us(r))
        first = case.y.clone() if name == "plain" else first
        same = "same bits as plain" if torch.equal(first, case.y) else "!! differs from plain"
        print(f"         {base / us:.2f}x cuBLAS, {same}")
    for warps in (4, 8, 16):
        for what, analysis in (("analysis", True), ("synthesis", False)):
            run = lambda a=analysis, w=warps: case.transform(a, parts=1 if a else splits, warps=w)  # noqa: E731
            table.add(
                "linear", shape, tokens, f"{what} alone, {warps} warps", lambda r=run: graph_us([r] * 40)
            )


def workers(sections: list[str]) -> None:
    start, count = time.time(), max(2, min(14, (os.cpu_count() or 2) - 2))
    args = [sys.executable, __file__, "--sections", *sections, "--worker"]
    started = [subprocess.Popen([*args, f"{i}/{count}"], stdout=subprocess.DEVNULL) for i in range(count)]
    for worker in started:
        worker.wait()
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


def compile_part(part: str, sections: list[str]) -> None:
    """Launch every kernel once on small cases."""
    index, count = map(int, part.split("/"))
    jobs: list[Callable[[], object]] = []
    small = {kind: Case((2048, 2048), row[0], cold=1.0, as_bytes=row[1]) for kind, row in KINDS.items()}

    def launch(case: Case, config: Config, tokens: int, **more: bool) -> None:
        case.tensors(tokens, 1)
        case.product(0, config, 1, -(-case.count // config[1]) * config[1], **more)

    for kind, (_, _, one, few) in KINDS.items():
        if (kind == "trellis" and "trellis" not in sections) or (kind != "trellis" and "one" not in sections):
            continue
        jobs += [lambda k=kind, c=config: launch(small[k], c, 1) for config in one]
        jobs += [lambda k=kind, c=config: launch(small[k], c, 16) for config in few if "few" in sections]

    def transforms(shape: tuple[int, int], kind: str, parts: int, pdl: bool, warps: int) -> None:
        case = Case(shape, KINDS[kind][0], cold=1.0, as_bytes=KINDS[kind][1])
        case.tensors(1, parts)
        case.transform(True, pdl=pdl, warps=warps)
        case.transform(False, parts=parts, pdl=pdl, warps=warps)

    for shape in SHAPES if "linear" in sections else ():
        for pdl, warps in ((False, 4), (True, 4), (False, 8), (True, 8), (False, 16)):
            for parts in SPLITS[: 5 if shape == SHAPES[0] else 3]:
                jobs.append(lambda s=shape, p=parts, e=pdl, w=warps: transforms(s, "bytes", p, e, w))
    for job in jobs[index::count]:
        try:
            job()
        except Exception as error:
            print(error, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ["one", "linear", "few", "trellis"]
    parser.add_argument("--sections", nargs="+", default=everything, choices=everything)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    sections = arguments.sections
    torch.manual_seed(0)
    if arguments.worker:
        compile_part(arguments.worker, sections)
        return
    table, begin = Table(), time.time()
    workers(sections)
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    us = table.add(
        "copy", "1 GiB", 0, "device to device", lambda: graph_us([lambda: target.copy_(source)] * 4)
    )
    print(f"copy bandwidth, bytes read and written: {2 * (1 << 30) / us / 1e6:.2f} TB/s")
    del source, target
    tiny = torch.zeros(32, device=DEVICE)
    table.add("copy", "tiny", 0, "floor of a launch", lambda: graph_us([lambda: tiny.fill_(1)] * 50))
    for shape in SHAPES:
        for kind in ("bytes", "halves", "trellis"):
            if ("trellis" if kind == "trellis" else "one") not in sections:
                continue
            case = Case(shape, KINDS[kind][0], 1.0 if kind == "trellis" else 1.125, as_bytes=KINDS[kind][1])
            for tokens in (1, 16) if "few" in sections and shape in SHAPES[2:] else (1,):
                base = cublas(table, shape, tokens)
                best = variants(table, case, kind, tokens, base)
                if "linear" in sections and kind == "bytes":
                    linear(table, case, tokens, best, base)
            del case
            torch.cuda.empty_cache()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {commit()}, {time.time() - begin:.0f} s"
    )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("section", "shape", "tokens", "variant", "microseconds", "device", "commit"))
            writer.writerows((*row, torch.cuda.get_device_name(), commit()) for row in table.rows)


if __name__ == "__main__":
    main()
