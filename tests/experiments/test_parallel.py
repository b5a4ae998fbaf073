"""Runs of experiments in several processes: tables are put together, failures are told, finished parts are kept."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import parallel as module

    yield module
    for name in ("parallel", "bench", "run_all", "claims", "tables"):
        sys.modules.pop(name, None)


def part(folder, rows, plots=("plot",)):
    folder.mkdir(parents=True)
    with (folder / "tables.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = {"title": "T", "text": "t", "plots": list(plots)}
    (folder / "tables.plots.json").write_text(json.dumps(data))


def row(model, method, **more):
    return {"model": model, "method": method, **more, "seed": 0, "commit": "c", "device": "d", "command": "x"}


def test_rows_of_all_parts_stand_once_in_the_order_of_the_parts(parallel, tmp_path):
    part(tmp_path / "a", [row("m", "float", top1=1), row("m", "RTN", top1=2)])
    part(tmp_path / "b", [row("m", "float", kl=3), row("n", "RTN", kl=4)], ["plot", "other"])
    (tmp_path / "b" / "picture.png").write_bytes(b"p")
    (tmp_path / "b" / "runs").mkdir()
    parallel.put_together([tmp_path / "b", tmp_path / "a", tmp_path / "none"], tmp_path / "out")
    with (tmp_path / "out" / "tables.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [(each["model"], each["method"]) for each in found] == [("m", "float"), ("n", "RTN"), ("m", "RTN")]
    assert found[0]["kl"] == "3"
    assert list(found[0])[-4:] == ["seed", "commit", "device", "command"]
    plots = json.loads((tmp_path / "out" / "tables.plots.json").read_text())
    assert plots["plots"] == ["plot", "other"]
    assert (tmp_path / "out" / "picture.png").is_file()
    assert (tmp_path / "out" / "runs").is_dir()


def test_a_part_that_fails_is_told_and_one_that_ended_well_is_kept(parallel, tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'n').open('a').write('x')"
    jobs = [
        parallel.Job("good", ["-c", write, str(tmp_path / "good")], tmp_path / "good"),
        parallel.Job("bad", ["-c", "raise SystemExit('no data')"], tmp_path / "bad"),
    ]
    ends: dict[str, list[str]] = {"good": [], "bad": []}
    for again in (True, False, True):
        parallel.run_jobs(
            jobs, 2, tmp_path / "out", lambda job, outcome, seconds: ends[job.stage].append(outcome), again
        )
        counted = (tmp_path / "good" / "n").read_text()
        assert counted == "x"  # kept by the second run, begun anew by the third
    assert ends["good"] == ["done"] * 3
    assert ends["bad"] == ["exit code 1: no data"] * 3


def test_every_stage_and_every_part_of_it_has_a_process(parallel, tmp_path, monkeypatch):
    import run_all

    seen = []
    monkeypatch.setattr(run_all, "run_jobs", lambda jobs, at_once, out, ended, again: seen.extend(jobs))
    monkeypatch.setattr(run_all, "write_page", lambda *_: 0)
    run_all.main(["--full", "--jobs", "3", "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert {job.stage for job in seen} == set(run_all.STAGES) - {"claims"}
    assert len({job.folder for job in seen}) == len(seen)
    tables = [job.words for job in seen if job.stage == "tables"]
    assert len(tables) == 3 * len(run_all.TABLE_PARTS)
    assert all((ROOT / job.words[0]).is_file() for job in seen)
    covered = [name for job in seen if job.stage == "ablations" for name in job.words[-1:]]
    assert covered == list(run_all.ABLATIONS)
    with pytest.raises(SystemExit):
        run_all.main(["--quick", "--jobs", "3"])


def test_parts_of_the_tables_have_every_row_once(parallel):
    import run_all
    import tables

    for bits in ("2", "3", "4"):
        rows = list(tables.rows(int(bits), tables.REDUNDANCIES, ""))
        parts = [tables.part(part) for width, part in run_all.TABLE_PARTS if width == bits]
        assert [row for part in parts for row in tables.piece(rows, *part)] == rows
    for wrong in ("2", "0/2", "3/2", "a/b", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no part"):
            tables.part(wrong)


def test_models_that_are_given_go_to_every_stage_once(parallel, tmp_path):
    import run_all
    from bench import parser

    args = parser("").parse_args(["--model", "one", "--model", "two", "--out", str(tmp_path / "out")])
    for job in run_all.jobs_of(["tables", "one_bit"], args):
        named = [word for option, word in itertools.pairwise(job.words) if option == "--model"]
        assert named == (["one", "two"] if job.stage == "one_bit" else [named[0]])
