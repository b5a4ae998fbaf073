"""Stages of a run side by side, each a process of its own with tables of its own, put together as they end.

A GPU that works for one small model is idle most of the time. Every job writes into a folder beside the results; rows
of a table that several jobs wrote keep the order of the jobs, and the plots are those of all of them.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT, Row, identity, read_rows, write

from framequant.report.results import PLOTS_SUFFIX

#: Columns that say where a row comes from; they stand last in a table.
ORIGIN = ("seed", "commit", "device", "command")


@dataclass
class Job:
    """One process.

    Attributes:
        stage: whose rows it makes.
        words: its command line after ``python``.
        folder: where it writes its tables and its log.
    """

    stage: str
    words: list[str]
    folder: Path

    @property
    def done(self) -> Path:
        """A file that says that it ended well, and after how many seconds."""
        return self.folder / "seconds.txt"

    def run(self, threads: int) -> tuple[str, float]:
        """Run it with so many threads, unless it was done before; what came of it, and its seconds."""
        if self.done.is_file():
            return "done", float(self.done.read_text(encoding="utf-8"))
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with (self.folder / "log.txt").open("w", encoding="utf-8") as log:
            print(shlex.join(["python", *self.words]), file=log, flush=True)
            done = subprocess.run(
                [sys.executable, *self.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        seconds = round(time.perf_counter() - start, 1)
        if done.returncode:
            last = (self.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            return f"exit code {done.returncode}: {' '.join(last)}"[:300], seconds
        self.done.write_text(f"{seconds}", encoding="utf-8")
        return "done", seconds


def run_jobs(
    jobs: Sequence[Job], at_once: int, out: Path, ended: Callable[[Job, str, float], None], again: bool
) -> None:
    """Run jobs, so many at once, and put their tables together after each.

    Args:
        jobs: those that take longest first.
        at_once: processes at a time.
        out: folder of the tables.
        ended: called after each with what came of it and its seconds.
        again: run those, too, that ended well in an earlier run.
    """
    if again:
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
    threads = max((os.cpu_count() or 1) // at_once, 1)
    with ThreadPoolExecutor(at_once) as pool:
        pending = {pool.submit(job.run, threads): job for job in jobs}
        for future in as_completed(pending):
            put_together([job.folder for job in jobs], out)
            ended(pending[future], *future.result())


def put_together(folders: Sequence[Path], out: Path) -> None:
    """Write every table that lies in some of the folders as one, with its plots and pictures."""
    present = [folder for folder in folders if folder.is_dir()]
    names = dict.fromkeys(path.name for folder in present for path in sorted(folder.glob("*.csv")))
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        parts = [folder / name for folder in present if (folder / name).is_file()]
        rows: dict[tuple[str, ...], Row] = {}
        for part in parts:
            for row in read_rows(part):
                rows.setdefault(identity(row), row)
        write(list(rows.values()), out / name, dict.fromkeys(ORIGIN, ""))
        _put_plots_together(parts, out / name)
    for path in (path for folder in present for path in folder.iterdir()):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.suffix == ".png":
            shutil.copy(path, out)


def _put_plots_together(tables: Sequence[Path], out: Path) -> None:
    files = [table.with_name(table.stem + PLOTS_SUFFIX) for table in tables]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    if not found:
        return
    plots: list[object] = []
    for one in found:
        plots += [plot for plot in one["plots"] if plot not in plots]
    data = {**found[0], "plots": plots}
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    out.with_name(out.stem + PLOTS_SUFFIX).write_text(text, encoding="utf-8")
