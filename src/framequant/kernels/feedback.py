"""Round a block of adjacent columns with error feedback inside it: the inner loop of LDLQ and of refinement.

Everything is transposed, (columns, rows), so that a column lies contiguous and rows, which never interact,
are lanes. ``round_block`` takes a choice of backend as an argument: ``"torch"`` (the oracle, any device),
``"cpu"`` (numba, compiled on first use and cached on disk), ``"triton"`` (one warp for a few rows). All are
float64 and choose codes by the rule of ``codes.grid.encode``; the compiled two also add in the same order,
without contraction to fused operations. Importing this module loads neither numba nor triton.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int, UInt8
from torch import Tensor

from framequant.codes.grid import Grid
from framequant.errors import ConfigError, nearest

BACKENDS = ("auto", "torch", "cpu", "triton")
_INNER_COLUMNS = 16  # the torch path feeds errors forward within so many columns, then by a matrix product


@dataclass(frozen=True)
class GridTable:
    """A fitted grid as the inner loop reads it: float64, a line per group, rows adjacent.

    A value v gets the unit ``v / scale + offset``; uniform grids round it to a code, others compare it with
    the ``middles``. The code stands for ``(level[code] - zero_point) * scale``.

    Attributes:
        scales: (groups, rows).
        offsets: (groups, rows), zero points, for uniform grids less the first level.
        zero_points: (groups, rows), zeros for a symmetric grid.
        levels: (levels,), ascending.
        middles: (levels - 1,), where the code changes; None for a uniform grid.
        group_size: columns of a group; None if there is one.
    """

    scales: Float64[Tensor, "groups rows"]
    offsets: Float64[Tensor, "groups rows"]
    zero_points: Float64[Tensor, "groups rows"]
    levels: Float64[Tensor, " levels"]
    middles: Float64[Tensor, " middles"] | None
    group_size: int | None

    @classmethod
    def of(cls, grid: Grid, rows: int) -> GridTable:
        """Spread a grid over ``rows`` rows; sums that ``encode`` takes in float32 are taken so here too."""
        zeros = torch.zeros_like(grid.scales) if grid.zero_points is None else grid.zero_points
        offsets = zeros - grid.spec.first_level if grid.spec.is_uniform else zeros
        middles = None if grid.spec.is_uniform else ((grid.levels[1:] + grid.levels[:-1]) / 2).double()

        def lines(tensor: Tensor) -> Tensor:
            return tensor.double().expand(rows, -1).T.contiguous()

        return cls(
            scales=lines(grid.scales),
            offsets=lines(offsets),
            zero_points=lines(zeros),
            levels=grid.levels.double(),
            middles=middles,
            group_size=grid.spec.group_size,
        )

    def groups(self, columns: Int[Tensor, " columns"]) -> Int[Tensor, " columns"]:
        """Return the group of each column."""
        return torch.zeros_like(columns) if self.group_size is None else columns // self.group_size


class RoundedBlock(NamedTuple):
    """What ``round_block`` returns, each of shape (columns, rows).

    Attributes:
        codes: uint8.
        values: what the codes stand for.
        solved: the errors over the pivots, by which columns after the block have to be corrected.
    """

    codes: UInt8[Tensor, "columns rows"]
    values: Float64[Tensor, "columns rows"]
    solved: Float64[Tensor, "columns rows"]


def choose_backend(backend: str, device: torch.device) -> str:
    """Turn ``"auto"`` into a backend for ``device``; without numba or triton warn once and take torch.

    Raises:
        ConfigError: an unknown name, or a backend that cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown feedback backend {backend!r}.{nearest(backend, BACKENDS)}")
    if backend == "auto":
        wanted = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
        return wanted if _installed({"cpu": "numba", "triton": "triton"}.get(wanted)) else "torch"
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"the feedback backend 'cpu' needs tensors on the CPU, not on {device}")
    return backend


@functools.cache
def _installed(package: str | None) -> bool:
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    warnings.warn(
        f"{package} is not installed: LDLQ falls back to plain torch, several times slower", stacklevel=4
    )
    return False


def round_block(
    work: Float64[Tensor, "columns rows"],
    factor: Float64[Tensor, "columns columns"],
    table: GridTable,
    columns: Int[Tensor, " columns"],
    *,
    previous: Float64[Tensor, "columns rows"] | None = None,
    backend: str = "auto",
) -> RoundedBlock:
    """Round the columns of a block in turn, each after it was corrected by those before it.

    With x the corrected column j and v its nearest value, ``solved[j] = (x - v) / factor[j, j]``, and column
    ``k > j`` loses ``solved[j] * factor[j, k]``. With ``previous`` the error is ``previous[j] - v`` instead:
    what a column *moved* corrects the others, as coordinate descent has it.

    Args:
        work: the block, not changed.
        factor: only its upper triangle is read.
        table: grid of all rows.
        columns: position of each column in the matrix that the grid was fitted to, on the same device.
        previous: values of the columns before the call.
        backend: ``"auto"``, ``"torch"``, ``"cpu"`` or ``"triton"``.

    Returns:
        New tensors. A value that is not a number stays so, whatever its code. Backends may differ where a
        value lies on a boundary to the last bits, and in what follows from that.

    Raises:
        ConfigError: an unknown backend, or one that cannot run on the device.

    Cost:
        rows · columns² / 2 multiply-adds; each backend is meant for some 128 columns at a time.
    """
    backend = choose_backend(backend, work.device)
    if backend == "torch":
        return _round_torch(work, factor, table, columns, previous)
    work = work.contiguous()
    previous = None if previous is None else previous.contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    result = RoundedBlock(codes, torch.empty_like(work), torch.empty_like(work))
    if work.numel() == 0:
        return result
    if backend == "triton":
        from framequant.kernels import feedback_triton

        feedback_triton.round_block(work, factor, table, table.groups(columns), previous, *result)
    else:
        from framequant.kernels import feedback_cpu

        middles = torch.empty(0, dtype=torch.float64) if table.middles is None else table.middles
        feedback_cpu.round_block(
            work.numpy(),
            factor.T.contiguous().numpy(),
            tuple(x.numpy() for x in (table.scales, table.offsets, table.zero_points, table.levels, middles)),
            table.groups(columns).numpy(),
            work[:0].numpy() if previous is None else previous.numpy(),
            tuple(x.numpy() for x in result),
            torch.get_num_threads(),
        )
    return result


def _round_torch(
    work: Tensor, factor: Tensor, table: GridTable, columns: Tensor, previous: Tensor | None
) -> RoundedBlock:
    work = work.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    values, solved = torch.empty_like(work), torch.empty_like(work)
    groups, count = table.groups(columns).tolist(), len(work)
    for start in range(0, count, _INNER_COLUMNS):
        stop = min(start + _INNER_COLUMNS, count)
        for j in range(start, stop):
            codes[j], values[j] = _nearest_level(work[j], table, groups[j])
            error = (work[j] if previous is None else previous[j]) - values[j]
            solved[j] = error / factor[j, j]
            work[j + 1 : stop].addcmul_(factor[j, j + 1 : stop, None], solved[j], value=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, solved[start:stop], alpha=-1)
    return RoundedBlock(codes, values, solved)


def _nearest_level(column: Tensor, table: GridTable, group: int) -> tuple[Tensor, Tensor]:
    scales, zeros = table.scales[group], table.zero_points[group]
    units = column / scales + table.offsets[group]
    if table.middles is None:
        units = units.round_().clamp_(0, len(table.levels) - 1)
        return units.to(torch.uint8), (units + table.levels[0] - zeros) * scales
    codes = torch.bucketize(units, table.middles, out_int32=True)
    values = (table.levels[codes] - zeros) * scales
    return codes.to(torch.uint8), torch.where(units.isnan(), units, values)
