"""Is the product right, whatever the way it is launched? Every way against float64; prints those that are wrong.

    PYTHONPATH=src:. python benchmarks/kernel_bisect.py          # below 40 s on an H100

K in 1024 ... 11008 times splits, stages, warps, with and without early starts; scalar codes by halves and by bytes,
trellis codes. Spans are also taken that are no multiple of the step. Without a GPU it goes through Triton's
interpreter (TRITON_INTERPRET=1) on fewer rows.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import torch
from kernel_cases import DEVICE, SCALAR, TRELLIS, Case

SIZES = (1024, 2048, 4096, 8192, 11008)
SPLITS = (1, 3, 4)
KINDS = {"bytes": (SCALAR, True, 128), "halves": (SCALAR, False, 64), "trellis": (TRELLIS, False, 32)}
LIMIT = 1e-4  # half of what rounding a result to a half costs
GPU = DEVICE == "cuda"


def modes() -> list[tuple[int, int, bool]]:
    """Stages, warps, early starts."""
    return list(itertools.product((2, 4), (4, 8), (False, True))) if GPU else [(2, 4, False)]


def check(kind: str, size: int, modes_: list[tuple[int, int, bool]]) -> tuple[int, list[str]]:
    code, as_bytes, step = KINDS[kind]
    case = Case((512 if GPU else 64, size), code, cold=1.0, as_bytes=as_bytes)
    wrong, done = [], 0
    for tokens in (1, 3) if GPU else (1,):
        case.tensors(tokens, 1)
        case.transform(True)
        x, z, sums = case.x, case.z, case.sums
        exact = case.coefficients() @ case.matrix().T
        for splits, (stages, warps, pdl) in itertools.product(SPLITS, modes_):
            config = (64, step, 8 if GPU or as_bytes else 16, stages, warps)
            share = -(-case.count // splits)
            for span in {share, -(-share // step) * step}:
                case.tensors(tokens, -(-case.count // span))
                case.x, case.z, case.sums = x, z, sums
                case.product(0, config, len(case.u), span, pdl=pdl)
                error = float((case.u.double().sum(0) - exact).norm() / exact.norm())
                done += 1
                if not error < LIMIT:
                    wrong.append(f"{kind} K {size} tokens {tokens} splits {len(case.u)} span {span} stages {stages} "
                                 f"warps {warps} early {pdl}: {error:.1e}")  # fmt: skip
    return done, wrong


def main() -> None:
    begin = time.time()
    if len(sys.argv) > 1:  # a worker: only to compile
        for size in (SIZES[0], SIZES[-1]):
            check(sys.argv[1], size, [modes()[int(sys.argv[2])]])
        return
    if GPU:
        jobs = [[sys.executable, __file__, kind, str(i)] for kind in KINDS for i in range(len(modes()))]
        for wave in (jobs[:12], jobs[12:]):
            started = [
                subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for job in wave
            ]
            for worker in started:
                worker.wait()
        print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    torch.manual_seed(0)
    for kind, size in itertools.product(KINDS, SIZES):
        try:
            done, wrong = check(kind, size, modes())
            print(
                f"{kind} K {size}: {done - len(wrong)} of {done} right, {time.time() - begin:.0f} s",
                flush=True,
            )
            print(*wrong[:5], sep="\n", end="\n" if wrong else "")
        except Exception as error:
            print(f"{kind} K {size} !! {type(error).__name__}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
