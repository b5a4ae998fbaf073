"""Whole models with random codes, decoding one sequence: FrameQuant against float16 and its peers in one harness.

    PYTHONPATH=src:. python benchmarks/model_decoding.py --csv $OUT/model_decoding.csv

Models have the shapes of Llama-2-7B and Llama-3-8B and random weights or codes made on the GPU: they cost what real
ones cost, and nothing here asks what they say. Every row is transformers' own model, its linears replaced, in
``framequant.Decoder``: static cache, blocks through ``torch.compile``, steps replayed as a CUDA graph. Embeddings and
head stay in float16 in all rows. Rows are printed and written as they come; a row that fails says why.

Peers: gemlite (2 bits, groups of 128) and hqq's own linear where they are installed; "dense unpack" unpacks each matrix
of codes in each forward pass with plain torch, as the reference implementation does. "loading" writes a checkpoint of
the first scalar model, loads it with ``framequant.load`` and times the first token.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import commit
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16
PROMPT, TOKENS = 2, 126 if DEVICE == "cuda" else 3
PATIENCE = 80  # seconds for compiling ahead
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 192, 2, 4, 2, 97),  # for a try on a CPU, with TRITON_INTERPRET=1
}
OURS = (
    "scalar",
    "trellis",
    "scalar apart",
    "trellis apart",
    "scalar local",
    "trellis local",
    "pairs local",
)  # apart: linears that read one input, each for itself; local: output frames in blocks of rows
ONCE = ("loading", "gemlite", "dense unpack", "hqq")  # for the first shape only
KINDS = ("fp16", *OURS, *ONCE)
COLUMNS = ("model", "kind", "tokens_s", "ratio", "ms", "first_token_ms", "prompt", "memory_gb", "read_gb",
           "copy_tb_s", "of_copy", "graph", "build_s", "measure_s", "note", "device", "torch", "commit")  # fmt: skip


def make_model(shape: str, layers: int | None = None) -> nn.Module:
    """A Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, depth, heads, values, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=values, vocab_size=vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def frame_linear(name: str, linear: nn.Linear, kind: str) -> nn.Module:
    """A quantized linear with random codes of the kind: scalar with r = 1.125, or a trellis of two bits."""
    from framequant import FrameLinear, storage
    from framequant.codes.grid import GridSpec
    from framequant.codes.trellis import PAIR_ID, TrellisSpec
    from framequant.frames import block_frame, choose_frame
    from framequant.frames.signs import derive_seed
    from framequant.spec import LinearSpec

    code, redundancy = GridSpec("sigma_clip", 4, "symmetric"), 1.125
    if kind.startswith("trellis"):
        code, redundancy = TrellisSpec(12, (2,)), 1.0
    elif kind.startswith("pairs"):
        code, redundancy = TrellisSpec(16, (4,), codebook=PAIR_ID), 1.0
    block, _, last = name.rpartition(".")
    group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}.get(
        last, last
    )
    seeds = [derive_seed(0, f"{block}.{group}", "in") >> 32, derive_seed(0, name, "out") >> 32]
    frames = (
        choose_frame(linear.in_features, redundancy, seeds[0]),
        block_frame(linear.out_features, 32, seeds[1])
        if kind.endswith("local")
        else choose_frame(linear.out_features, 1.0, seeds[1]),
    )
    spec = LinearSpec(linear.in_features, linear.out_features, *frames, code)
    tensors = {}
    for key, (size, stored) in storage.layout(spec).items():
        if key == "packed_codes":
            tensors[key] = torch.randint(0, 256, size, dtype=stored, device=linear.weight.device)
        else:
            tensors[key] = torch.full(size, 0.018, dtype=stored, device=linear.weight.device)
    layer = FrameLinear.from_tensors(spec, tensors)
    if kind == "dense unpack":
        layer.backend = "reference"
    return layer.eval()


def gemlite_linear(name: str, linear: nn.Linear, kind: str) -> nn.Module:
    from gemlite.helper import A16W2_HQQ_INT

    shape = linear.weight.shape
    codes = torch.randint(0, 4, shape, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((shape[0], shape[1] // 128), 0.018, dtype=DTYPE, device=DEVICE)
    return A16W2_HQQ_INT(device=DEVICE, dtype=DTYPE).from_weights(codes, scales, torch.full_like(scales, 1.5))


def hqq_linear(name: str, linear: nn.Linear, kind: str) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=2, group_size=64)
    return HQQLinear(linear, config, compute_dtype=DTYPE, device=DEVICE)


def build(shape: str, kind: str, layers: int | None = None) -> nn.Module:
    """The model of a row."""
    from framequant import fuse_

    model = make_model(shape, layers)
    make: dict[str, Callable[[str, nn.Linear, str], nn.Module]] = {
        "gemlite": gemlite_linear,
        "hqq": hqq_linear,
    }
    if kind != "fp16":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, make.get(kind, frame_linear)(name, module, kind))
    if kind.split()[0] in ("scalar", "trellis"):
        made = fuse_(model, join="apart" not in kind)
        if not made:
            raise RuntimeError("no linear was taken by the GPU kernels")
    return model


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def allocated() -> float:
    return torch.cuda.memory_allocated() / 1e9 if DEVICE == "cuda" else float("nan")


@dataclass
class Table:
    """Prints rows and writes them, one by one."""

    path: Path | None
    bandwidth: float
    base: dict[str, float] = field(default_factory=dict)

    def add(self, shape: str, kind: str, **values: Any) -> None:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        row = {"model": shape, "kind": kind, **values, "copy_tb_s": self.bandwidth / 1e12}
        row |= {"device": device, "torch": torch.__version__, "commit": os.environ.get("COMMIT") or commit()}
        text = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
        print(" ".join(f"{key}={text[key]}" for key in COLUMNS[:-3] if key in text), flush=True)
        if self.path is not None:
            begun = self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                if not begun:
                    writer.writeheader()
                writer.writerow(text)


def measure(table: Table, shape: str, kind: str) -> None:
    from framequant.evaluation.speed import measure_speed

    start, before = time.perf_counter(), allocated()
    model = build(shape, kind)
    gc.collect()
    built, memory = time.perf_counter() - start, allocated() - before
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        speed = measure_speed(
            model, PROMPT, TOKENS, repeats=2, compile_blocks=True, bandwidth=table.bandwidth
        )
    notes = "; ".join(str(w.message)[:160] for w in caught if issubclass(w.category, RuntimeWarning))
    if kind == "fp16":
        table.base[shape] = speed.tokens_per_second
    ratio = speed.tokens_per_second / table.base.get(shape, float("nan"))
    table.add(
        shape, kind, tokens_s=speed.tokens_per_second, ratio=ratio,
        ms=1e3 / speed.tokens_per_second, first_token_ms=1e3 * speed.first_token_seconds, prompt=PROMPT,
        memory_gb=memory, read_gb=speed.bytes_per_token / 1e9, of_copy=speed.bandwidth_fraction, graph=speed.graph,
        build_s=built, measure_s=time.perf_counter() - start - built, note=notes,
    )  # fmt: skip


def measure_loading(table: Table, shape: str) -> None:
    """Write a scalar checkpoint, load it to the GPU, and decode a token."""
    import framequant as fq
    from framequant import Decoder

    folder = Path(tempfile.mkdtemp(prefix="framequant-"))
    try:
        model = fq.unfuse_(build(shape, "scalar")) if DEVICE == "cuda" else build(shape, "dense unpack")
        start = time.perf_counter()
        fq.save_pretrained(model, folder / "model")
        saved = time.perf_counter() - start
        del model
        free()
        size = sum(file.stat().st_size for file in (folder / "model").iterdir()) / 1e9
        before, start = allocated(), time.perf_counter()
        model = fq.load(folder / "model", device=DEVICE)
        _synchronize()
        loaded = time.perf_counter() - start
        fq.fuse_(model)
        _synchronize()
        fused = time.perf_counter() - start - loaded
        memory = allocated() - before
        int(Decoder(model, PROMPT + 1, graph=False).prompt(torch.ones(1, PROMPT, dtype=torch.long)).argmax())
        total = time.perf_counter() - start
        note = f"{size:.2f} GB written {saved:.1f} s; load {loaded:.2f}, fuse {fused:.2f}, to first token {total:.2f} s"
        table.add(shape, "loading", memory_gb=memory, build_s=loaded, note=note)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compile_ahead(jobs: list[tuple[str, str]]) -> None:
    """Fill Triton's and inductor's caches from one process for each row, with models of one block."""
    start = time.perf_counter()
    environment = {**os.environ, "FRAMEQUANT_TUNING": "0"}  # nothing is measured side by side
    todo = [job for job in jobs if job[1] not in ONCE]
    for shape in (shape for shape, kind in jobs if kind == "gemlite"):
        hidden, intermediate = SHAPES[shape][:2]
        sizes = ((hidden, hidden), (intermediate, hidden), (hidden, intermediate))
        todo += [(shape, f"gemlite {rows} {columns} {n}") for rows, columns in sizes for n in (1, PROMPT)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", *job], stderr=subprocess.PIPE, text=True, env=environment
        )
        for job in todo
    ]
    for worker in workers:
        try:
            _, errors = worker.communicate(timeout=max(1.0, PATIENCE - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            worker.kill()
            errors = "not ready in time"
        if worker.returncode:
            print(worker.args[-2:], "!! compiling ahead:", errors[-400:], flush=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def work(shape: str, kind: str) -> None:
    """What a process of its own compiles for a row: one block, or one product of gemlite with its score of launches."""
    if kind.startswith("gemlite "):
        rows, columns, tokens = map(int, kind.split()[1:])
        with torch.device(DEVICE):
            linear = nn.Linear(columns, rows, bias=False, dtype=DTYPE)
            gemlite_linear("", linear, "gemlite")(torch.ones(tokens, columns, dtype=DTYPE))
        return
    from framequant.evaluation.speed import measure_speed

    measure_speed(build(shape, kind, layers=1), PROMPT, 2, repeats=1, compile_blocks=True, bandwidth=1.0)


def rows(shapes: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """What is measured, what matters most first."""
    main = [
        (shape, kind) for shape in shapes for kind in kinds if kind not in ONCE and not kind.endswith("apart")
    ]
    apart = [(shape, kind) for shape in shapes for kind in kinds if kind.endswith("apart")]
    once = [(shapes[0], kind) for kind in kinds if kind in ONCE]
    loading = [job for job in once if job[1] == "loading"]
    return main + loading + apart + [job for job in once if job not in loading]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Llama-2-7B", "Llama-3-8B"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("SHAPE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    from framequant.evaluation.speed import copy_bandwidth

    torch.manual_seed(0)
    if options.worker:
        work(*options.worker)
        return
    begin, jobs = time.perf_counter(), rows(options.shapes, options.kinds)
    if DEVICE == "cuda":
        compile_ahead(jobs)
    table = Table(options.csv, copy_bandwidth(torch.device(DEVICE)))
    for shape, kind in jobs:
        try:
            measure_loading(table, shape) if kind == "loading" else measure(table, shape, kind)
        except Exception as error:
            table.add(shape, kind, note=f"!! {type(error).__name__}: {str(error)[:300]!r}")
        free()
        print(f"    {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
