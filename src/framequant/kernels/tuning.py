"""Launches for a GPU that ``launches`` was not measured on: each decision is measured once, and kept on disk.

``launches`` holds what was measured on an H100 and H200. On another GPU the first use of a kind of linear tries
alternatives with its own codes, keeps the fastest that is right, and writes it to a file of the user's cache; the next
process reads it. ``FRAMEQUANT_TUNING=0`` turns this off.

Must not import layers; no triton.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from framequant.kernels import launches, tuned
from framequant.kernels.tuned import Knob

#: GPUs that the numbers of ``launches`` come from, by the beginning of their names.
MEASURED = ("NVIDIA H100", "NVIDIA H200")
#: Changed when a kernel changes so that what was found before no longer holds.
VERSION = 2
#: A choice must be faster by this factor than the usual one.
GAIN = 1.03
_REPEATS, _FLUSH_BYTES = 15, 128 << 20
_log = logging.getLogger("framequant")


def path(device: torch.device) -> Path:
    """The file that keeps the choices of a GPU."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framequant"
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    return folder / f"launches-{name}-{VERSION}.json"


@cache
def prepare(device: torch.device) -> None:
    """Read what was kept for a GPU; a file that cannot be read is as good as none."""
    if device.type != "cuda" or not wanted():
        return
    try:
        kept = json.loads(path(device).read_text())
        tuned.choices.update({key: value for key, value in kept.items() if isinstance(value, bool | list)})
    except (OSError, ValueError, AttributeError):
        return


def wanted() -> bool:
    """Whether launches may be measured and read at all."""
    return os.environ.get("FRAMEQUANT_TUNING", "1") != "0"


def open_knobs(asked: dict[Knob, Any], name: str) -> dict[Knob, Any]:
    """Of the decisions taken, those that nothing is known about on the GPU of this name."""
    if name.startswith(MEASURED):
        return {}
    return {knob: usual for knob, usual in asked.items() if str(knob) not in tuned.choices}


def checked(run: Callable[[], Any], problem: Callable[[], str], device: torch.device) -> str:
    """Decide what is open about a linear on its GPU, and say what is wrong with its outputs, or nothing.

    Args:
        run: the linear on some tokens.
        problem: what is wrong with them beside plain torch's, with what is chosen now.
        device: the GPU; on any other device nothing is decided.
    """
    prepare(device)
    found = problem()
    if found or device.type != "cuda" or not wanted():
        return found
    return problem() if tune(run, lambda: not problem(), device) else ""


def tune(run: Callable[[], Any], is_right: Callable[[], bool], device: torch.device) -> bool:
    """Decide what is open about a linear on its GPU; whether anything was."""
    with tuned.recorded() as asked:
        run()
    found = open_knobs(asked, torch.cuda.get_device_name(device))
    if not found:
        return False
    _tell(device)
    for knob, usual in found.items():
        decide(knob, usual, lambda: seconds(run), is_right)
    keep(device)
    return True


def decide(knob: Knob, usual: Any, cost: Callable[[], float], is_right: Callable[[], bool]) -> None:
    """Measure the alternatives of one decision, the others as they are, and choose.

    Args:
        usual: what ``launches`` computes.
        cost: seconds with what is chosen now.
    """
    best, least = usual, _cost(knob, usual, cost, is_right) / GAIN
    for other in alternatives(knob, usual):
        took = _cost(knob, other, cost, is_right)
        if took < least:
            best, least = other, took
    tuned.choices[str(knob)] = best if isinstance(best, bool) else list(best)


def _cost(knob: Knob, value: Any, cost: Callable[[], float], is_right: Callable[[], bool]) -> float:
    """Seconds with a value; infinite where it does not run, or is wrong."""
    tuned.choices[str(knob)] = value if isinstance(value, bool) else list(value)
    try:
        return cost() if is_right() else float("inf")
    except Exception:  # a launch that this GPU has no room for
        return float("inf")


def alternatives(knob: Knob, usual: Any) -> Iterator[Any]:
    """What else may be tried for a decision."""
    if isinstance(usual, bool):
        yield not usual
    elif isinstance(usual, launches.LaneLaunch):
        other = launches.trellis_alternatives if knob.name == "trellis_launch" else launches.lane_alternatives
        yield from other(usual, *knob.arguments)
    elif isinstance(usual, launches.Tile):
        yield from launches.tile_alternatives(usual)


def seconds(run: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, without Python's: a CUDA graph's replays, nothing of it in caches."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(_REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@cache
def _tell(device: torch.device) -> None:
    _log.warning(
        "framequant measures how to launch its kernels on this %s, once for each kind of linear: some are compiled, up "
        "to a minute each. What it finds is kept in %s; FRAMEQUANT_TUNING=0 turns this off.",
        torch.cuda.get_device_name(device),
        path(device),
    )


def keep(device: torch.device) -> None:
    """Write all choices beside those that another process wrote; without effect where nothing can be written."""
    file = path(device)
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**before, **tuned.choices}, indent=1, sort_keys=True) + "\n")
        fresh.replace(file)
    except (OSError, ValueError) as failure:
        _log.warning("framequant could not keep its launches in %s: %s", file, failure)
