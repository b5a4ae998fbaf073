"""Load tests: models of the shapes of 7B, 70B, 1.5B and 8x7B parameters, random weights, quantized from disk to disk.

Run from the repository's root with ``PYTHONPATH=src:.``::

    python benchmarks/load_test.py --shape 7b --device cuda                       # whole, 13 GB
    python benchmarks/load_test.py --shape 70b --device cuda --blocks 2 --max-memory cuda=40GB,cpu=100GB
    python benchmarks/load_test.py --shape 1.5b --limit 4GB --samples 8 --tokens 512 --blocks 2
    python benchmarks/load_test.py --shape 8x7b --device cuda --blocks 2          # a mixture of experts
    torchrun --nproc-per-node 2 benchmarks/load_test.py --shape 7b --blocks 4     # several GPUs

``--blocks N`` writes and quantizes a model of N blocks and projects the total: what comes before the first block,
N measured blocks, and as many more as the shape has at the mean of those between the first and the last. Weights
are written by a process of their own, shard by shard, so that peaks are those of quantizing. ``--limit`` puts the
quantizing process into a memory cgroup (version 1 or 2, root), page cache included. Appends one row to ``--csv``, and
writes it anew after every block: a run that is cut off leaves the figures of the blocks that it has finished
(``finished`` is then "no").
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import commit

#: hidden size, intermediate size, heads, key-value heads, blocks, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (256, 704, 4, 4, 4, 1000, False),
    "small": (768, 2048, 12, 12, 12, 1000, False),
    "1.5b": (1536, 8960, 12, 2, 28, 151936, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "70b": (8192, 28672, 64, 8, 80, 32000, False),
    "8x7b": (4096, 14336, 32, 8, 32, 32000, False),
    "tiny-experts": (256, 704, 4, 4, 4, 1000, False),
}
#: Experts of a layer, of which a token takes two.
EXPERTS = {"8x7b": 8, "tiny-experts": 8}


#: Shards that are written at a time.
WRITERS = 3
STAGES = ("read", "capture", "round", "write")


def model_config(shape: str, blocks: int) -> Any:
    from transformers import LlamaConfig, MixtralConfig

    mixture = {"num_local_experts": EXPERTS[shape], "num_experts_per_tok": 2} if shape in EXPERTS else {}
    hidden, intermediate, heads, groups, _, vocabulary, tied = SHAPES[shape]
    return (MixtralConfig if mixture else LlamaConfig)(
        **mixture,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        architectures=["MixtralForCausalLM" if mixture else "LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_model(folder: Path, shape: str, blocks: int, device: str, dtype: torch.dtype) -> None:
    """Write random weights under the names that hub files have, a file for each block and one for the rest."""
    import transformers
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    config = model_config(shape, blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    state = model.state_dict()
    files: dict[str, list[str]] = defaultdict(list)
    for name in state:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            files[f"model-{part}.safetensors"].append(name)
    generator, weight_map = torch.Generator(device).manual_seed(0), {}
    with ThreadPoolExecutor(WRITERS) as pool:
        pending: deque[Future[None]] = deque()
        for file, names in files.items():
            tensors = {name: random_weight(name, state[name].shape, generator, dtype) for name in names}
            original = revert_weight_conversion(model, tensors)  # of fused experts views
            tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in original.items()}
            weight_map |= dict.fromkeys(tensors, file)
            pending.append(pool.submit(save_file, tensors, folder / file, metadata={"format": "pt"}))
            if len(pending) == WRITERS:  # no more shards in memory than are being written
                pending.popleft().result()
        for write in pending:
            write.result()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def random_weight(
    name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weight = torch.randn(shape, generator=generator, device=generator.device)
    return weight.mul_(0.02 if "embed" not in name else 1.0).to(dtype).cpu()


class Peaks:
    """The peaks of this process's memory: all of it, and what is no mapped file; sampled for the second."""

    def __init__(self) -> None:
        self.anonymous, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.anonymous = max(self.anonymous, status("RssAnon"))

    @property
    def resident(self) -> int:
        return status("VmHWM")


def status(key: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return 0


class Stages:
    """Seconds of the stages of a walk, and when each block was done; ``report`` is called after each."""

    def __init__(self, cuda: bool, report: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.done: list[float] = []
        self._cuda, self._report = cuda, report
        self.blocks: list[dict[str, float]] = []
        self._before: dict[str, float] = {}
        self.start = self.now()

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner: Any, method: str, stage: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                end = self.now()
                self.seconds[stage] += end - start
                if stage == "write":
                    self.done.append(end)
                    self._print_block()
                    self._report()

        setattr(owner, method, timed)

    def _print_block(self) -> None:
        """The seconds of the last block; what is in no stage is running it for what the next one reads."""
        total = self.done[-1] - (self.done[-2] if len(self.done) > 1 else self.start)
        spent = {stage: self.seconds[stage] - self._before.get(stage, 0.0) for stage in STAGES}
        self._before = dict(self.seconds)
        spent["rest"] = total - sum(spent.values())
        self.blocks.append({"seconds": total, **spent})
        parts = ", ".join(f"{stage} {value:.2f}" for stage, value in spent.items())
        print(f"block {len(self.done)}: {total:.2f} s ({parts})", flush=True)

    def block(self) -> dict[str, float]:
        """Seconds of a block and of its stages: the mean of those between the first and the last.

        The first one's time includes what comes before it and compiling kernels, and the last one's outputs are
        read by nothing and not made.
        """
        inner = self.blocks[1:-1] or self.blocks[1:] or self.blocks
        return {stage: sum(one[stage] for one in inner) / len(inner) for stage in ("seconds", *STAGES)}

    def watch(self) -> None:
        """Time the walk's steps."""
        from framequant.model.walk import _Walk
        from framequant.streaming.residence import StreamedResidence

        self.wrap(_Walk, "_capture", "capture")
        self.wrap(_Walk, "_quantize_group", "round")
        self.wrap(StreamedResidence, "enter", "read")
        self.wrap(StreamedResidence, "leave", "write")


@contextlib.contextmanager
def limited(size: str | None) -> Iterator[list[str]]:
    """A command prefix under which a process may take so much memory, page cache included."""
    if size is None:
        yield []
        return
    from framequant.streaming.plan import parse_size

    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"framequant-{os.getpid()}"
    group.mkdir()
    try:
        limit = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
        (group / limit).write_text(str(parse_size(size)))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "limited"]
        for name in ("memory.max_usage_in_bytes", "memory.peak", "memory.failcnt"):
            if (group / name).is_file():
                print(f"{name} {(group / name).read_text().strip()}")
    finally:
        group.rmdir()


def measure(arguments: argparse.Namespace, source: Path, out: Path) -> None:
    """Quantize; after each block and at the end, the first rank writes the row of figures."""
    import framequant as fq
    from framequant.cli.streaming import join_ranks, leave_ranks
    from framequant.config import preset

    device, ranks = join_ranks(arguments.device)
    cuda = device.startswith("cuda")
    vocabulary = SHAPES[arguments.shape][5]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (arguments.samples, arguments.tokens), generator=generator)
    table = Table(arguments.csv if ranks.is_first else None)
    figures = {"ranks": ranks.size, "commit": commit()}
    stages = Stages(cuda, lambda: table.put(row_of(arguments, stages, peaks, figures)))
    stages.watch()
    with Peaks() as peaks:
        run = fq.quantize_streaming(
            source,
            out,
            ids,
            preset(arguments.preset),
            dtype=getattr(torch, arguments.dtype),
            device=device,
            max_memory=arguments.max_memory,
            ranks=ranks,
            progress=lambda p: print(f"  {p.message} {stages.now() - stages.start:.1f} s", flush=True),
        )
    figures |= {
        "finished": "yes",
        "total": stages.now() - stages.start,
        "activations": run.place,
        "bits_per_weight": round(run.report.bits_per_weight, 4),
    }
    if ranks.is_first:
        figures["output_gb"] = round(sum(path.stat().st_size for path in out.iterdir()) / 1e9, 3)
    row = row_of(arguments, stages, peaks, figures)
    table.put(row)
    if ranks.is_first:
        print(json.dumps(row, indent=1))
    leave_ranks(ranks)


def row_of(
    arguments: argparse.Namespace, stages: Stages, peaks: Peaks, known: dict[str, Any]
) -> dict[str, Any]:
    """The figures so far; ``known`` holds those that only a finished run has, and what does not change."""
    hidden, intermediate, _, _, layers, _, _ = SHAPES[arguments.shape]
    cuda, done = arguments.device.startswith("cuda"), len(stages.done)
    total = known.get("total", stages.now() - stages.start)
    block = stages.block()
    return {
        "shape": arguments.shape,
        "preset": arguments.preset,
        "hidden": hidden,
        "intermediate": intermediate,
        "blocks": layers,
        "blocks_measured": done,
        "finished": known.get("finished", "no"),
        "samples": arguments.samples,
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "ranks": known["ranks"],
        "activations": known.get("activations", ""),
        "seconds": round(total, 2),
        "seconds_first_block": round(stages.done[0] - stages.start, 2),
        "seconds_per_block": round(block["seconds"], 3),
        "seconds_projected": round(total + (layers - done) * block["seconds"], 1),
        **{f"block_{stage}": round(block[stage], 3) for stage in STAGES},
        **{f"seconds_{stage}": round(stages.seconds[stage], 2) for stage in STAGES},
        "device_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else 0,
        "device_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if cuda else 0,
        "host_peak_gb": round(peaks.resident / 1e9, 2),
        "host_anonymous_gb": round(peaks.anonymous / 1e9, 2),
        "limit": arguments.limit or arguments.max_memory or "",
        "bits_per_weight": known.get("bits_per_weight", ""),
        "output_gb": known.get("output_gb", ""),
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "commit": known["commit"],
    }


class Table:
    """A CSV file whose last row is replaced until the run has finished; without a path, nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._before = path.read_text() if path is not None and path.exists() else ""

    def put(self, row: dict[str, Any]) -> None:
        """Write what was in the file before, and then the row."""
        if self._path is None:
            return
        with self._path.open("w", newline="") as file:
            file.write(self._before)
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if not self._before:
                writer.writeheader()
            writer.writerow(row)


def main() -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="measure so many blocks and project the others")
    parser.add_argument("--preset", default="framequant-scalar")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-memory")
    parser.add_argument("--limit", help="memory of the quantizing process, for example 4GB")
    parser.add_argument("--folder", type=Path, help="of the model and the output; temporary if not given")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--step", choices=["write", "measure"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    blocks = arguments.blocks or SHAPES[arguments.shape][4]
    if arguments.step == "write":
        dtype = getattr(torch, arguments.dtype)
        write_model(arguments.folder, arguments.shape, blocks, arguments.device, dtype)
        return
    if arguments.step == "measure":
        measure(arguments, arguments.folder / "model", arguments.folder / "out")
        return
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="framequant-load-"))
    if distributed:
        folder = Path(tempfile.gettempdir()) / f"framequant-load-{os.environ['MASTER_PORT']}"
    first = os.environ.get("RANK", "0") == "0"
    own = [sys.executable, __file__, *sys.argv[1:], "--folder"]
    try:
        if first:
            start = time.perf_counter()
            (folder / "writing").mkdir(parents=True)
            subprocess.run([*own, str(folder / "writing"), "--step", "write"], check=True)
            (folder / "writing").rename(folder / "model")
            size = sum(path.stat().st_size for path in (folder / "model").iterdir())
            print(f"model of {size / 1e9:.2f} GB written in {time.perf_counter() - start:.1f} s", flush=True)
        while not (folder / "model").is_dir():
            time.sleep(0.5)
        if distributed:
            measure(arguments, folder / "model", folder / "out")
            return
        with limited(arguments.limit) as prefix:
            subprocess.run([*prefix, *own, str(folder), "--step", "measure"], check=True)
    finally:
        if first and arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
