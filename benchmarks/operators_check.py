"""The Triton operators through ``FrameLinear`` on a GPU: error against float64 beside plain torch's; graphs, compiled.

    PYTHONPATH=src:. python benchmarks/operators_check.py          # or --part 0/8 ... 7/8, side by side
    PYTHONPATH=src:. python benchmarks/operators_check.py --rates 1.5 2.25 3 --levels 5 8     # these codes alone

Every line that ends in !! is a failure.
"""

from __future__ import annotations

import argparse
import os
from itertools import product

import torch
from tests.kernels.test_cpu import CODES, make_layer

from framequant.codes.grid import GridSpec
from framequant.codes.trellis import PAIR_ID, TrellisSpec, rate_pattern

os.environ.setdefault("FRAMEQUANT_TUNING", "0")  # parts run side by side

SHAPES = ((576, 192), (4096, 4096), (4096, 11008), (11008, 4096))
PAIRS = TrellisSpec(16, (4,), codebook=PAIR_ID)
RATE_SHAPES = ((576, 200), (4096, 11008))  # 200 rows end within a tile


def check(code: object, shape: tuple[int, int], tokens: int, dtype: torch.dtype, block: int) -> None:
    from framequant.kernels import triton_linear

    layer = make_layer(code, shape, (1.125, 1.0), block=block or None).to("cuda")
    x = torch.randn(tokens, shape[0], device="cuda").to(dtype)
    layer.backend = "reference"
    exact = layer(x.double())
    torchs = float((layer(x).double() - exact).norm() / exact.norm())
    layer.backend = "auto"
    error = float((layer(x).double() - exact).norm() / exact.norm())
    used = isinstance(layer._prepared[2], triton_linear.TritonPlan) and all(triton_linear._verdicts.values())
    mark = "" if used and error <= 2 * torchs else " !!"
    if isinstance(code, TrellisSpec):
        name = f"trellis {code.rate:g}" if code.per_state == 1 else f"pairs {code.rate:g}"
    else:
        name = f"scalar {code.num_levels}"
    print(
        f"{shape} {name} {tokens} {dtype} block {block}: {error:.2e}, torch {torchs:.2e}, used {used}{mark}"
    )


def graph(code: object, block: int) -> None:
    """A linear applied to its own output, so that each launch meets the counters of the one before it."""
    layer = make_layer(code, (4096, 4096), (1.125, 1.0), block=block or None).to("cuda")
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    scale = float(layer(x).norm() / x.norm())
    with torch.inference_mode():

        def run() -> torch.Tensor:
            y = x
            for _ in range(20):
                y = layer(y) / scale
            for _ in range(20):
                z = layer(x)
            return y + z

        expected = run()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = run()
        for _ in range(50):
            captured.replay()
    torch.cuda.synchronize()
    print(
        f"graph, block {block}:",
        "same bits" if torch.equal(y, expected) and y.isfinite().all() else "!! differs",
    )


def compiled(code: object, block: int) -> None:
    """A linear that was never run, through ``torch.compile`` with CUDA graphs, against the eager one."""
    for tokens in (1, 130, 260):
        layer = make_layer(code, (4096, 4096), (1.125, 1.0), block=block or None).to("cuda")
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
        with torch.no_grad():
            fast = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
            found = [fast(x).clone() for _ in range(4)]
            same = all(torch.equal(y, layer(x)) for y in found)
        print(f"compiled, block {block}, {tokens} tokens:", "same bits" if same else "!! differs", flush=True)


Job = tuple[object, tuple[int, int], int, torch.dtype, int]


def jobs(tokens: list[int], blocks: list[int], rates: list[float], levels: list[int]) -> list[Job]:
    """Codes, shapes, tokens, dtypes and blocks; of rates, every other trellis with factors of its rows."""
    if rates or levels:
        codes: list[TrellisSpec | GridSpec] = [GridSpec("uniform", count, "symmetric") for count in levels]
        codes += [TrellisSpec(12, rate_pattern(rate), row_factors=i % 2 == 0) for i, rate in enumerate(rates)]
        return list(product(codes, RATE_SHAPES, tokens, (torch.float16,), blocks))
    return list(product((CODES[0], CODES[5], PAIRS), SHAPES, tokens, (torch.bfloat16, torch.float16), blocks))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--levels", type=int, nargs="+", default=[], help="of scalar codes; likewise")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[], help="of trellises; no other codes then"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 3, 16, 64, 130, 260])
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[0], help="rows of a local output frame; 0: none"
    )
    arguments = parser.parse_args()
    index, count = map(int, arguments.part.split("/"))
    torch.manual_seed(0)
    for job in jobs(arguments.tokens, arguments.blocks, arguments.rates, arguments.levels)[index::count]:
        try:
            check(*job)
        except Exception as error:
            print(job, "!!", type(error).__name__, str(error)[:200], flush=True)
    code = TrellisSpec(12, rate_pattern(arguments.rates[0])) if arguments.rates else CODES[0]
    if index == 0:
        graph(code, arguments.blocks[-1])
    if index == count - 1:
        compiled(code, arguments.blocks[-1])


if __name__ == "__main__":
    main()
