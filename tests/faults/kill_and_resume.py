"""Kill a streamed run at random moments, go on, and compare every byte with a run that was left alone.

Run from the repository's root::

    python -m tests.faults.kill_and_resume --rounds 20 --csv tests/faults/kill_and_resume.csv
    python -m tests.faults.kill_and_resume --model smollm2 --blocks 4 --csv tests/faults/kill_and_resume_smollm2.csv

Each round forks a process that quantizes, sends it SIGKILL after a random time, and lets further processes go on
until one ends by itself; ``--kills`` of them are killed too. The report is compared without its times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import framequant as fq


@dataclass
class Case:
    """What is quantized again and again."""

    source: Path
    data: torch.Tensor
    config: fq.FrameQuantConfig


@dataclass
class Round:
    """One round: when it was killed, what was done by then, and whether the result is the same."""

    number: int
    killed_after_seconds: str
    blocks_done_at_kill: str
    resumed_blocks: int
    files: int
    identical: bool


def tiny_case(folder: Path, layers: int = 12) -> Case:
    from tests.streaming.models import IDS, save_llama

    config = fq.preset("framequant", state_bits=8)
    return Case(save_llama(folder / "model", layers), IDS, config)


def mixture_case(folder: Path, layers: int = 4) -> Case:
    """A mixture of more experts than its calibration tokens reach."""
    from tests.streaming.models import IDS, save_mixture

    source = save_mixture(folder / "model", "mixtral", layers, num_local_experts=8, num_experts_per_tok=1)
    return Case(source, IDS[:2, :8], fq.preset("framequant", state_bits=8))


def smollm2_case(folder: Path, preset: str = "framequant-scalar") -> Case:
    """SmolLM2-135M, from its packaged file to safetensors."""
    from framequant.integrations.sources import open_model

    opened = open_model("smollm2")
    opened.model.save_pretrained(folder / "model")
    data = torch.randint(0, 40000, (10, 100), generator=torch.Generator().manual_seed(0))
    return Case(folder / "model", data, fq.preset(preset))


def first_blocks(case: Case, count: int) -> Case:
    """The case with the model cut to its first blocks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.source)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.save_pretrained(case.source.with_name("first"))
    return Case(case.source.with_name("first"), case.data, case.config)


def start(case: Case, out: Path) -> int:
    """Quantize in a forked process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        run = fq.quantize_streaming(case.source, out, case.data, case.config)
        (out.parent / "resumed").write_text(str(run.resumed))
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(out: Path) -> dict[str, Any]:
    """Every file of a checkpoint: its bytes, the report's without times."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in sorted(out.iterdir())}
    report = json.loads(found["framequant_report.json"])
    for entry in (report, *report["linears"]):
        entry.pop("seconds")
    found["framequant_report.json"] = report
    return found


def blocks_done(out: Path) -> int:
    folder = out.with_name(out.name + ".partial") / "blocks"
    return len(list(folder.glob("*.json"))) if folder.is_dir() else 0


def undisturbed(case: Case, folder: Path) -> tuple[dict[str, Any], float]:
    """The result of a run that is left alone, and its seconds."""
    begun = time.perf_counter()
    assert wait(start(case, folder / "reference" / "out")) == 0
    return contents(folder / "reference" / "out"), time.perf_counter() - begun


def one_round(
    case: Case, folder: Path, number: int, delays: list[float], expected: dict[str, Any]
) -> Round | None:
    """Kill a run after each delay in turn, then let it end; None if it ended before it was killed."""
    out = folder / f"round-{number}" / "out"
    out.parent.mkdir()
    done = []
    for delay in delays:
        child = start(case, out)
        time.sleep(delay)
        done.append(blocks_done(out) if not out.exists() else -1)
        os.kill(child, signal.SIGKILL)
        wait(child)
        if out.exists() and not out.with_name("out.partial").exists():
            shutil.rmtree(out.parent)
            return None  # it was done before it was killed
    resumed = 0
    if not out.exists() or out.with_name("out.partial").exists():
        assert wait(start(case, out)) == 0, f"round {number}: the run did not go on"
        resumed = int((out.parent / "resumed").read_text())
    found = contents(out)
    leftovers = [p.name for p in out.parent.iterdir() if p.name not in ("out", "resumed")]
    result = Round(
        number,
        " ".join(f"{delay:.3f}" for delay in delays),
        " ".join(map(str, done)),
        resumed,
        len(found),
        found == expected and not leftovers,
    )
    shutil.rmtree(out.parent)
    return result


def rounds(case: Case, folder: Path, count: int, kills: int = 1, seed: int = 0) -> list[Round]:
    """Several rounds at moments spread over a whole run."""
    (folder / "reference").mkdir()
    fq.quantize_streaming(
        case.source, folder / "warm", case.data, case.config
    )  # what is imported on first use
    expected, seconds = undisturbed(case, folder)
    chance, found = random.Random(seed), []
    while len(found) < count:
        delays = [chance.uniform(0, seconds / kills) for _ in range(kills)]
        result = one_round(case, folder, len(found), delays, expected)
        if result is not None:
            print(result, flush=True)
            found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "mixture", "smollm2"], default="tiny")
    parser.add_argument(
        "--blocks",
        type=int,
        help="12 of the tiny model, 4 of the mixture; the first so many of SmolLM2, or all",
    )
    parser.add_argument("--preset", default="framequant-scalar", help="of smollm2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.model == "tiny":
            case = tiny_case(folder, arguments.blocks or 12)
        elif arguments.model == "mixture":
            case = mixture_case(folder, arguments.blocks or 4)
        else:
            case = smollm2_case(folder, arguments.preset)
            case = first_blocks(case, arguments.blocks) if arguments.blocks else case
        found = rounds(case, folder, arguments.rounds, arguments.kills, arguments.seed)
    print(f"{sum(result.identical for result in found)} of {len(found)} byte-identical")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            model = arguments.model + (f", {arguments.blocks} blocks" if arguments.blocks else "")
            writer = csv.DictWriter(file, ["model", *asdict(found[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"model": model, **asdict(result)} for result in found)
    sys.exit(0 if all(result.identical for result in found) else 1)


if __name__ == "__main__":
    main()
