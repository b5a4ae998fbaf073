"""Decoding and prompts on the CPU: SmolLM2 with quantized linears against bfloat16 transformers, in one run.

The codes are random: they cost what real codes cost, and nothing here asks what the model says: scalar of two bits at
r = 1.125, a trellis of 2.25 bits, and one of two bits with two weights a state. The models take turns
of a few tokens in one process, since a machine that others use changes its speed by half within seconds. Printed are
tokens/s for decoding (median of single steps) and for a prompt, and the bytes of a model's tensors with what kernels
keep beside them. ``cpu`` columns are processor time, which includes that of threads that wait for work.

    python benchmarks/cpu_decoding.py --threads 2 --csv benchmarks/cpu_decoding.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import commit

KINDS = ("bfloat16", "scalar", "trellis", "pairs", "reference")
TOKENS_A_TURN = 4


def quantize_at_random(model: torch.nn.Module, kind: str) -> None:
    from framequant import storage
    from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
    from framequant.codes.trellis import TrellisSpec, rate_pattern
    from framequant.codes.trellis_codebook import PAIR_ID
    from framequant.frames import choose_frame
    from framequant.layers import FrameLinear
    from framequant.spec import LinearSpec

    code = GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC)
    redundancy = 1.125
    if kind == "trellis":
        code, redundancy = TrellisSpec(12, rate_pattern(2.25)), 1.0
    elif kind == "pairs":
        code, redundancy = TrellisSpec(16, (4,), codebook=PAIR_ID), 1.0
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


class Subject:
    """A model, what it has cached, and the seconds of its steps.

    Args:
        kind: one of ``KINDS``.
        prompt: tokens of the prompt.
    """

    def __init__(self, kind: str, prompt: int) -> None:
        from framequant.cli.demo import MODEL
        from framequant.integrations.sources import open_model

        self.kind, self.model = kind, open_model(MODEL, "bfloat16", "cpu").model.eval()
        if kind != "bfloat16":
            quantize_at_random(self.model, kind)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, prompt))
        self.token = self.ids[:, -1:]
        self.prompts: list[tuple[float, float]] = []
        self.steps: list[tuple[float, float]] = []

    def read(self) -> None:
        """Run the prompt."""
        output, spent = timed(lambda: self.model(self.ids, use_cache=True))
        self.cache = output.past_key_values
        self.prompts.append(spent)

    def write(self) -> None:
        """Decode one token."""
        output, spent = timed(lambda: self.model(self.token, past_key_values=self.cache, use_cache=True))
        self.token = output.logits[:, -1:].argmax(-1)
        self.steps.append(spent)

    def row(self, warm_up: int) -> dict[str, Any]:
        """The figures, without the first steps and prompts."""
        seconds, processor = zip(*self.steps[warm_up:], strict=True)
        prompt, prompt_processor = zip(*self.prompts[1:], strict=True)
        return {
            "kind": self.kind,
            "threads": torch.get_num_threads(),
            "decode_tokens_s": 1 / statistics.median(seconds),
            "decode_best_tokens_s": 1 / min(seconds),
            "decode_cpu_ms": 1e3 * statistics.median(processor),
            "prompt_tokens_s": self.ids.numel() / statistics.median(prompt),
            "prompt_cpu_ms": 1e3 * statistics.median(prompt_processor),
            "model_mb": num_bytes(self.model) / 1e6,
        }


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What a function returns, its seconds, and its processor time."""
    start = time.perf_counter(), time.process_time()
    found = function()
    return found, (time.perf_counter() - start[0], time.process_time() - start[1])


@torch.inference_mode()
def measure(kinds: list[str], prompt: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of all kinds, with what each is relative to the first."""
    subjects = [Subject(kind, prompt) for kind in kinds]
    for turn in range(rounds + 1):
        for subject in subjects:
            if turn < 6:
                subject.read()
            for _ in range(TOKENS_A_TURN):
                subject.write()
    rows = [subject.row(TOKENS_A_TURN) for subject in subjects]
    for row in rows:
        row["decode_ratio"] = row["decode_tokens_s"] / rows[0]["decode_tokens_s"]
        row["decode_cpu_ratio"] = rows[0]["decode_cpu_ms"] / row["decode_cpu_ms"]
        row["prompt_ratio"] = row["prompt_tokens_s"] / rows[0]["prompt_tokens_s"]
        row["memory_ratio"] = row["model_mb"] / rows[0]["model_mb"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30, help=f"turns of {TOKENS_A_TURN} tokens")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:4]))
    parser.add_argument("--csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.kinds, options.prompt, options.rounds)
    for row in rows:
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "commit"])
            writer.writeheader()
            writer.writerows({**row, "commit": commit()} for row in rows)


if __name__ == "__main__":
    main()
