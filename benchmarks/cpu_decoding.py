"""Decoding and prompts on the CPU: SmolLM2 with quantized linears against bfloat16 transformers, in one run.

The codes are random: they cost what real codes cost, and nothing here asks what the model says. Each model is run
several times in turn with the others, and figures and ratios are medians over these rounds. A
fresh process prints tokens/s for decoding (median and best of single steps) and for a prompt, the bytes of its
tensors with what the kernels keep beside them, and its resident memory. ``cpu`` columns are processor time, which
a busy machine disturbs less than it does the clock.

    python benchmarks/cpu_decoding.py --threads 2 --csv benchmarks/cpu_decoding.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from measure import commit

KINDS = ("bfloat16", "scalar", "trellis", "reference")


def quantize_at_random(model: torch.nn.Module, kind: str) -> None:
    from framequant import storage
    from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
    from framequant.codes.trellis import TrellisSpec, rate_pattern
    from framequant.frames import choose_frame
    from framequant.layers import FrameLinear
    from framequant.spec import LinearSpec

    code = GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC)
    redundancy = 1.125
    if kind == "trellis":
        code, redundancy = TrellisSpec(12, rate_pattern(2.25)), 1.0
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or "layers" not in name:
            continue
        frames = choose_frame(module.in_features, redundancy, 1), choose_frame(module.out_features, 1.0, 2)
        spec = LinearSpec(module.in_features, module.out_features, *frames, code)
        deviation = float(module.weight.float().std())
        tensors = {
            key: torch.randint(0, 256, shape).to(dtype)
            if key == "packed_codes"
            else torch.full(shape, deviation).to(dtype)
            for key, (shape, dtype) in storage.layout(spec).items()
        }
        layer = FrameLinear.from_tensors(spec, tensors)
        layer.backend = "reference" if kind == "reference" else "auto"
        model.set_submodule(name, layer)


def num_bytes(model: torch.nn.Module) -> int:
    """Tensors of the model once each, and the arrays that prepared linears keep beside them."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        prepared = getattr(module, "_prepared", None)
        if prepared is not None and prepared[2] is not None:
            seen.update({array.ctypes.data: array.nbytes for array in prepared[2].arrays})
    return sum(seen.values())


def measure(kind: str, threads: int, prompt: int, steps: int) -> dict[str, float | str]:
    from framequant.cli.demo import MODEL
    from framequant.integrations.sources import open_model

    torch.set_num_threads(threads)
    model = open_model(MODEL, "bfloat16", "cpu").model.eval()
    if kind != "bfloat16":
        quantize_at_random(model, kind)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt))
    clocks, seconds, processor, prompts = (time.perf_counter, time.process_time), [], [], []
    with torch.inference_mode():
        for _ in range(3):
            start = [clock() for clock in clocks]
            cache = model(ids, use_cache=True).past_key_values
            prompts.append([clock() - before for clock, before in zip(clocks, start, strict=True)])
        token = ids[:, -1:]
        for step in range(steps + 3):
            start = [clock() for clock in clocks]
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            if step >= 3:
                seconds.append(clocks[0]() - start[0])
                processor.append(clocks[1]() - start[1])
    return {
        "kind": kind,
        "threads": threads,
        "decode_tokens_s": 1 / statistics.median(seconds),
        "decode_best_tokens_s": 1 / min(seconds),
        "decode_cpu_ms": 1e3 * statistics.median(processor),
        "prompt_tokens_s": prompt / min(p[0] for p in prompts),
        "prompt_cpu_ms": 1e3 * min(p[1] for p in prompts),
        "model_mb": num_bytes(model) / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load": os.getloadavg()[0],
    }


def run(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in a process of its own."""
    command = [sys.executable, __file__, "--only", kind]
    for name in ("threads", "prompt", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """Add what each row of a round is relative to its first."""
    first = rows[0]
    for row in rows:
        row["decode_ratio"] = row["decode_tokens_s"] / first["decode_tokens_s"]
        row["decode_cpu_ratio"] = first["decode_cpu_ms"] / row["decode_cpu_ms"]
        row["memory_ratio"] = row["model_mb"] / first["model_mb"]


def typical(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure."""
    return {
        key: value if isinstance(value, str) else statistics.median(row[key] for row in rows)
        for key, value in rows[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:3]))
    parser.add_argument("--csv")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.threads, options.prompt, options.steps)))
        return
    rounds = [[run(kind, options) for kind in options.kinds] for _ in range(options.rounds)]
    for rows in rounds:
        with_ratios(rows)
    rows = [
        typical([row for rows in rounds for row in rows if row["kind"] == kind]) for kind in options.kinds
    ]
    for row in rows:
        row["rounds"] = options.rounds
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "commit"])
            writer.writeheader()
            writer.writerows({**row, "commit": commit()} for row in rows)


if __name__ == "__main__":
    main()
