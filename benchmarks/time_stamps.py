"""When programs of one and of several tokens' linears get where: time stamps, in a copy of the kernels.

    PYTHONPATH=src:.:benchmarks python benchmarks/time_stamps.py --shape 22016 4096 --tokens 16
    PYTHONPATH=src:.:benchmarks python benchmarks/time_stamps.py --shape 4096 4096 --tokens 1

Kernels of the library have no stamps. A copy of it gets some, before the lines that ``MARKS`` names: a thread of a
program writes ``%globaltimer`` (steps of 32 ns on an H200) to memory. Linears run in a CUDA graph, one after another,
as in ``kernel_linear.py``. Printed are microseconds since the last output of the linear before: of the first program,
the median and the last one, medians of launches and replays. Stamps cost some tenths of a microsecond.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1] / "src"
PLACES, PROGRAMS = 16, 640  # of stamps of a program; programs, at most
RECENT = 60_000  # nanoseconds: what is further away is from another replay
STAMP = f"""

@triton.jit
def stamp(memory_ptr, thread, INDEX: tl.constexpr, WHO: tl.constexpr):
    now = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [thread], dtype=tl.int64, is_pure=False, pack=1)
    at = memory_ptr.to(tl.pointer_type(tl.int64)) + (tl.program_id(0) * {PLACES} + INDEX) + thread * 0
    tl.store(at, now, mask=thread == WHO)
"""
KEPT = f"""

STAMPS = []


def stamps(kernel, like):
    found = torch.empty({PROGRAMS} * {PLACES}, dtype=torch.int64, device=like.device)
    STAMPS.append((kernel, found))
    return found
"""


class Mark(NamedTuple):
    """A stamp of a kernel by one thread, before a line that begins so; indented like it, or otherwise."""

    kernel: str
    name: str
    file: str
    line: str
    thread: int = 0
    indent: int = 0


SEVERAL, ANALYSIS, ONE = "lane_tokens_triton", "lane_token_analysis_triton", "lane_product_triton"
PASSES = "lane_analysis_triton"
MARKS = (
    Mark("analysis", "start", ANALYSIS, "    loaded = load_signs("),
    Mark("analysis", "wait ended", ANALYSIS, "    x_at = x_ptr + number"),
    Mark("analysis", "end", ANALYSIS, "    tl.store(unit_ptr + number"),
    Mark("tokens", "start", SEVERAL, "    place, quarter = lane // 4, lane % 4\n    share, group"),
    Mark("tokens", "before the wait", SEVERAL, "    wait_for_previous(PDL)\n"),
    Mark("tokens", "wait ended", SEVERAL, "    for u in tl.static_range(RING - 1):"),
    Mark("tokens", "loop ended", SEVERAL, "        if SHARE == 3:\n            _finish_three"),
    Mark("tokens", "end", SEVERAL, "        else:\n            _finish(", indent=12),
    Mark(
        "tokens", "end of spare warps", SEVERAL, "        else:\n            _finish(", thread=480, indent=12
    ),
    Mark(
        "one token",
        "start",
        ONE,
        "    lane, warp = thread % 32, thread // 32\n    place, quarter = lane // 4",
    ),
    Mark("one token", "before the wait", ONE, "    wait_for_previous(PDL)\n    if ANALYSED"),
    Mark("one token", "wait ended", ONE, "    if ANALYSED:\n        copy_numbers"),
    Mark("one token", "token in shared memory", PASSES, "    number = _first_sixteen("),
    Mark("one token", "two passes", PASSES, "    squares, total = _two_sums("),
    Mark("one token", "planes written", PASSES, "    power = tl.where(finite, bits"),
    Mark("one token", "first product", ONE, "    for n in tl.range(0, turns * ROUNDS):"),
    Mark("one token", "end", ONE, "        ends = ends_next"),
)
#: Memory that only the interpreter needs becomes the stamps'; ``analyse`` is told of it.
OTHERS = (
    ("lane_ops", "        unit if COMPILED else torch.empty(_token_memory",
     "        stamps('analysis', x) if COMPILED else torch.empty(_token_memory"),
    ("lane_ops", "        unit if COMPILED else torch.empty(token_bytes",
     "        stamps('tokens', z) if COMPILED else torch.empty(token_bytes"),
    ("lane_ops", "    memory = unit if COMPILED else torch.empty(size // 4",
     "    memory = stamps('one token', x) if COMPILED else torch.empty(size // 4"),
    (PASSES, "def analyse(\n    loaded,", "def analyse(\n    memory_ptr, loaded,"),
    (ONE, "analyse(\n            loaded,", "analyse(\n            memory_ptr, loaded,"),
)  # fmt: skip


def indexed(kernel: str) -> dict[str, int]:
    """The places of a kernel's stamps."""
    return {mark.name: i for i, mark in enumerate(m for m in MARKS if m.kernel == kernel)}


def replace(path: Path, before: str, after: str) -> None:
    """Change text that a file must have."""
    text = path.read_text()
    if before not in text:
        raise ValueError(f"{path.name} has no longer {before!r}: mend MARKS in {Path(__file__).name}")
    path.write_text(text.replace(before, after, 1))


def stamped(folder: Path) -> None:
    """Write a copy of the library, with stamps, to ``folder``."""
    shutil.copytree(SOURCE / "framequant", folder / "framequant")
    kernels = folder / "framequant" / "kernels"
    for file, before, after in OTHERS:
        replace(kernels / f"{file}.py", before, after)
    for mark in MARKS:
        indent = " " * (mark.indent or len(mark.line) - len(mark.line.lstrip()))
        call = f"{indent}stamp(memory_ptr, thread, {indexed(mark.kernel)[mark.name]}, {mark.thread})\n"
        replace(kernels / f"{mark.file}.py", mark.line, call + mark.line)
    for file in (SEVERAL, ANALYSIS, ONE, PASSES):
        imports = "from framequant.kernels.lanes_triton import (\n"
        replace(kernels / f"{file}.py", imports, f"{imports}    stamp,\n")
    for file, more in (("lanes_triton", STAMP), ("lane_ops", KEPT)):
        (kernels / f"{file}.py").write_text((kernels / f"{file}.py").read_text() + more)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(22016, 4096), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--code", default="scalar local")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stamped(Path(folder))
        sys.path.insert(0, folder)
        measure(options.code, tuple(options.shape), options.tokens)


def measure(code: str, shape: tuple[int, int], tokens: int) -> None:
    """Print when programs get where; the library that is imported here is the one with stamps."""
    import torch
    from kernel_cases import COLD, captured
    from kernel_linear import make

    from framequant.kernels import lane_ops, triton_linear

    _, plans = make(code, shape, COLD)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
    lane_ops.STAMPS.clear()
    graph = captured([lambda p=plan: triton_linear.linear(p, x) for plan in plans])
    kernels = ("one token",) if tokens == 1 else ("analysis", "tokens")
    launches = lane_ops.STAMPS[-len(plans) * len(kernels) :]
    if not launches:
        raise SystemExit("This linear does not go through registers alone: no launch wrote stamps.")
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for _ in range(30):
        graph.replay()
        torch.cuda.synchronize()
        found = [(kernel, times.view(PROGRAMS, PLACES).cpu()) for kernel, times in launches]
        steps = [dict(found[i : i + len(kernels)]) for i in range(0, len(found), len(kernels))]
        for before, now in pairwise(steps[1:]):
            base = last_output(before[kernels[-1]], kernels[-1])
            for kernel, times in now.items():
                for name, index in indexed(kernel).items():
                    column = times[:, index] - base
                    some = column[column.abs() < RECENT].double().sort().values / 1e3
                    if len(some):
                        each = float(some[0]), float(some[len(some) // 2]), float(some[-1])
                        rows.setdefault((kernel, name), []).append(each)
    print("microseconds since the last output of the linear before: first, median and last program")
    for (kernel, name), values in rows.items():
        print(f"{kernel:10} {name:24}" + "".join(f"{median(v[i] for v in values):8.2f}" for i in range(3)))


def last_output(times: object, kernel: str) -> int:
    """The latest of a launch's last stamps, by its own clock: those of other replays are far earlier."""
    ends = [index for name, index in indexed(kernel).items() if name.startswith("end")]
    column = times[:, ends].flatten()  # type: ignore[index]
    start = int(times[0, indexed(kernel)["start"]])  # type: ignore[index]
    return int(column[(column - start).abs() < RECENT].max())


if __name__ == "__main__":
    main()
