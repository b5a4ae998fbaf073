"""Launches that are measured on a GPU once: what is tried, what is chosen, what is kept."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from framequant.kernels import launches, tuned, tuning
from framequant.kernels.tuned import Knob

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "choices", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU (40 GB)")
    tuning.prepare.cache_clear()
    tuning._tell.cache_clear()


class Linear:
    """Takes as long as its launches say, and knows which of them are wrong or do not fit."""

    def __init__(self, time, wrong=lambda tile: False, fails=lambda tile: False):
        self.time, self.wrong, self.fails, self.calls = time, wrong, fails, 0

    def tile(self):
        return launches.byte_tile(4096, 1)

    def __call__(self):
        self.calls += 1
        launches.lanes_pay(True, 4096, False)
        if self.fails(self.tile()):
            raise RuntimeError("out of shared memory")

    def problem(self):
        try:
            self()
        except RuntimeError as failure:
            return str(failure)
        return "wrong" if self.wrong(self.tile()) else ""


def tune(linear, monkeypatch):
    monkeypatch.setattr(tuning, "seconds", lambda run: (run(), linear.time(linear.tile()))[1])
    return tuning.checked(linear, linear.problem, GPU)


def test_the_fastest_right_launch_is_chosen_and_kept(monkeypatch, caplog):
    usual = launches.byte_tile(4096, 1)
    linear = Linear(lambda tile: 10.0 - tile.stages - tile.held, lambda tile: tile.held == 2)
    with caplog.at_level(logging.WARNING, "framequant"):
        assert tune(linear, monkeypatch) == ""
    assert "Some GPU (40 GB)" in caplog.text
    assert "FRAMEQUANT_TUNING=0" in caplog.text
    chosen = launches.byte_tile(4096, 1)
    assert chosen.stages == 4
    assert chosen.held == usual.held
    assert launches.lanes_pay(True, 4096, False) is True  # no difference: as it was
    kept = json.loads(tuning.path(GPU).read_text())
    assert kept == {"byte_tile(4096, 1)": list(chosen), "lanes_pay(1, 4096, 0)": True}
    calls = linear.calls
    assert tune(linear, monkeypatch) == ""
    assert linear.calls == calls + 2


def test_the_next_process_reads_what_was_kept(monkeypatch):
    usual = launches.byte_tile(4096, 1)
    wanted = usual._replace(stages=2)
    tuning.path(GPU).parent.mkdir(parents=True)
    tuning.path(GPU).write_text(json.dumps({"byte_tile(4096, 1)": list(wanted), "other": None}))
    tuning.prepare(GPU)
    assert launches.byte_tile(4096, 1) == wanted
    assert launches.byte_tile(4096, 2) == usual


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "no json"])
def test_a_file_that_makes_no_sense_is_as_good_as_none(text):
    tuning.path(GPU).parent.mkdir(parents=True)
    tuning.path(GPU).write_text(text)
    tuning.prepare(GPU)
    assert tuned.choices == {}


def test_launches_that_fail_are_not_chosen(monkeypatch):
    usual = launches.byte_tile(4096, 1)
    linear = Linear(lambda tile: 1.0 / (tile == usual or 10), fails=lambda tile: tile != usual)
    assert tune(linear, monkeypatch) == ""
    assert launches.byte_tile(4096, 1) == usual


def test_a_small_gain_is_not_worth_another_launch(monkeypatch):
    usual = launches.byte_tile(4096, 1)
    tune(Linear(lambda tile: 1.0 if tile == usual else 0.99), monkeypatch)
    assert launches.byte_tile(4096, 1) == usual


def test_what_was_measured_on_this_gpu_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    asked = {Knob("byte_tile", (4096, 1)): None, Knob("lane_tokens_pay", (28672, 9216, 16, 1, 132)): True}
    assert tuning.open_knobs(asked, "NVIDIA H100 80GB HBM3") == {}
    assert len(tuning.open_knobs(asked, "NVIDIA A100")) == 2
    linear = Linear(lambda tile: float(tile.stages))
    tune(linear, monkeypatch)
    assert tuned.choices == {}


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FRAMEQUANT_TUNING", "0")
    assert tune(Linear(lambda tile: float(tile.stages)), monkeypatch) == ""
    assert tuned.choices == {}
    assert not tuning.path(GPU).exists()


def test_on_a_cpu_nothing_is_measured():
    linear = Linear(lambda tile: 1.0)
    assert tuning.checked(linear, linear.problem, torch.device("cpu")) == ""
    assert tuned.choices == {}


def test_a_folder_that_cannot_be_written_is_told(monkeypatch, tmp_path, caplog):
    (tmp_path / "framequant").write_text("a file")
    with caplog.at_level(logging.WARNING, "framequant"):
        tune(Linear(lambda tile: float(tile.stages)), monkeypatch)
    assert "could not keep" in caplog.text
    assert launches.byte_tile(4096, 1).stages == 2


def test_lanes_have_other_launches_that_take_all_bytes():
    usual = launches.lane_launch(22016, 2304, 132)
    others = launches.lane_alternatives(usual, 22016, 2304, 132)
    assert usual not in others
    assert len(others) > 2
    assert all(how.warps_k * how.chunks * how.rounds * launches.LANE_CHUNK >= 2304 for how in others)


@pytest.mark.parametrize("row_bytes", [1024, 2048])
def test_a_trellis_tries_two_programs_side_by_side(row_bytes):
    usual = launches.trellis_launch(22016, row_bytes, 132)
    others = list(tuning.alternatives(Knob("trellis_launch", (22016, row_bytes, 132)), usual))
    assert 1 <= len(others) <= 2
    assert others[0].programs == 264
    assert all(how.chunks == 2 and how.warps_k * how.chunks * how.rounds * 64 >= row_bytes for how in others)
