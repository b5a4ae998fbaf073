"""Two processes over gloo: the codes of one, and a rank that dies; see ``ranks.py``."""

import copy
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

from framequant.config import preset
from framequant.errors import CalibrationError, NumericalError
from framequant.model.group_sharing import quantize_shared
from framequant.model.ranks import Ranks, reduce_moments, require_batches, split_evenly
from framequant.quantizers.hessian import Moments
from framequant.quantizers.weight import quantize_group
from framequant.streaming.run import enough_batches
from tests.conftest import ROOT


def ranks(*arguments):
    command = [sys.executable, "-m", "tests.faults.ranks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_two_processes_choose_the_codes_of_one():
    result = ranks("--blocks", "3")
    found = re.findall(r"preset='([\w-]+)'.* share=([\d.e-]+).* relative=([\d.e-]+)", result.stdout)
    assert [name for name, *_ in found] == ["framequant-scalar", "framequant"], result.stderr
    for _, share, relative in found:
        assert float(share) <= 1e-3
        assert float(relative) <= 1e-4


@pytest.mark.slow
def test_two_processes_share_a_mixture():
    result = ranks("--model", "mixture", "--presets", "framequant", "--blocks", "2")
    found = re.search(r"share=([\d.e-]+).* relative=([\d.e-]+).* rates_differing=(\d+)", result.stdout)
    assert found, result.stderr
    assert float(found[1]) <= 1e-3
    assert float(found[2]) <= 1e-4
    assert found[3] == "0"


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_is_named_and_the_run_goes_on(victim):
    result = ranks("--kill", str(victim), "--blocks", "6")
    assert "byte-identical: True" in result.stdout, result.stderr
    assert re.search(r"[3-6] blocks were kept", result.stdout)
    named = f"rank {victim} (" if victim else "the rank that holds the rendezvous"
    assert f"{named}" in result.stderr
    assert "died or cannot be reached" in result.stderr
    assert "run the same command to go on" in result.stderr


@pytest.mark.slow
def test_two_hosts():
    result = ranks("--namespaces")
    if "Operation not permitted" in result.stderr or "No such file" in result.stderr:
        pytest.skip("network namespaces need root and ip")
    assert "two network namespaces: {" in result.stdout, result.stderr
    assert float(re.search(r"'share': ([\d.e-]+)", result.stdout)[1]) <= 1e-3


class HalfOfTwo(Ranks):
    """One of two ranks that hold the same data; sums double."""

    size = 2

    def add_(self, tensor):
        return tensor.mul_(2)

    def gather(self, value):
        return [value, value]


def test_moments_are_summed_and_what_one_rank_lacks_counts_as_zero():
    mine = Moments(3)
    mine.add(torch.ones(2, 3), torch.zeros(2, 3))
    total = reduce_moments(mine, HalfOfTwo(), torch.device("cpu"), torch.float32)
    assert total.count == 4
    assert torch.equal(total.hessian(), torch.ones(3, 3, dtype=torch.float64))
    unseen = reduce_moments(Moments(3), HalfOfTwo(), torch.device("cpu"), torch.float32)
    assert unseen.hessian_sum is None
    assert unseen.count == 0


class Threads(Ranks):
    """Processes that are threads of this one."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def gather_rows(self, rows, counts):
        assert len(rows) == counts[self.rank]
        return torch.cat(self.gather(rows.clone()))

    def share(self, value, owner):
        return self.gather(value)[owner]

    def sum(self, *values):
        return tuple(map(sum, zip(*self.gather(values), strict=True)))


def in_threads(size, run):
    """What ``run(ranks)`` gave on each of ``size`` ranks."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=60)
    ranks = [Threads(rank, size, board, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, one) for one in ranks]]


def linears_with_drift(tokens=100):
    """Weights of two linears, and moments with drift and residual deviations."""
    generator = torch.Generator().manual_seed(0)
    inputs, drift, stream = (torch.randn(tokens, width, generator=generator) for width in (24, 24, 7))
    moments = Moments(24)
    moments.add(inputs, inputs + 0.1 * drift)
    moments.add_residual("b", stream, inputs)
    weights = {"a": torch.randn(10, 24, generator=generator), "b": torch.randn(7, 24, generator=generator)}
    return weights, moments


@pytest.mark.parametrize("size", [2, 3, 12])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("framequant-scalar", {}),
        ("framequant-paper", {}),
        ("framequant-scalar", {"column_order": "descending"}),
        ("framequant-scalar", {"rounding": "nearest"}),
        ("framequant-scalar", {"denoise": "gain"}),
    ],
)
def test_rows_rounded_apart_are_the_rows_rounded_together(name, changes, size):
    weights, moments = linears_with_drift()
    configs = dict.fromkeys(weights, preset(name, **changes))
    whole = quantize_group(weights, moments, configs, "a")
    for joined in in_threads(size, lambda ranks: quantize_group(weights, moments, configs, "a", ranks)):
        for key in weights:
            for part, tensor in whole[key].tensors.items():
                assert torch.equal(tensor, joined[key].tensors[part]), part
            assert asdict(joined[key].loss) == pytest.approx(asdict(whole[key].loss), rel=1e-9)


@pytest.mark.parametrize("guilty", ["targets", "factor"])
def test_every_process_raises_what_one_of_them_could_not_make(guilty, monkeypatch):
    def fail(*_, **__):
        raise NumericalError("b: cannot be factored")

    weights, moments = linears_with_drift()
    configs = dict.fromkeys(weights, preset("framequant-scalar"))
    names = {"targets": "corrected", "factor": "ordered_factor"}
    monkeypatch.setattr(f"framequant.quantizers.weight.{names[guilty]}", fail)

    def run(ranks):
        with pytest.raises(NumericalError, match="cannot be factored"):
            quantize_group(weights, moments, configs, "a", ranks)
        return True

    assert in_threads(3, run) == [True] * 3


def test_one_rank_is_quantize_group():
    moments = Moments(24)
    moments.add(torch.randn(100, 24))
    weights = {"a": torch.randn(10, 24)}
    configs = {"a": preset("framequant-scalar")}
    alone = quantize_shared(weights, copy.deepcopy(moments), configs, "a", Ranks())
    assert torch.equal(
        alone["a"].tensors["packed_codes"],
        quantize_group(weights, moments, configs, "a")["a"].tensors["packed_codes"],
    )


def test_names_are_dealt_out_evenly():
    shares = split_evenly({"a": 5, "b": 4, "c": 3, "d": 2}, 2)
    assert shares == [["a", "d"], ["b", "c"]]
    assert split_evenly({"a": 1}, 3) == [["a"], [], []]


def test_every_rank_gets_a_batch():
    cut = enough_batches([torch.zeros(8, 4)], 3)
    assert sum(len(batch) for batch in cut) == 8
    require_batches(cut, HalfOfTwo())
    with pytest.raises(CalibrationError, match="cannot be dealt out to 2 ranks"):
        require_batches([torch.zeros(1, 4)], HalfOfTwo())
