"""The cost model of ``benchmarks/simulate_scale.py``: right sizes, honest checks."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from benchmarks import simulate_scale
from benchmarks.scale_model import MODELS, Efficiency, Machine, Run, memory, rounding_flops, run_cost

TRUE = Efficiency(capture=0.31, rounding=0.17, forward=0.55)
DISKS = replace(Machine(), disk_read=2.1e9, disk_write=0.9e9)


@pytest.mark.parametrize(
    ("key", "size"), [("7b", 6.74e9), ("70b", 68.98e9), ("405b", 405.8e9), ("1t", 1.03e12)]
)
def test_shapes_have_their_parameters(key, size):
    assert MODELS[key].parameters == pytest.approx(size, rel=0.01)


def _row(shape, blocks, slower=1.0):
    seconds = run_cost(simulate_scale.of_blocks(MODELS[shape], 1), 1, Run(), DISKS, TRUE).seconds
    start = seconds.pop("start")
    block = slower * sum(seconds.values())
    return {
        **{
            "shape": shape,
            "blocks": MODELS[shape].layers,
            "blocks_measured": blocks,
            "samples": 128,
            "tokens": 2048,
        },
        **{f"block_{step}": slower * seconds[step] for step in simulate_scale.STEPS},
        **{
            "seconds": start + blocks * block,
            "seconds_first_block": start + block,
            "seconds_per_block": block,
        },
        **{"ranks": 1, "device": "NVIDIA H100"},
    }


def _measured(folder, *rows):
    with (folder / "load.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return simulate_scale.measured(folder)


def test_fitting_finds_the_rates_and_the_check_passes(tmp_path):
    rows = _measured(tmp_path, _row("70b", 3), _row("7b", 32))
    machine, efficiency, note, failed = simulate_scale.calibrate(rows, Run())
    for name in ("capture", "rounding", "forward"):
        assert getattr(efficiency, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)
    assert machine.disk_read == pytest.approx(DISKS.disk_read, rel=1e-6)
    assert machine.start == pytest.approx(DISKS.start, rel=1e-6)
    assert not failed
    assert "checked" in note
    assert "within" in note


def test_blocks_of_two_sizes_tell_operations_from_what_grows_otherwise(tmp_path, monkeypatch):
    true = replace(TRUE, capture_feature=3e-11, forward_feature=1e-11, column=2e-5)
    monkeypatch.setattr(f"{__name__}.TRUE", true)
    rows = _measured(tmp_path, _row("7b", 5), _row("70b", 3), _row("7b", 32))
    _, efficiency, note, failed = simulate_scale.calibrate(rows, Run())
    for name in ("capture", "rounding", "forward", "capture_feature", "forward_feature", "column"):
        assert getattr(efficiency, name) == pytest.approx(getattr(true, name), rel=1e-6)
    assert not failed
    assert "(+0%)" in note
    assert "alone predict it to" in note


@pytest.mark.parametrize("seconds", [(1.0, 0.1), (1.0, 30.0)])
def test_rates_that_no_measurements_share_are_all_operations(seconds):
    per_operation, other = simulate_scale.two_rates([(1.0, 2.0, seconds[0]), (10.0, 3.0, seconds[1])])
    assert per_operation > 0
    assert other == 0


def test_two_ranks_make_the_factor_beside_the_targets():
    block = MODELS["7b"].blocks[0][1]
    flops = rounding_flops(block, Run())
    assert flops.on(2) < flops.on(1)
    assert flops.on(2) == pytest.approx(flops.rows / 2 + max(flops.factor, flops.target + flops.solve))


def test_a_run_that_was_slower_than_predicted_fails_the_check(tmp_path):
    rows = _measured(tmp_path, _row("70b", 3), _row("7b", 32, slower=1.5))
    _, _, note, failed = simulate_scale.calibrate(rows, Run())
    assert failed
    assert "OUTSIDE" in note


@pytest.mark.parametrize("kinds", [[("70b", 3)], []])
def test_without_a_whole_run_it_says_so(tmp_path, kinds):
    rows = _measured(tmp_path, *(_row(*kind) for kind in kinds)) if kinds else []
    _, _, note, failed = simulate_scale.calibrate(rows, Run())
    assert "NOT CHECKED" in note
    assert not failed


def test_more_devices_never_take_longer_nor_cost_less():
    for key in ("405b", "1t"):
        rows = simulate_scale.table(MODELS[key], Run(), Machine(), Efficiency(), "test")
        hours = [row["hours"] for row in rows]
        assert hours == sorted(hours, reverse=True)
        assert [row["gpu_hours"] for row in rows] == sorted(row["gpu_hours"] for row in rows)
        assert rows[0]["network_tb"] == 0


def test_the_largest_linear_decides_the_memory_of_405b():
    need = memory(MODELS["405b"], 8, Run())
    assert need["rounding"] > 0.5 * need["device"] > 40e9
    assert need["activations"] == 128 * 2048 * 16384 * 2 * 2
