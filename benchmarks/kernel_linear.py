"""The linear as ``FrameLinear`` runs it on a GPU, transforms included, against fp16 cuBLAS.

    PYTHONPATH=src:. python benchmarks/kernel_linear.py --csv $OUT/linear.csv
    PYTHONPATH=src:. python benchmarks/kernel_linear.py --tokens 128 512 2048 --shapes 0 1 3        # prompts alone
    PYTHONPATH=src:. python benchmarks/kernel_linear.py --tokens 1 --codes trellis trellis2.25      # rates of a trellis
    PYTHONPATH=src:. python benchmarks/kernel_linear.py --tokens 1 16 2048 --codes scalar "scalar local"

Random codes and inputs; the operators of ``framequant.kernels.triton_ops`` in a CUDA graph over enough copies of the
codes to make them cold; medians. Each result is compared with the same linear in plain torch, in float32. "local": with
an output frame in blocks of rows, so that the product ends with the outputs.
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
from kernel_cases import COLD, DEVICE, PAIRS, SCALAR, TRELLIS, Case, graph_us, graphs_us
from measure import commit

from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.kernels import (
    block_ops,
    block_prompt_ops,
    lane_ops,
    launches,
    prompt_ops,
    reference,
    triton_linear,
    triton_ops,
)
from framequant.kernels.block_plan import BlockPlan
from framequant.kernels.launches import FoldTile, PanelTile, Tile

SHAPES = ((4096, 4096), (11008, 4096), (22016, 4096), (28672, 8192), (4096, 11008), (12288, 4096))
BLOCK = 32  # rows of a local output frame
RATES = (1, 1.5, 2.25, 2.5, 3, 4)
CODES: dict[str, tuple[GridSpec | TrellisSpec, float, int]] = {
    "scalar": (SCALAR, 1.125, 0),
    "trellis": (TRELLIS, 1.0, 0),
    "scalar local": (SCALAR, 1.125, BLOCK),
    "trellis local": (TRELLIS, 1.0, BLOCK),
    "pairs local": (PAIRS, 1.0, BLOCK),
    "trellis2.25 local": (TrellisSpec(12, rate_pattern(2.25)), 1.0, BLOCK),
}
CODES |= {f"levels{n}": (GridSpec("uniform", n, "symmetric"), 1.125, 0) for n in (5, 8)}
CODES |= {f"trellis{rate}": (TrellisSpec(12, rate_pattern(rate)), 1.0, 0) for rate in RATES}
LANES = (
    (8, 1, 3, 1),
    (8, 1, 3, 0.5),
    (8, 2, 5, 1),
    (8, 1, 5, 1),
    (8, 1, 7, 1),
    (8, 2, 3, 2),
    (8, 1, 2, 2),
    (8, 2, 2, 2),
)
PARTS_OF_PROMPT = 2048  # tokens of the prompt whose operators are timed one by one, and with other launches
Patch = dict[tuple[Any, str], Any]  # module, name and value for the while
Found = tuple[str, Patch]


def fixed(value: object) -> Callable[..., object]:
    return lambda *_: value


def tiles(name: str, *found: Tile) -> list[tuple[str, dict[tuple[Any, str], Any]]]:
    return [("x".join(map(str, tile)), {(launches, name): fixed(tile)}) for tile in found]


def local(code: str, shape: tuple[int, int], tokens: int) -> list[Found]:
    """Several tiles of a product that ends with outputs: warps that share out the columns, codes held."""
    few = shape[0] <= launches.FEW_ROWS
    if code.startswith("scalar") and tokens <= launches.BYTE_TOKENS:
        held = 9 if few else 4
        return tiles(
            "block_byte_tile",
            *(Tile(BLOCK, 32, 8, 3, 8, 0, held=count, groups=8) for count in (1, 3, 9)),
            *(Tile(BLOCK, 32, 8, 4, 4, 0, held=count, groups=4) for count in (1, held)),
            Tile(BLOCK, 64, 8, 3, 4, 0, held=1, groups=4),
        )
    columns = 8 if code.startswith("trellis") and tokens <= 8 else 16
    if tokens > 16:
        return []
    return tiles(
        "block_half_tile",
        Tile(BLOCK, 16, columns, 2, 8, 0, groups=8),
        *([Tile(BLOCK, 16, columns, 2, 16, 0, groups=16)] if columns == 8 else []),
        Tile(BLOCK, 16, columns, 2 if columns == 8 else 3, 4, 0, groups=4),
        Tile(BLOCK, 16, columns, 3, 8, 0, groups=8),
    )


def one_token(code: str, shape: tuple[int, int]) -> list[Found]:
    """Several tiles of the product."""
    if code.startswith("levels"):
        return tiles("packed_tile", Tile(64, 32, 8, 2, 4, 1024), Tile(32, 32, 8, 2, 2, 1024))
    if code != "scalar":
        return tiles(
            "half_tile", Tile(64, 32, 8, 2, 4, 1100), Tile(64, 32, 8, 3, 4, 1100), Tile(32, 32, 8, 3, 2, 1100)
        )
    if shape[0] <= 8192:
        return tiles("byte_tile", Tile(32, 128, 8, 4, 2, 512, 3), Tile(32, 128, 8, 4, 2, 300, 1))
    return tiles(
        "byte_tile",
        Tile(128, 128, 8, 3, 4, 512, 1),
        Tile(64, 128, 8, 3, 4, 1024, 1),
        Tile(32, 128, 8, 4, 2, 1100, 1),
        Tile(128, 128, 8, 3, 4, 512, 2),
    )


def prompt(tokens: int) -> list[Found]:
    """Panels or launches of 64 tokens; for long prompts sizes of panels, tiles of decoding, warps of transforms."""
    if tokens != PARTS_OF_PROMPT:
        looped = {False: (0.0,) * 7, True: (0.0,) * 7}
        never: dict[bool, tuple[float, ...]] = {False: (), True: ()}
        return [("panels", {(launches, "LOOPED"): never}), ("launches of 64", {(launches, "LOOPED"): looped})]
    found: list[Found] = [("panels of 64 MiB", {(launches, "ROUND_ROWS"): 1 << 20})]
    for tile in (PanelTile(16, 4, 64, 4), PanelTile(16, 2, 128, 8), PanelTile(32, 2, 64, 4)):
        found.append(("x".join(map(str, tile)), {(launches, "panel_tile"): fixed(tile)}))
    for factor in (0.5, 2):
        warps = {
            (launches, "prompt_warps"): lambda sizes, f=factor, g=launches.prompt_warps: (
                int(f * g(sizes)) or 1
            )
        }
        found.append((f"{factor} of the warps", warps))
    return found


def local_prompt(code: str) -> list[Found]:
    """Several tiles of decoding with rotated rows, and of panels that have the frame in them."""
    if CODES[code][0] == SCALAR:
        tiles = (
            FoldTile(1, 4, 128),
            FoldTile(2, 4, 168),
            FoldTile(2, 2, 128),
            FoldTile(4, 2, 128),
            FoldTile(1, 2, 128),
        )
        sizes = ((1 << 24) * n for n in (1, 2, 4))
        return [(f"panels {tile}", {(launches, "FOLD_TILE"): tile}) for tile in tiles] + [
            (f"panels of {size >> 20} MiB", {(launches, "CACHED_BYTES"): size}) for size in sizes
        ]
    found = (
        PanelTile(BLOCK, BLOCK, 32, 4),
        PanelTile(4 * BLOCK, BLOCK, 32, 4),
        PanelTile(2 * BLOCK, BLOCK, 64, 8),
    )
    return [(f"panels {tile}", {(launches, "block_panel_tile"): fixed(tile)}) for tile in found]


def lanes() -> list[Found]:
    """Other warps, chunks on their way and programs of a product through registers, and the kernels before it."""
    found: list[Found] = [("no lanes", {(launches, "LANE_TOKENS"): 0})]
    for ahead in (0, 1):

        def look(rows: int, size: int, processors: int, turns: int = ahead) -> launches.LaneLaunch:
            return launches.usual_lane_launch(rows, size, processors)._replace(ahead=turns)

        found.append((f"{ahead} turns ahead", {(launches, "lane_launch"): look}))
    for warps, groups, most, programs in LANES:

        def how(rows: int, size: int, processors: int, w: int = warps, g: int = groups, m: int = most,
                p: float = programs) -> launches.LaneLaunch:  # fmt: skip
            return launches.lane_launch_of(rows, size, int(processors * p), w, w // g, m)

        found.append(
            (
                f"{warps} warps, {groups} groups, {most} chunks, {programs} programs",
                {(launches, "lane_launch"): how, (launches, "trellis_launch"): how},
            )
        )
    return found


def variants(code: str, shape: tuple[int, int], tokens: int) -> list[Found]:
    """What is tried beside the default."""
    if tokens <= launches.LANE_TOKENS and CODES[code][0] in (SCALAR, TRELLIS, PAIRS):
        return lanes()
    if launches.BYTE_TOKENS < tokens <= launches.MOST_LANE_TOKENS and CODES[code][0] == SCALAR:
        return [("no lanes", {(launches, "MOST_LANE_TOKENS"): 0})]
    if CODES[code][2]:
        if tokens <= launches.FEW_TOKENS:
            return local(code, shape, tokens)
        return local_prompt(code) if tokens == PARTS_OF_PROMPT else []
    if tokens > launches.FEW_TOKENS:
        return prompt(tokens)
    if tokens == 1:
        return one_token(code, shape)
    if code.startswith("levels"):
        return []
    if code != "scalar":
        return tiles(
            "half_tile",
            Tile(128, 32, 16, 2, 8, 900),
            Tile(64, 32, 16, 2, 4, 700),
            Tile(64, 32, 16, 3, 4, 700),
        )
    if tokens <= launches.BYTE_TOKENS:
        return [("halves", {(launches, "BYTE_TOKENS"): 2}), ("tiled", {(launches, "VECTOR_TOKENS"): 0})]
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
    case = Case(shape, CODES[code][0], CODES[code][1], cold=cold, block=CODES[code][2])
    top = triton_linear.power_above(case.scales)
    fold = triton_linear.folded(case.frames[0], case.layout, case.out, torch.device(DEVICE))
    plans = [
        triton_linear.TritonPlan(
            case.spec, case.layout, words, case.scales, top, case.into, case.out, None, case.shifts, fold=fold
        )
        for words in case.words
    ]
    return case, plans


Job = tuple[str, tuple[int, int], int]


def jobs(shapes: list[int], codes: list[str], only: list[int]) -> Iterator[Job]:
    """Code, shape and tokens of the rows of the table; ``only`` chooses tokens."""
    for shape in (SHAPES[i] for i in shapes):
        for code in codes:
            large = shape in SHAPES[2:4]
            few = (1, 16) if large and code.startswith("trellis") else (1, 4, 16, 64) if large else (1,)
            yield from ((code, shape, tokens) for tokens in only or (*few, 512, PARTS_OF_PROMPT))


def compile_part(part: str, todo: list[Job]) -> None:
    """Launch a share of what will be timed, each kernel once."""
    found = [(job, how) for job in todo for how in (("default", {}), *variants(*job))]
    index, count = map(int, part.split("/"))
    found = found[index::count]
    made: dict[tuple[str, tuple[int, int]], triton_linear.TritonPlan] = {}
    for (code, shape, tokens), (name, how) in found:
        if (code, shape) not in made:
            made[code, shape] = make(code, shape, 1.0)[1][0]
        x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
        try:
            with patched(how):
                triton_linear.linear(made[code, shape], x)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            print(
                f"{code} {shape} {tokens} {name}: !! {type(failure).__name__} {str(failure)[:150]}",
                flush=True,
            )


def workers(limit: float) -> None:
    """Compile in parallel, for so many seconds at most."""
    start, count = time.time(), max(2, (os.cpu_count() or 2) - 1)
    args = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    running = [subprocess.Popen([*args, part]) for part in (f"{i}/{count}" for i in range(count))]
    results = []
    for worker in running:
        try:
            results.append(worker.wait(max(1.0, limit - (time.time() - start))))
        except subprocess.TimeoutExpired:
            worker.kill()
            results.append(-1)
    print(f"compiled in {time.time() - start:.0f} s, {sum(map(bool, results))} not to their end", flush=True)


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
    case, plans = make(code, shape, COLD if tokens <= launches.FEW_TOKENS else 1.0)
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
            runs = [lambda p=plan: triton_linear.linear(p, x) for plan in plans] * (
                2 if len(plans) == 1 else 1
            )
            us = table.add(shape, tokens, code, name, lambda r=runs: graph_us(r))
            found.append((us if us == us else 1e9, name))
    if not found:
        return
    default, best = found[0][0], sorted(found)[:4]
    if tokens > launches.FEW_TOKENS and DEVICE == "cuda":  # so long that a GPU changes its clocks meanwhile
        peers = cublas_runs(shape, tokens)
        usual = [lambda: triton_linear.linear(plans[0], x)] * len(peers)  # as many share a graph's start
        base, default = graphs_us([peers, usual], budget=0.3)
        table.add(shape, tokens, "fp16", f"cuBLAS, in turns with {code}", lambda: base)
        table.add(shape, tokens, code, "default, in turns with cuBLAS", lambda: default)
    mine, torchs = error(case, plans[0], x)
    mark = "" if mine <= 2 * torchs else " !!"
    others = ", ".join(f"{us:.2f} {name}" for us, name in best)
    print(f"{shape} {tokens:3d} {code:11} {default:7.2f} us {base / default:5.2f}x cuBLAS {base:.2f}; "
          f"error {mine:.1e}, torch {torchs:.1e}{mark}; best {others}", flush=True)  # fmt: skip
    if tokens == 1 or tokens == 16:
        parts(table, plans, shape, tokens, code, x)
    if tokens == PARTS_OF_PROMPT:
        prompt_parts(table, plans[0], shape, code, x)


def prompt_parts(
    table: Table, plan: triton_linear.TritonPlan, shape: tuple[int, int], code: str, x: torch.Tensor
) -> None:
    """The operators of a prompt one by one, and cuBLAS on a matrix that was decoded before."""
    into, out, rows, ops = plan.into, plan.out, plan.spec.coefficient_shape[0], prompt_ops
    if isinstance(out, BlockPlan):
        local_prompt_parts(table, plan, out, shape, code, x)
        return

    def first() -> tuple[torch.Tensor, torch.Tensor]:
        return ops.analysis(x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                            plan.spec.coefficient_shape[1])  # fmt: skip

    z, unit = first()

    def middle() -> torch.Tensor:
        return ops.product(plan.words, z, plan.scales, plan.top, rows, plan.code)

    u = middle()

    def last() -> torch.Tensor:
        return ops.synthesis(u, unit, plan.top, out.signs, list(out.matrices), [*out.sizes, *out.padded], out.norm,
                             shape[0], None, x.dtype)  # fmt: skip

    dense = torch.randn(rows, z.shape[1], device=DEVICE, dtype=torch.float16)
    found = {
        name: table.add(shape, len(x), code, f"{name} alone", lambda run=run: graph_us([run] * 2))
        for name, run in (("analysis", first), ("product", middle), ("synthesis", last),
                          ("cuBLAS on decoded rows", lambda: z @ dense.t()))
    }  # fmt: skip
    print("      alone: " + ", ".join(f"{name} {us:.1f}" for name, us in found.items()) + " us", flush=True)


def local_prompt_parts(table: Table, plan: triton_linear.TritonPlan, out: BlockPlan, shape: tuple[int, int], code: str,
                       x: torch.Tensor) -> None:  # fmt: skip
    """The two parts of a prompt's operator with a local output frame."""
    into, frame, columns = plan.prompt
    panel = block_prompt_ops.new_panel(x, columns, list(out.ends))

    def first() -> tuple[torch.Tensor, torch.Tensor]:
        return block_prompt_ops.analysis(x, into.flips, into.signs, list(into.matrices), [*into.sizes, *into.padded],
                                         into.norm, columns)  # fmt: skip

    z, unit = first()

    def middle() -> torch.Tensor:
        return block_prompt_ops.product(plan.words, z, unit, plan.scales, plan.top, out.places, out.signs, out.matrix,
                                        None, frame, list(out.ends), plan.code, plan.layout.factor, panel)  # fmt: skip

    a = table.add(shape, len(x), code, "analysis alone", lambda: graph_us([first] * 2))
    p = table.add(shape, len(x), code, "product alone", lambda: graph_us([middle] * 2))
    print(f"      alone: analysis {a:.1f}, product {p:.1f} us", flush=True)


def local_parts(table: Table, plans: list[triton_linear.TritonPlan], out: BlockPlan, shape: tuple[int, int], code: str,
                x: torch.Tensor) -> None:  # fmt: skip
    """The two operators of few tokens with a local output frame."""
    tokens = len(x)

    def first() -> tuple[torch.Tensor, ...]:
        return triton_linear._few_coefficients(plans[0], x)

    words, z, unit, sums, lanes = triton_linear._few_coefficients(plans[0], x)

    def last(p: triton_linear.TritonPlan) -> torch.Tensor:
        if lanes:
            return lane_ops.tokens(p.codes(tokens), z, sums, unit, p.scales, out.places, out.signs, None,
                                   len(out.places), out.block, p.layout.bits, x.dtype)  # fmt: skip
        return block_ops.product(p.codes(tokens), z, sums, unit, p.scales, p.shifts, p.top, out.places, out.signs,
                                 out.matrix, None, p.numbers(words), p.layout.factor, x.dtype)  # fmt: skip

    a = table.add(shape, tokens, code, "analysis alone", lambda: graph_us([first] * 40))
    p = table.add(
        shape, tokens, code, "product alone", lambda: graph_us([lambda q=q: last(q) for q in plans])
    )
    print(f"      alone: analysis {a:.2f}, product {p:.2f} us", flush=True)


def lane_parts(table: Table, plans: list[triton_linear.TritonPlan], shape: tuple[int, int], tokens: int, code: str,
               x: torch.Tensor) -> None:  # fmt: skip
    """A product through registers with its analysis, and alone, of coefficients that are there."""
    plan = plans[0]
    into, out, rows = plan.into, plan.out, plan.spec.coefficient_shape[0]
    sizes = [*into.sizes, *into.padded]
    ends = (
        (out.places, out.signs, None, rows, out.block)
        if isinstance(out, BlockPlan)
        else (None, None, None, rows, 0)
    )
    z, unit, sums = triton_ops.analysis(
        x,
        into.signs,
        list(into.matrices),
        sizes,
        into.norm,
        *plan.lane_coefficients,
        True,
        0 if plan.layout.trellis else plan.layout.bits,
    )

    def last(p: triton_linear.TritonPlan) -> tuple[torch.Tensor, torch.Tensor]:
        return lane_ops.linear(
            p.words, x, into.lane_signs, list(into.matrices), list(into.columns), sizes, list(into.block), into.norm,
            p.scales, *ends, p.lane_code, p.layout.factor, x.dtype,
        )  # fmt: skip

    def timed() -> float:
        return graph_us([lambda q=q: last(q) for q in plans])

    both = table.add(shape, tokens, code, "analysis and product", timed)
    with patched({(lane_ops, "in_one"): fixed(False), (lane_ops, "analysis"): fixed((z, unit, sums))}):
        last(plan)
        alone = table.add(shape, tokens, code, "product alone", timed)
    print(f"      analysis and product {both:.2f}, product alone {alone:.2f} us", flush=True)


def parts(table: Table, plans: list[triton_linear.TritonPlan], shape: tuple[int, int], tokens: int, code: str,
          x: torch.Tensor) -> None:  # fmt: skip
    """The three operators one by one."""
    plan, ops = plans[0], triton_ops
    into, out, words = plan.into, plan.out, plan.codes(tokens)
    if plan.takes_lanes(tokens):
        lane_parts(table, plans, shape, tokens, code, x)
        return
    if isinstance(out, BlockPlan):
        local_parts(table, plans, out, shape, code, x)
        return

    def first() -> tuple[torch.Tensor, ...]:
        return ops.analysis(x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                            plan.interleave(words), plan.count(words), words.dtype == torch.int8)  # fmt: skip

    z, unit, sums = first()

    def middle(p: triton_linear.TritonPlan) -> torch.Tensor:
        return ops.product(
            p.codes(tokens),
            z,
            sums,
            p.scales,
            p.shifts,
            p.spec.coefficient_shape[0],
            p.numbers(words),
            p.layout.factor,
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


def cublas_runs(shape: tuple[int, int], tokens: int) -> list[Callable[[], object]]:
    copies = max(1, min(24, -(-int(COLD) // (2 * shape[0] * shape[1]))))
    weights = [torch.randn(*shape, device=DEVICE, dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(tokens, shape[1], device=DEVICE, dtype=torch.float16)
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights] * max(1, 8 // copies)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--shapes", type=int, nargs="*", default=[0, 1, 2, 3], help="which of the four")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[], help="these only, for every code and shape"
    )
    parser.add_argument("--codes", nargs="*", choices=CODES, default=["scalar", "trellis"])
    parser.add_argument("--default", action="store_true", help="the default launches only")
    parser.add_argument("--limit", type=float, default=90, help="seconds for compiling")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    todo = list(jobs(arguments.shapes, arguments.codes, arguments.tokens))
    if arguments.default:
        globals()["variants"] = fixed([])
    torch.manual_seed(0)
    if arguments.worker:
        compile_part(arguments.worker, todo)
        return
    begin, bases = time.time(), {}
    workers(arguments.limit)
    table = Table(arguments.csv)
    for code, shape, tokens in todo:
        if (shape, tokens) not in bases:
            runs = cublas_runs(shape, tokens)
            bases[shape, tokens] = table.add(shape, tokens, "fp16", "cuBLAS", lambda r=runs: graph_us(r))
        measure(table, code, shape, tokens, bases[shape, tokens])
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    print(f"{table.device}, torch {torch.__version__}, {table.commit}, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
