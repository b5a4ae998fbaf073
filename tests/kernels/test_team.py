"""A product on the CPU that several threads share: the same bits whoever took what, and nobody left waiting."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from framequant.kernels import cpu, openmp
from tests.kernels.test_cpu import CODES, make_layer

pytest.importorskip("numba")

from framequant.kernels import product_cpu, team_cpu

needs_openmp = pytest.mark.skipif(openmp.fork_address() == 0, reason="torch has no libgomp here")


@pytest.fixture
def shared(monkeypatch):
    """Every product is shared out, to three threads."""
    monkeypatch.setattr(cpu, "SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@needs_openmp
@pytest.mark.parametrize("code", [CODES[0], CODES[4], CODES[7], CODES[9]], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_threads_change_no_bit(code, tokens, monkeypatch, request):
    layer, x = make_layer(code, (100, 700)), torch.randn(tokens, 100)
    monkeypatch.setattr(cpu, "SHARED", 1 << 60)
    alone = layer(x)
    request.getfixturevalue("shared")
    monkeypatch.setattr(product_cpu, "linear", lambda *_: pytest.fail("one thread"))
    for _ in range(300):
        assert torch.equal(layer(x), alone)


def test_a_thread_does_all_that_nobody_else_takes():
    layer, x = make_layer(CODES[7], (100, 700)), torch.randn(1, 100)
    layer(x)
    plan = layer._plan()
    z, totals, units = product_cpu.prepare(x.data_ptr(), 1, 0, 2, plan.header)
    expected, found = (np.zeros((1, plan.rows)) for _ in range(2))
    product_cpu.multiply(z, totals, units, 2, plan.header, expected, 0, plan.rows)
    job = np.array(
        [
            *(0, plan.rows, 48, z.ctypes.data, *z.shape, totals.ctypes.data, units.ctypes.data, 1, 2),
            *(plan.header.ctypes.data, found.ctypes.data),
        ]
    )
    team_cpu._take_part(job)
    assert np.array_equal(found, expected)
    assert job[team_cpu.NEXT] >= plan.rows
    team_cpu._take_part(job)  # nothing is left
    assert np.array_equal(found, expected)


def test_callers_at_one_time_get_their_own_results(shared):
    layers = [make_layer(code, (100, 700)) for code in CODES[:4]]
    x = [torch.randn(1, 100) for _ in layers]
    expected = [layer(value) for layer, value in zip(layers, x, strict=True)]
    wrong: list[int] = []

    def call(number):
        for _ in range(300):
            if not torch.equal(layers[number](x[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize("code", [CODES[0], CODES[7]], ids=str)
def test_without_openmp_one_thread_serves_or_a_pool(code, shared, monkeypatch):
    layer, x = make_layer(code, (100, 700)), torch.randn(3, 100)
    expected = layer(x)
    monkeypatch.setattr(openmp, "_loaded", list)
    assert openmp.fork_address.__wrapped__() == 0
    monkeypatch.setattr(openmp, "fork_address", lambda: 0)
    assert torch.equal(layer(x), expected)
    asked = []
    monkeypatch.setattr(cpu, "POOLED", 0)
    monkeypatch.setattr(cpu, "share", lambda *args, share=cpu.share: (asked.append(args[2]), share(*args)))
    assert torch.equal(layer(x), expected)
    assert asked == [3]


def _child(layer, x, results):
    results.put(layer(x).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_does_not_wait_for_threads_left_behind(shared):
    layer, x = make_layer(CODES[7], (100, 700)), torch.randn(1, 100)
    expected = layer(x)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(layer, x, results))
    child.start()
    assert np.array_equal(results.get(timeout=60), expected.numpy())
    child.join(60)
    assert child.exitcode == 0
