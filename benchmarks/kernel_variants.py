"""Which tile sizes, splits and launch modes are fast: every variant of the inference kernels, one table each.

    python benchmarks/kernel_variants.py --csv $OUT/variants.csv            # about two minutes on an H100
    python benchmarks/kernel_variants.py --sections linear                  # one table

Codes and inputs are random. Each figure is the median of several replays of a CUDA graph that runs through
buffers of more than twice the L2 cache, so codes are cold; cuBLAS is timed alike. Workers compile the variants
in parallel first. A variant that fails is a row, not the end.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import commit

from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.frames import build_frame, choose_frame
from framequant.kernels.product_triton import dequantize, product
from framequant.kernels.transform_plan import transform_plan
from framequant.kernels.transform_triton import transform
from framequant.kernels.words import to_words, word_layout
from framequant.spec import LinearSpec

SHAPES = ((4096, 4096), (11008, 4096), (22016, 4096), (28672, 8192), (4096, 11008), (8192, 28672))
SCALAR = GridSpec("sigma_clip", 4, "symmetric")
TRELLIS = TrellisSpec(12, (2,))
COLD = 160e6  # bytes of codes to run through
KEYS = ("BR", "BK", "BN", "STAGES", "warps")
ONE = ((64, 64, 8, 4, 4), (64, 128, 8, 3, 4), (64, 64, 8, 6, 4), (128, 64, 8, 4, 4), (128, 64, 8, 4, 8),
       (32, 64, 8, 4, 2), (32, 128, 8, 3, 2), (16, 64, 8, 4, 1), (16, 128, 8, 3, 1), (16, 256, 8, 2, 1))  # fmt: skip
FEW = ((64, 64, 16, 3, 4), (64, 64, 16, 4, 4), (64, 128, 16, 2, 4), (128, 64, 16, 3, 4), (128, 64, 16, 3, 8),
       (32, 64, 16, 3, 2), (16, 64, 16, 3, 1), (16, 128, 16, 3, 1))  # fmt: skip
MANY = (
    (128, 32, 128, 2, 8),
    (128, 16, 256, 2, 8),
    (128, 16, 128, 3, 4),
    (128, 16, 128, 3, 8),
    (64, 16, 256, 2, 4),
)
ONE_T = ((64, 32, 8, 3, 4), (64, 32, 8, 2, 4), (64, 64, 8, 2, 4), (128, 32, 8, 3, 8), (32, 32, 8, 3, 2),
         (16, 32, 8, 3, 1), (16, 64, 8, 2, 1), (64, 32, 8, 3, 8))  # fmt: skip
FEW_T = ((64, 32, 16, 3, 4), (64, 32, 16, 2, 4), (128, 32, 16, 2, 8), (32, 32, 16, 3, 2))
WAVES = (1, 2, 4)  # programs for each multiprocessor, times four warps


class Case:
    """A quantized linear with random codes, as many copies as make them cold, and its launches."""

    def __init__(
        self, out_features: int, in_features: int, code: object, redundancy: float, cold: float
    ) -> None:
        torch.manual_seed(0)
        frame_in, frame_out = choose_frame(in_features, redundancy), choose_frame(out_features, 1.0)
        self.spec = LinearSpec(in_features, out_features, frame_in, frame_out, code)
        self.rows, self.cols = self.spec.coefficient_shape
        self.layout = word_layout(self.spec)
        from framequant import storage

        shape = storage.layout(self.spec)["packed_codes"][0]
        self.bytes = shape[0] * shape[1]
        self.copies = max(1, min(48, -(-int(cold) // self.bytes)))
        self.words = []
        for _ in range(self.copies):
            packed = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
            self.words.append(to_words(packed, self.spec, self.layout))
        scalar = isinstance(code, GridSpec)
        self.scales = torch.rand(self.rows if scalar else 1, device="cuda").to(
            torch.bfloat16 if scalar else torch.float32
        )
        self.into = transform_plan(build_frame(frame_in), True, "cuda")
        self.out = transform_plan(build_frame(frame_out), False, "cuda")

    def tensors(self, tokens: int, splits: int) -> None:
        self.x = torch.randn(tokens, self.spec.in_features, device="cuda", dtype=torch.float16)
        self.z = torch.zeros(
            tokens, self.layout.codes_per_word, self.layout.words, device="cuda", dtype=torch.float16
        )
        self.z.normal_()
        self.unit = torch.ones(tokens, device="cuda")
        kind = torch.float16 if tokens > 64 else torch.float32
        self.u = torch.empty(splits, tokens, self.rows, device="cuda", dtype=kind)
        self.y = torch.empty(tokens, self.spec.out_features, device="cuda", dtype=torch.float16)

    def splits(self, config: tuple[int, ...], programs: int, tokens: int) -> tuple[int, int]:
        blocks = -(-self.rows // config[0]) * -(-tokens // config[2])
        most = -(-self.layout.words // config[1])
        splits = max(1, min(most, round(programs / blocks), 16))
        span = -(-most // splits) * config[1]
        return -(-self.layout.words // span), span

    def product(self, copy: int, config: tuple[int, ...], splits: int, span: int, centred: bool = True,
                pdl: bool = False, prefetch: bool = False) -> None:  # fmt: skip
        BR, BK, BN, stages, warps = config
        lay, tokens = self.layout, self.z.shape[0]
        size = 4 if lay.trellis else 2
        ahead = min(span, lay.words) * size // 16 * 16 if prefetch else 0
        product[(-(-self.rows // BR), splits, -(-tokens // BN))](
            self.words[copy], self.z, self.scales, self.u, self.rows, lay.words, lay.stride, span, tokens, lay.factor,
            TRELLIS=lay.trellis, BITS=lay.bits, MULTIPLIER=lay.multiplier, ADDEND=lay.addend, CENTRED=centred,
            ROW_SCALES=self.scales.numel() > 1, BR=BR, BK=BK, BN=BN, STAGES=stages, PDL=pdl, PREFETCH=ahead,
            num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip

    def transform(
        self, analysis: bool, parts: int = 1, low: bool = True, pdl: bool = False, warps: int = 4
    ) -> None:
        plan = self.into if analysis else self.out
        source, target = (self.x, self.z) if analysis else (self.u, self.y)
        transform[(self.x.shape[0], plan.num_rows)](
            source, plan.signs, *plan.matrices, source, target, self.unit, self.x.shape[0], source.stride(-2),
            source.stride(0) if parts > 1 else 0, self.layout.words, plan.norm, *plan.sizes, *plan.padded, ROWS=16,
            PARTS=parts, ANALYSIS=analysis, INTERLEAVE=self.layout.codes_per_word if analysis else 1, BIAS=False,
            LOW=low, PDL=pdl, num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip

    def panel(self, copy: int, start: int, stop: int, panel: torch.Tensor, BR: int, BK: int) -> None:
        lay = self.layout
        scales = self.scales[start:stop] if self.scales.numel() > 1 else self.scales
        dequantize[(-(-(stop - start) // BR), -(-lay.words // BK))](
            self.words[copy][start:stop], scales, panel, stop - start, lay.words, lay.stride, lay.factor,
            TRELLIS=lay.trellis, BITS=lay.bits, MULTIPLIER=lay.multiplier, ADDEND=lay.addend,
            ROW_SCALES=self.scales.numel() > 1, BR=BR, BK=BK,
        )  # fmt: skip


def graph_us(launches: list[Callable[[], object]], budget: float = 0.02) -> float:
    """Median microseconds of one launch, from replays of a graph of all of them."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times, spent = [], 0.0
    graph.replay()
    while len(times) < 5 or (spent < budget and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
        spent += times[-1] * len(launches) / 1e6
    return sorted(times)[len(times) // 2]


class Table:
    def __init__(self) -> None:
        self.rows: list[tuple[object, ...]] = []

    def add(
        self, section: str, shape: str, tokens: int, what: str, run: Callable[[], float], note: str = ""
    ) -> float:
        try:
            value = run()
            print(f"{section:9} {shape:12} {tokens:5d} {what:44} {value:9.2f} us {note}", flush=True)
        except Exception as error:
            value = float("nan")
            print(
                f"{section:9} {shape:12} {tokens:5d} {what:44} !! {type(error).__name__}: {str(error)[:90]!r}",
                flush=True,
            )
        self.rows.append((section, shape, tokens, what, value))
        return value


def cublas(table: Table, tokens: int, shapes: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], float]:
    found = {}
    for o, i in shapes:
        copies = max(1, min(24, -(-int(COLD) // (2 * o * i))))
        weights = [torch.randn(o, i, device="cuda", dtype=torch.float16) for _ in range(copies)]
        x = torch.randn(tokens, i, device="cuda", dtype=torch.float16)
        runs = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights] * max(1, 8 // copies)
        found[o, i] = table.add("cublas", f"{o}x{i}", tokens, "fp16", lambda r=runs: graph_us(r))
    return found


def variants(
    table: Table, case: Case, tokens: int, configs: tuple[tuple[int, ...], ...], base: float, **more: object
):
    """Time product variants; return the fastest."""
    best, shape = (float("inf"), configs[0], 1, 0), f"{case.rows}x{case.cols}"
    for config, wave in itertools.product(configs, WAVES if tokens <= 64 else (1,)):
        splits, span = case.splits(config, wave * 132 * 4 // config[4], tokens)
        if (
            wave > 1
            and splits == 1
            and case.splits(config, (wave // 2) * 132 * 4 // config[4], tokens)[0] == 1
        ):
            continue
        case.tensors(tokens, splits)
        runs = [lambda c=c, a=(config, splits, span): case.product(c, *a, **more) for c in range(case.copies)]
        name = "t" if case.layout.trellis else "s"
        name += f" {'x'.join(map(str, config))} split {splits}{' ' + str(more) if more else ''}"
        found = table.add("product", shape, tokens, name, lambda r=runs: graph_us(r))
        if found < best[0]:
            best = (found, config, splits, span)
    rate = case.bytes / best[0] / 1e6
    print(
        f"--> {shape} {tokens}: {best[0]:.2f} us, {rate:.2f} TB/s, {base / best[0]:.2f}x cuBLAS  "
        f"{best[1]} split {best[2]}"
    )
    return best


def linear(table: Table, case: Case, tokens: int, best: tuple, base: float, full: bool = False) -> None:
    """Time the three launches of a linear in a chain, with and without early starts."""
    _, config, splits, span = best
    shape = f"{case.spec.out_features}x{case.spec.in_features}"
    case.tensors(tokens, splits)
    few = range(case.copies)

    def chain(pdl: bool, prefetch: bool, low: bool, warps: int) -> list[Callable[[], object]]:
        def one(copy: int) -> None:
            case.transform(True, low=low, pdl=pdl, warps=warps)
            case.product(copy, config, splits, span, pdl=pdl, prefetch=prefetch)
            case.transform(False, parts=splits, low=low, pdl=pdl, warps=warps)

        return [lambda c=c: one(c) for c in few]

    modes = {
        "plain": (False, False, True, 4),
        "early": (True, False, True, 4),
        "early+prefetch": (True, True, True, 4),
    }
    if full and case.rows == 4096:
        modes["early+prefetch, one half"] = (True, True, False, 4)
    if full and case.rows > 22016:
        modes["early+prefetch, 8 warps"] = (True, True, True, 8)
    for name, args in modes.items():
        us = table.add("linear", shape, tokens, name, lambda a=args: graph_us(chain(*a)))
        print(f"          {base / us:.2f}x cuBLAS")
    for warps in (4, 8) if full and case.rows > 22016 else (4,):
        table.add("linear", shape, tokens, f"analysis only, {warps} warps",
                  lambda w=warps: graph_us([lambda: case.transform(True, warps=w)] * 40))  # fmt: skip
        table.add("linear", shape, tokens, f"synthesis only, {warps} warps",
                  lambda w=warps: graph_us([lambda: case.transform(False, parts=splits, warps=w)] * 40))  # fmt: skip
    table.add("linear", shape, tokens, "product, early", lambda: graph_us(
        [lambda c=c: case.product(c, config, splits, span, pdl=True) for c in few]))  # fmt: skip
    table.add("linear", shape, tokens, "product, early+prefetch", lambda: graph_us(
        [lambda c=c: case.product(c, config, splits, span, pdl=True, prefetch=True) for c in few]))  # fmt: skip


def prompt(table: Table, case: Case, tokens: int) -> None:
    shape = f"{case.rows}x{case.cols}"
    case.tensors(tokens, 1)
    table.add("prompt", shape, tokens, "analysis", lambda: graph_us([lambda: case.transform(True)] * 3))
    table.add("prompt", shape, tokens, "synthesis", lambda: graph_us([lambda: case.transform(False)] * 3))
    codes = case.layout.codes_per_word
    for rows in (2048, 4096, 8192):
        rows = min(rows, case.rows)
        panel = torch.empty(rows, codes * case.layout.words, device="cuda", dtype=torch.float16)
        for BR, BK in ((32, 64), (16, 128), (64, 64)):
            starts = range(0, case.rows, rows)

            def fill(BR: int = BR, BK: int = BK, panel: torch.Tensor = panel, rows: int = rows) -> None:
                case.panel(0, 0, rows, panel, BR, BK)

            table.add(
                "prompt", shape, tokens, f"panel of {rows}, tile {BR}x{BK}", lambda f=fill: graph_us([f] * 5)
            )

        def both(starts: range = starts, rows: int = rows, panel: torch.Tensor = panel) -> None:
            z, u = case.z.view(tokens, -1), case.u[0]
            for start in starts:
                stop = min(start + rows, case.rows)
                part = panel[: stop - start]
                case.panel(0, start, stop, part, 32, 64)
                torch.mm(z, part.t(), out=u[:, start:stop])

        table.add("prompt", shape, tokens, f"panels of {rows} and cuBLAS", lambda f=both: graph_us([f] * 2))
        if rows == case.rows:
            break


def workers(sections: list[str]) -> None:
    start = time.time()
    count = max(2, min(12, (os.cpu_count() or 2) - 2))
    args = [sys.executable, __file__, "--sections", *sections, "--worker"]
    started = [subprocess.Popen([*args, f"{i}/{count}"], stdout=subprocess.DEVNULL) for i in range(count)]
    for worker in started:
        worker.wait()
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


def compile_part(part: str, sections: list[str]) -> None:
    index, count = map(int, part.split("/"))
    jobs: list[Callable[[], object]] = []
    for code, one, few, many in ((SCALAR, ONE, FEW, MANY), (TRELLIS, ONE_T, FEW_T, ())):
        case = Case(2048, 2048, code, 1.125, 1.0)

        def launch(config: tuple[int, ...], tokens: int, case: Case = case, **more: object) -> None:
            splits, span = case.splits(config, 64, tokens)
            case.tensors(tokens, splits)
            case.product(0, config, splits, span, **more)

        for configs, tokens in ((one, 1), (few, 16), (many, 2048)):
            jobs += [lambda c=c, t=tokens, f=launch: f(c, t) for c in configs]
    for job in jobs[index::count]:
        try:
            job()
        except Exception as error:
            print(error, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ["one", "trellis", "few", "linear", "prompt"]
    parser.add_argument("--sections", nargs="+", default=everything, choices=everything)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        compile_part(arguments.worker, arguments.sections)
        return
    table, begin = Table(), time.time()
    workers(arguments.sections)
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    us = table.add(
        "copy", "1 GiB", 0, "device to device", lambda: graph_us([lambda: target.copy_(source)] * 4)
    )
    print(f"copy bandwidth, bytes read and written: {2 * (1 << 30) / us / 1e6:.2f} TB/s")
    del source, target
    tiny = torch.zeros(32, device="cuda")
    table.add(
        "copy",
        "tiny",
        0,
        "fill of 32 numbers: the floor of a launch",
        lambda: graph_us([lambda: tiny.fill_(1)] * 50),
    )
    dense = {m: cublas(table, m, SHAPES if m == 1 else SHAPES[:4]) for m in (1, 16, 2048)}
    main_shapes = (SHAPES[0], SHAPES[2], SHAPES[3])
    sections = arguments.sections
    if "one" in sections or "linear" in sections:
        for shape in SHAPES:
            case = Case(*shape, SCALAR, 1.125, COLD)
            best = variants(table, case, 1, ONE if shape in main_shapes else ONE[:6:2], dense[1][shape])
            if shape in main_shapes:
                variants(table, case, 1, (best[1],), dense[1][shape], centred=False)
            if "linear" in sections:
                linear(table, case, 1, best, dense[1][shape], full=shape in main_shapes)
            if "few" in sections and shape in main_shapes:
                best = variants(table, case, 16, FEW, dense[16][shape])
                linear(table, case, 16, best, dense[16][shape])
            del case
    if "prompt" in sections:
        for shape in (SHAPES[0], SHAPES[1]):
            case = Case(*shape, SCALAR, 1.125, 1.0)
            prompt(table, case, 2048)
            variants(table, case, 2048, MANY, dense[2048][shape])
            del case
    if "trellis" in sections:
        for shape in main_shapes:
            case = Case(*shape, TRELLIS, 1.0, COLD)
            best = variants(table, case, 1, ONE_T, dense[1][shape])
            linear(table, case, 1, best, dense[1][shape], full=shape in main_shapes)
            if "few" in sections and shape is not SHAPES[0]:
                variants(table, case, 16, FEW_T, dense[16][shape])
            del case
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
