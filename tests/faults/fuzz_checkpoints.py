"""Damage checkpoints in many thousand ways and load each: no crash, no wrong model, no memory out of proportion.

``python -m tests.faults.fuzz_checkpoints --tries 12000 --csv tests/faults/fuzz_checkpoints.csv``

Every try copies a small checkpoint, damages it by one seeded mutation and loads it as a user would; every other
try first deletes ``framequant_checksums.json``. Outcomes:

refused    ``CheckpointError``; ``named`` counts the messages that name a file or key
same       loaded, and equal to the undamaged model bit for bit: the damage touched nothing that matters
unnoticed  without checksums only: loaded, and another model. A flipped bit of a code is another valid code
failed     anything else: another exception, a wrong model in spite of checksums, a dead or hanging process

The worker may allocate 3 GiB on top of what it holds after loading every good checkpoint once (``RLIMIT_AS``).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.mutations import CHECKSUMS, mutate

SHARES = {"own": 6, "sigma_delta": 2, "timm": 3, "llama": 3, "shards": 3, "mixtral": 1}
SECONDS_PER_TRY = 60
SPARE = 3 << 30


def kind_of(seed: int) -> str:
    """The checkpoint that a try damages."""
    return Random(seed).choices(list(SHARES), list(SHARES.values()))[0]


def attempt(good: Any, place: Path, seed: int) -> tuple[str, str, str]:
    """One try: mutation, outcome and a note."""
    from framequant.errors import CheckpointError

    directory = place / f"try{seed}"
    shutil.copytree(good.directory, directory)
    checked = seed % 2 == 0
    if not checked:
        (directory / CHECKSUMS).unlink()
    mutation, what = mutate(directory, seed)
    try:
        model = good.load(directory)
        if good.is_same(model):
            return mutation, "same", what
        return mutation, ("failed" if checked else "unnoticed"), f"another model: {what}"
    except CheckpointError as error:
        return mutation, "refused", str(error).replace(str(place), "")
    except Exception as error:  # the point of the exercise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return mutation, "failed", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno}) {what}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        (place / f"try{seed}-outside.safetensors").unlink(missing_ok=True)


def work(source: str, first: int, last: int, results: Any) -> None:
    """Try the seeds from first to last - 1; send each result as it comes."""
    os.environ["FRAMEQUANT_BACKEND"] = "reference"
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from tests.faults.checkpoints import make_checkpoint

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(100)
    place = Path(source)
    goods = {}
    for kind in SHARES:
        shutil.rmtree(place / kind, ignore_errors=True)
        goods[kind] = make_checkpoint(kind, place / kind)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, last):
        results.put((seed, None))
        results.put((seed, attempt(goods[kind_of(seed)], place, seed)))
    results.put((None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start))


def run(tries: int, start: int) -> tuple[dict[int, tuple[str, str, str]], int]:
    """All tries in worker processes, a new one whenever one dies or hangs.

    Returns:
        Mutation, outcome and note by seed; and the largest growth of a worker's resident memory, in KiB.
    """
    context = multiprocessing.get_context("spawn")
    done: dict[int, tuple[str, str, str]] = {}
    growth, next_seed, stop = 0, start, start + tries
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        while next_seed < stop:
            results = context.Queue()
            worker = context.Process(target=work, args=(place, next_seed, stop, results))
            worker.start()
            current, finished = None, False
            while not finished:
                try:
                    seed, result = results.get(timeout=SECONDS_PER_TRY * (5 if current is None else 1))
                except Exception:  # queue.Empty: it hangs, or is dead
                    break
                if seed is None:
                    growth, finished = max(growth, result), True
                elif result is None:
                    current = seed
                else:
                    done[seed] = result
                    if len(done) % 500 == 0:
                        print(f"{len(done)} tries, {dict(Counter(r[1] for r in done.values()))}", flush=True)
                if result is None and not worker.is_alive():
                    break
            if not finished:
                alive = worker.is_alive()
                worker.terminate()
                assert current is not None, "the worker died before its first try"
                done[current] = ("?", "failed", "hangs" if alive else f"died with {worker.exitcode}")
            worker.join()
            next_seed = stop if finished else current + 1
    return done, growth


def summarize(done: dict[int, tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Counts by checkpoint, mutation and whether there were checksums."""
    groups: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for seed, (mutation, outcome, note) in done.items():
        counts = groups[kind_of(seed), mutation, "yes" if seed % 2 == 0 else "no"]
        counts[outcome] += 1
        counts["tries"] += 1
        if outcome == "refused" and re.search(r"\w+\.\w+|quantization_config|config", note):
            counts["named"] += 1
    columns = ("tries", "refused", "named", "same", "unnoticed", "failed")
    return [
        {"checkpoint": kind, "mutation": mutation, "checksums": sums, **{c: counts[c] for c in columns}}
        for (kind, mutation, sums), counts in sorted(groups.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=12000)
    parser.add_argument(
        "--start", type=int, default=0, help="first seed; a try is repeated with --start SEED --tries 1"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--show", action="store_true", help="print every outcome")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    done, growth = run(arguments.tries, arguments.start)
    rows = summarize(done)
    if arguments.show:
        for seed, (mutation, outcome, note) in sorted(done.items()):
            print(seed, kind_of(seed), mutation, outcome, ascii(note[:300]))
    for seed, (mutation, outcome, note) in sorted(done.items()):
        if outcome == "failed":
            print(f"FAILED seed {seed} ({kind_of(seed)}, {mutation}): {note[:400]!a}")
    totals = Counter(outcome for _, outcome, _ in done.values())
    unnoticed = sorted({m for m, outcome, _ in done.values() if outcome == "unnoticed"})
    seconds = time.perf_counter() - begun
    print(
        f"{len(done)} tries in {seconds:.0f} s: {totals['refused']} refused, {totals['same']} same, "
        f"{totals['unnoticed']} unnoticed without checksums ({', '.join(unnoticed)}), {totals['failed']} failed; "
        f"resident memory grew by at most {growth / 1024:.0f} MiB"
    )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(1 if totals["failed"] else 0)


if __name__ == "__main__":
    main()
