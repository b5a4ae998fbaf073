"""The inner loop of LDLQ: its backends against each other and against the grid's own encode and decode."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.grid import Grid, GridKind, GridSpec, ZeroPoint, decode, encode, fit_grid
from framequant.errors import ConfigError
from framequant.kernels import feedback
from framequant.kernels.feedback import GridTable, RoundedBlock, choose_backend, round_block

SPECS = [
    GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.UNIFORM, 5, ZeroPoint.FLOAT, group_size=3),
    GridSpec(GridKind.MIN_MAX, 2, ZeroPoint.INTEGER),
    GridSpec(GridKind.MIN_MAX, 256, ZeroPoint.INTEGER, group_size=7),
    GridSpec(GridKind.SEARCH, 8, per_tensor=True, scale_dtype="float32"),
    GridSpec(GridKind.LLOYD_MAX, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.LLOYD_MAX, 16, ZeroPoint.FLOAT, group_size=5),
    GridSpec(GridKind.LLOYD_MAX, 32),
]


def problem(
    rows: int, columns: int, spec: GridSpec, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    generator = torch.Generator().manual_seed(seed)
    work = torch.randn(columns, rows, generator=generator, dtype=torch.float64) + 0.3
    factor = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    factor = factor.triu(1) + torch.diag(1 + torch.rand(columns, generator=generator, dtype=torch.float64))
    return work, factor, fit_grid(work.T, spec)


def naive(
    work: torch.Tensor, factor: torch.Tensor, grid: Grid, columns: torch.Tensor, previous: torch.Tensor | None
) -> RoundedBlock:
    """One column at a time, by ``encode`` and ``decode``."""
    work, codes, values, solved = work.clone(), [], [], []
    for j, column in enumerate(columns.tolist()):
        code = encode(work[j, :, None], grid, column)
        value = decode(code, grid, column, dtype=torch.float64)[:, 0]
        error = ((work[j] if previous is None else previous[j]) - value) / factor[j, j]
        work[j + 1 :] -= factor[j, j + 1 :, None] * error
        codes.append(code[:, 0])
        values.append(value)
        solved.append(error)
    return RoundedBlock(torch.stack(codes), torch.stack(values), torch.stack(solved))


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind.value}-{spec.num_levels}")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 5), (40, 37), (3, 128)])
def test_backends_follow_the_grid(rows: int, columns: int, spec: GridSpec, backend: str, moves: bool) -> None:
    work, factor, grid = problem(rows, columns, spec)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    previous = work.roll(1, 0) if moves else None
    before = work.clone()
    got = round_block(work, factor, GridTable.of(grid, rows), order, previous=previous, backend=backend)
    expected = naive(work, factor, grid, order, previous)
    assert got.codes.dtype == torch.uint8
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.values, expected.values)
    torch.testing.assert_close(got.solved, expected.solved, rtol=1e-12, atol=1e-12)
    assert torch.equal(work, before)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 40), st.sampled_from(SPECS), st.integers(0, 1000))
def test_cpu_equals_torch(rows: int, columns: int, spec: GridSpec, seed: int) -> None:
    work, factor, grid = problem(rows, columns, spec, seed)
    table, order = GridTable.of(grid, rows), torch.arange(columns)
    plain, fast = (round_block(work, factor, table, order, backend=name) for name in ("torch", "cpu"))
    assert torch.equal(plain.codes, fast.codes)
    torch.testing.assert_close(plain.solved, fast.solved, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", SPECS[:2] + SPECS[5:7], ids=lambda spec: spec.kind.value)
def test_ties_go_where_encode_sends_them(spec: GridSpec, backend: str) -> None:
    """Scales of 1, values on all boundaries and far outside."""
    zeros = None if spec.zero_point is ZeroPoint.SYMMETRIC else torch.full((1, 1), 0.5)
    spec = GridSpec(spec.kind, spec.num_levels, spec.zero_point)
    levels = problem(1, 4, spec)[2].levels
    grid = Grid(spec, levels, torch.ones(1, 1), zeros)
    ends = torch.tensor([-1e300, 1e300], dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).double() - (0 if zeros is None else 0.5)
    work = torch.cat([middles, ends])[None]
    one = torch.ones(1, 1, dtype=torch.float64)
    got = round_block(work, one, GridTable.of(grid, work.shape[1]), torch.tensor([0]), backend=backend)
    assert torch.equal(got.codes, encode(work.T, Grid(spec, levels, torch.ones(1, 1), zeros)).T)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5]], ids=lambda spec: spec.kind.value)
def test_not_a_number_stays_visible(spec: GridSpec, backend: str) -> None:
    work, factor, grid = problem(20, 4, spec)
    work[1, 3] = torch.nan
    got = round_block(work, factor, GridTable.of(grid, 20), torch.arange(4), backend=backend)
    assert got.values[1:, 3].isnan().all()
    assert got.values.isnan().sum() == 3


def test_threads_and_empty_blocks() -> None:
    work, factor, grid = problem(83, 9, SPECS[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(round_block(work, factor, GridTable.of(grid, 83), torch.arange(9), backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for backend in ("torch", "cpu"):
        table = GridTable.of(grid, 83)
        assert round_block(
            work[:0], factor[:0, :0], table, torch.arange(0), backend=backend
        ).values.shape == (0, 83)


def test_errors_name_the_backend() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'triton'"):
        choose_backend("tritn", torch.device("cpu"))
    with pytest.raises(ConfigError, match="on the CPU"):
        choose_backend("cpu", torch.device("meta"))
    assert choose_backend("auto", torch.device("meta")) == "torch"


def test_without_numba_it_warns_once_and_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback.importlib.util, "find_spec", lambda name: None)
    feedback._installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba is not installed") as caught:
            assert [choose_backend("auto", torch.device("cpu")) for _ in range(3)] == ["torch"] * 3
        assert len(caught) == 1
    finally:
        feedback._installed.cache_clear()


def test_importing_the_package_loads_no_compiler() -> None:
    code = "import framequant, sys; assert not {'numba', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
