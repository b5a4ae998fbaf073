"""Attention of one query over a static cache: our operator beside torch's attention, rotation and writes, compiled.

    PYTHONPATH=src:.:benchmarks python benchmarks/one_query.py --csv $OUT/one_query.csv

A CUDA graph of 32 layers with a cache each, so that keys and values come from memory as in decoding; microseconds of a
layer, medians of replays, and errors against float64. On a CPU with TRITON_INTERPRET=1 it checks errors only.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from kernel_cases import graph_us
from measure import commit
from torch import Tensor
from torch.nn import functional

from framequant.kernels.one_query_ops import attention, reference, rotated

ON_GPU = torch.cuda.is_available()
DEVICE, LAYERS = ("cuda", 32) if ON_GPU else ("cpu", 1)
SHAPES = {  # heads, shared heads, numbers of a head, longest, positions held
    "Llama-2-7B, 128": (32, 32, 128, 128, 64),
    "Llama-2-7B, 2048": (32, 32, 128, 2048, 2000),
    "Llama-3-8B, 128": (32, 8, 128, 128, 64),
    "Llama-3-8B, 8192": (32, 8, 128, 8192, 8000),
    "SmolLM2, 512": (9, 3, 64, 512, 500),
}
COLUMNS = (
    "shape",
    "dtype",
    "ours_us",
    "torch_us",
    "ratio",
    "error",
    "torch_error",
    "device",
    "torch",
    "commit",
)


def apart(q, k, v, keys, values, length, scale, cos, sin, mask):  # type: ignore[no-untyped-def]
    """What a compiled block of transformers does."""
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    place = torch.arange(1, device=q.device) + length
    keys.index_copy_(2, place, k)
    values.index_copy_(2, place, v)
    y = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).contiguous()


def microseconds(layers: list[tuple[Tensor, ...]], run: Callable[..., object]) -> float:
    """Of a layer, in a graph of all of them."""
    return graph_us([partial(run, *layer) for layer in layers])


def measure(name: str, dtype: torch.dtype) -> dict[str, object]:
    heads, shared, dim, longest, held = SHAPES[name]

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE).to(dtype)

    q, k, v = random(1, heads, 1, dim), random(1, shared, 1, dim), random(1, shared, 1, dim)
    angle = torch.rand(1, 1, 1, dim // 2, device=DEVICE).repeat(1, 1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    length, scale = torch.tensor(held, device=DEVICE), dim**-0.5
    caches = [(random(1, shared, longest, dim), random(1, shared, longest, dim)) for _ in range(LAYERS)]
    start = [cache.clone() for cache in caches[0]]
    exact = reference(
        q.double(),
        k.double(),
        v.double(),
        *(c.double() for c in start),
        length,
        scale,
        cos.double(),
        sin.double(),
    )
    plain = reference(q, k, v, *(c.clone() for c in start), length, scale, cos, sin)
    ours = attention(q, k, v, *caches[0], length, scale, cos, sin)
    row: dict[str, object] = {"shape": name, "dtype": str(dtype)[6:]}
    for key, found in (("error", ours), ("torch_error", plain)):
        row[key] = f"{float((found.double() - exact).norm() / exact.norm()):.2e}"
    if ON_GPU:
        mask = (torch.arange(longest, device=DEVICE) <= held)[None, None, None]
        compiled = torch.compile(apart, dynamic=False)
        mine = microseconds([(q, k, v, *c, length, scale, cos, sin) for c in caches], attention)
        other = microseconds([(q, k, v, *c, length, scale, cos, sin, mask) for c in caches], compiled)
        row |= {"ours_us": f"{mine:.2f}", "torch_us": f"{other:.2f}", "ratio": f"{other / mine:.2f}"}
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    return row | {"device": device, "torch": torch.__version__, "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in SHAPES:
            for dtype in (torch.float16, torch.bfloat16):
                rows.append(measure(name, dtype))
                print(*(f"{key}={value}" for key, value in list(rows[-1].items())[:7]), flush=True)
                if options.csv:
                    with options.csv.open("w", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
