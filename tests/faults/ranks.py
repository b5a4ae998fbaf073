"""Several processes on one model: how far the codes agree with one process's, and what happens when one dies.

Run from the repository's root::

    python -m tests.faults.ranks --csv tests/faults/ranks.csv              # tiny model, 1 against 2 processes
    python -m tests.faults.ranks --model smollm2 --blocks 2 --csv …        # SmolLM2's first blocks
    python -m tests.faults.ranks --kill 1                                  # a rank dies, the others name it
    python -m tests.faults.ranks --namespaces                              # in two network namespaces (root)

Processes are forked, find each other through a port, and speak gloo, as under ``torchrun``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import framequant as fq
from framequant.checkpoint import parse_quantization
from framequant.codes.packing import unpack_codes
from tests.faults.kill_and_resume import (
    Case,
    contents,
    first_blocks,
    mixture_case,
    smollm2_case,
    tiny_case,
    wait,
)
from tests.streaming.models import tensors

HOSTS = ("fq-one", "fq-two")


@dataclass
class Agreement:
    """How two checkpoints of one model differ.

    Attributes:
        model, preset, blocks, ranks: what was quantized, and by how many processes.
        codes: scalar codes, or bytes of trellis codes.
        differing: of them.
        share: the same as a share.
        scales_differing: share of the scales that differ.
        relative: largest relative difference between the proxy losses of one linear.
        relative_total: relative difference between their sums.
        rates_differing: linears to which a bit budget gave another rate.
        seconds_of_one, seconds: of one process, and of all of them together.
    """

    model: str
    preset: str
    blocks: int
    ranks: int
    codes: int
    differing: int
    share: float
    scales_differing: float
    relative: float
    relative_total: float
    rates_differing: int
    seconds_of_one: float
    seconds: float


def compare(one: Path, other: Path) -> dict[str, float]:
    """Count the codes and scales in which two checkpoints differ."""
    first, second = tensors(one), tensors(other)
    entry = parse_quantization(json.loads((one / "config.json").read_text())["quantization_config"])
    codes = differing = scales = other_scales = 0
    for name, spec in entry.linears.items():
        left, right = (found[f"{name}.packed_codes"] for found in (first, second))
        if hasattr(spec.code, "num_levels"):
            columns = spec.coefficient_shape[1]
            left, right = (unpack_codes(packed, spec.code.num_levels, columns) for packed in (left, right))
        codes += left.numel()
        differing += int((left != right).sum()) if left.shape == right.shape else left.numel()
        scales += first[f"{name}.scales"].numel()
        other_scales += int((first[f"{name}.scales"] != second[f"{name}.scales"]).sum())
    losses = [
        {
            e["name"]: e["proxy_loss"]
            for e in json.loads((path / "framequant_report.json").read_text())["linears"]
        }
        for path in (one, other)
    ]
    relative = max(abs(losses[1][name] / value - 1) for name, value in losses[0].items() if value)
    total = abs(sum(losses[1].values()) / sum(losses[0].values()) - 1)
    choices = [
        json.loads((path / "framequant_report.json").read_text())["allocation"] for path in (one, other)
    ]
    rates = [found.get("choices", {}) for found in choices]
    return {
        "codes": codes,
        "differing": differing,
        "share": differing / codes,
        "scales_differing": other_scales / scales,
        "relative": relative,
        "relative_total": total,
        "rates_differing": sum(rates[0][name]["bits"] != rates[1][name]["bits"] for name in rates[0]),
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def worker(case: Case, out: Path, device: str = "cpu") -> None:
    """One rank; its place is in the environment, as torchrun puts it there."""
    from framequant.model.ranks import DistributedRanks

    ranks = DistributedRanks(torch.device(device))
    run = fq.quantize_streaming(case.source, out, case.data, case.config, ranks=ranks)
    if ranks.is_first:
        (out.parent / "resumed").write_text(str(run.resumed))
    torch.distributed.destroy_process_group()


def start(case: Case, out: Path, count: int) -> list[int]:
    """Fork ranks; return their process ids."""
    children = []
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            worker(case, out)
            os._exit(0)
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(2)
    return children


def run(case: Case, out: Path, count: int) -> float:
    """Quantize by several processes; return the seconds."""
    out.parent.mkdir(exist_ok=True)
    begun = time.perf_counter()
    assert [wait(child) for child in start(case, out, count)] == [0] * count
    return time.perf_counter() - begun


def kill_one(case: Case, out: Path, count: int, victim: int, blocks: int) -> list[int]:
    """Kill a rank once some blocks are done; return the exit codes."""
    out.parent.mkdir(exist_ok=True)
    children = start(case, out, count)
    folder = out.with_name(out.name + ".partial") / "blocks"
    while len(list(folder.glob("*.json"))) < blocks:
        time.sleep(0.01)
    os.kill(children[victim], signal.SIGKILL)
    return [wait(child) for child in children]


def after_a_death(case: Case, folder: Path, count: int, victim: int) -> None:
    """Kill a rank, go on with all of them, and compare with a run in which none died."""
    codes = kill_one(case, folder / "two" / "out", count, victim, blocks=3)
    print(f"exit codes of the ranks: {codes}")
    assert codes[victim] == -signal.SIGKILL
    assert all(code == 2 for rank, code in enumerate(codes) if rank != victim)
    run(case, folder / "two" / "out", count)
    print(f"{(folder / 'two' / 'resumed').read_text()} blocks were kept")
    run(case, folder / "undisturbed" / "out", count)
    same = contents(folder / "two" / "out") == contents(folder / "undisturbed" / "out")
    print(f"byte-identical: {same}")


def in_namespaces(folder: Path) -> None:
    """Two ranks, each in a network namespace of its own, joined by a cable."""
    commands = [
        *(f"ip netns add {name}" for name in HOSTS),
        "ip link add fq-a netns fq-one type veth peer name fq-b netns fq-two",
        *(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev fq-{'ab'[i]}" for i, name in enumerate(HOSTS)),
        *(f"ip -n {name} link set fq-{'ab'[i]} up" for i, name in enumerate(HOSTS)),
        *(f"ip -n {name} link set lo up" for name in HOSTS),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        processes = []
        for rank, name in enumerate(HOSTS):
            place = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2", "RANK": str(rank)}
            place |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": f"fq-{'ab'[rank]}"}
            inner = [sys.executable, "-m", "tests.faults.ranks", "--worker", str(folder)]
            processes.append(
                subprocess.Popen(["ip", "netns", "exec", name, *inner], env={**os.environ, **place})
            )
        assert [process.wait() for process in processes] == [0, 0]
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "mixture", "smollm2"], default="tiny")
    parser.add_argument("--presets", nargs="+", default=["framequant-scalar", "framequant"])
    parser.add_argument(
        "--blocks", type=int, help="12 of the tiny model, 3 of the mixture, or the first 2 of SmolLM2"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--walk-dtype", choices=["float32", "float64"], help="to run the calibration in")
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument(
        "--kill", type=int, metavar="RANK", help="kill this rank after three blocks and go on"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        config = fq.preset("framequant-scalar")
        data = load_file(arguments.worker / "ids.safetensors")["ids"]
        worker(Case(arguments.worker / "model", data, config), arguments.worker / "two" / "out")
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blocks = arguments.blocks or {"tiny": 12, "mixture": 3, "smollm2": 2}[arguments.model]
        makers = {"tiny": tiny_case, "mixture": mixture_case}
        if arguments.model in makers:
            case = makers[arguments.model](folder, blocks)
        else:
            case = first_blocks(smollm2_case(folder), blocks)
        if arguments.namespaces:
            case.config = fq.preset("framequant-scalar")
            save_file({"ids": case.data}, folder / "ids.safetensors")
            (folder / "two").mkdir()
            in_namespaces(folder)
            run(case, folder / "one" / "out", 1)
            print("two network namespaces:", compare(folder / "one" / "out", folder / "two" / "out"))
            return
        if arguments.kill is not None:
            after_a_death(case, folder, arguments.ranks, arguments.kill)
            return
        for preset in arguments.presets:
            changes = {"state_bits": 8} if preset == "framequant" else {}
            case.config = fq.preset(preset, **changes, walk_dtype=arguments.walk_dtype)
            alone = run(case, folder / f"{preset}-1" / "out", 1)
            together = run(case, folder / f"{preset}-{arguments.ranks}" / "out", arguments.ranks)
            found = compare(folder / f"{preset}-1" / "out", folder / f"{preset}-{arguments.ranks}" / "out")
            label = preset if arguments.walk_dtype is None else f"{preset} in {arguments.walk_dtype}"
            row = Agreement(
                arguments.model, label, blocks, arguments.ranks, **found,
                seconds_of_one=round(alone, 2), seconds=round(together, 2),
            )  # fmt: skip
            rows.append(row)
            print(row)
    if arguments.csv:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
