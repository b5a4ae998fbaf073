"""Every experiment of the paper, one after another, and the page.

    python experiments/run_all.py --quick             # two CPU cores, under 20 minutes
    python experiments/run_all.py --full --jobs 8     # one H100 and 16 cores, under 25 minutes
    python experiments/run_all.py --full --add --only tables --only ablations     # in pieces

Each stage is timed and its end is a row of ``run_all.csv``; one that fails says why and the rest goes on. The page,
``page.html``, lies beside the tables. A full run is cut into processes, each with a stage or part of one, ``--jobs`` of
them at a time; their tables and logs are kept in ``OUT.parts/``, and ``--add`` takes those that ended well before.
"""

from __future__ import annotations

import importlib
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from bench import RESULTS, Record, default_models, parse, parser, read_rows, reason
from parallel import Job, run_jobs

from framequant.report.page import write_page
from framequant.report.results import collect

#: Stages, with the options that each has in a full run besides those that were given.
STAGES: dict[str, list[str]] = {
    "tables": ["--tasks", "100"],
    "ablations": ["--windows", "24", "--samples", "32"],
    "storage": [],
    "activations": ["--windows", "48", "--samples", "64"],
    "mixed_precision": ["--windows", "48", "--samples", "64"],
    "denoising": ["--windows", "48", "--samples", "64"],
    "one_bit": ["--windows", "48", "--samples", "64"],
    "scaling": ["--windows", "48", "--samples", "64"],
    "pictures": [],
    "peers": ["--windows", "100"],
    "claims": [],
}

#: What the tables of a full run take of the first model's text, of which a row with all would take a minute.
LANGUAGE_TABLES = ["--windows", "100", "--samples", "64"]
#: Parts of the tables, those with the most rows first: bits of a code, and which of the rows.
TABLE_PARTS = (("2", "1/2"), ("2", "2/2"), ("3", "1/1"), ("4", "1/1"))
#: Stages that take longest, which start first.
LONG = ("tables", "scaling", "ablations")
ABLATIONS = ("clip", "no clip", "transform", "damping", "order", "sides", "samples", "seeds")

#: Stages whose module is named otherwise.
MODULES = {"peers": "peers.run"}


def stage_arguments(stage: str, args: Namespace, out: Path, models: Sequence[str]) -> list[str]:
    """The command line of a stage for these models, its own if there are none, that writes its tables into a folder."""
    words = ["--out", str(out), "--device", args.device, "--seed", str(args.seed)]
    words += ["--quick"] if args.quick else STAGES[stage]
    words += ["--add"] if args.add and out == args.out else []
    for name in ("dtype", "samples", "length", "windows", "images", "pairs"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    for model in models:
        words += ["--model", model]
    return words


def parts_of(stage: str, args: Namespace) -> list[list[str]]:
    """The options of the processes that a stage of a full run is cut into, those that take longest first."""
    if stage == "tables":
        models = args.model or default_models()
        language = {} if args.model else {models[0]: LANGUAGE_TABLES}
        return [
            ["--model", model, "--bits", bits, "--part", part, *language.get(model, [])]
            for model in models
            for bits, part in TABLE_PARTS
        ]
    if stage == "ablations":
        return [["--only", name] for name in ABLATIONS]
    return [[]]


def jobs_of(stages: Sequence[str], args: Namespace) -> list[Job]:
    """All processes of a run but that of ``claims``, which reads the tables of the others."""
    made = []
    for stage in sorted(stages, key=lambda stage: LONG.index(stage) if stage in LONG else len(LONG)):
        for number, words in enumerate(parts_of(stage, args) if stage != "claims" else []):
            folder = args.out.with_name(f"{args.out.name}.parts") / f"{stage}-{number}"
            script = f"experiments/{MODULES.get(stage, stage).replace('.', '/')}.py"
            models = [] if "--model" in words else args.model or []
            made.append(Job(stage, [script, *stage_arguments(stage, args, folder, models), *words], folder))
    return made


def expected(mode: str) -> dict[str, tuple[float, str]]:
    """Seconds of every stage in the committed run of this kind, and the machine that it ran on."""
    rows = [row for row in read_rows(RESULTS / "run_all.csv") if mode in row.get("command", "").split()]
    return {row["stage"]: (float(row["seconds"]), row["device"]) for row in rows if "seconds" in row}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="all data and all rows, for a GPU")
    options.add_argument("--only", action="append", choices=list(STAGES), help="stages to run; repeatable")
    options.add_argument("--jobs", type=int, default=1, help="processes at a time")
    args = parse(options, __file__, argv)
    if args.quick == args.full:
        options.error("give --quick or --full")
    if args.jobs < 1 or (args.jobs > 1 and args.quick):
        options.error("--jobs is a number of processes for --full")
    record = Record(args, "run_all")
    start, known = time.perf_counter(), expected("--quick" if args.quick else "--full")
    stages = args.only or list(STAGES)
    if args.full:

        def ended(job: Job, outcome: str, seconds: float) -> None:
            record.add(stage=job.folder.name, outcome=outcome, seconds=seconds)

        run_jobs(jobs_of(stages, args), args.jobs, args.out, ended, again=not args.add)
        stages = [stage for stage in stages if stage == "claims"]
    for stage in stages:
        began = time.perf_counter()
        seconds, machine = known.get(stage, (0.0, ""))
        print(f"== {stage}" + (f", {seconds:.0f} s on {machine}" if seconds else ""), flush=True)
        try:
            importlib.import_module(MODULES.get(stage, stage)).main(
                stage_arguments(stage, args, args.out, args.model or [])
            )
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
