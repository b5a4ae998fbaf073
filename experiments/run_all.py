"""Every experiment of the paper, one after another, and the page.

    python experiments/run_all.py --quick     # two CPU cores, under 20 minutes
    python experiments/run_all.py --full      # one H100, under 25 minutes
    python experiments/run_all.py --full --add --only tables --only ablations     # in pieces

Each stage is timed and its end is a row of ``run_all.csv``; one that fails says why and the rest goes on. The page,
``page.html``, lies beside the tables.
"""

from __future__ import annotations

import importlib
import time
from argparse import Namespace
from collections.abc import Sequence

from bench import RESULTS, Record, parse, parser, read_rows, reason

from framequant.report.page import write_page
from framequant.report.results import collect

#: Stage, and the options it has in a full run besides those that were given.
STAGES: dict[str, list[str]] = {
    "tables": ["--tasks", "200"],
    "ablations": ["--windows", "48", "--samples", "64"],
    "storage": [],
    "activations": ["--windows", "48"],
    "mixed_precision": ["--windows", "48"],
    "denoising": ["--windows", "48"],
    "one_bit": ["--windows", "48"],
    "scaling": ["--windows", "48"],
    "pictures": [],
    "peers": [],
    "claims": [],
}


#: Stages whose module is named otherwise.
MODULES = {"peers": "peers.run"}


def stage_arguments(stage: str, args: Namespace) -> list[str]:
    """The command line of a stage."""
    words = ["--out", str(args.out), "--device", args.device, "--seed", str(args.seed)]
    words += ["--quick"] if args.quick else STAGES[stage]
    words += ["--add"] if args.add else []
    for name in ("samples", "length", "windows", "images", "pairs"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    for model in args.model or []:
        words += ["--model", model]
    return words


def expected(mode: str) -> dict[str, tuple[float, str]]:
    """Seconds of every stage in the committed run of this kind, and the machine that it ran on."""
    rows = [row for row in read_rows(RESULTS / "run_all.csv") if mode in row.get("command", "").split()]
    return {row["stage"]: (float(row["seconds"]), row["device"]) for row in rows if "seconds" in row}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="all data and all rows, for a GPU")
    options.add_argument("--only", action="append", choices=list(STAGES), help="stages to run; repeatable")
    args = parse(options, __file__, argv)
    if args.quick == args.full:
        options.error("give --quick or --full")
    record = Record(args, "run_all")
    start, known = time.perf_counter(), expected("--quick" if args.quick else "--full")
    for stage in args.only or STAGES:
        began = time.perf_counter()
        seconds, machine = known.get(stage, (0.0, ""))
        print(f"== {stage}" + (f", {seconds:.0f} s on {machine}" if seconds else ""), flush=True)
        try:
            importlib.import_module(MODULES.get(stage, stage)).main(stage_arguments(stage, args))
            outcome = "done"
        except (Exception, SystemExit) as error:  # whatever a stage ends with, the next ones still run
            outcome = reason(error)
        record.add(stage=stage, outcome=outcome, seconds=round(time.perf_counter() - began, 1))
    record.add(stage="all", outcome="done", seconds=round(time.perf_counter() - start, 1))
    record.plots("How long it took", f"{'Quick' if args.quick else 'Full'} run on {record.origin['device']}.")
    first = [args.out / f"{name}.csv" for name in ("claims", *STAGES) if (args.out / f"{name}.csv").is_file()]
    page = args.out / "page.html"
    size = write_page(collect([*first, args.out]), page, "FrameQuant: the paper's experiments")
    print(f"{page}: {size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
