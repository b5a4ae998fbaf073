"""The inner loop of LDLQ on the CPU, compiled by numba: ``_ROWS`` rows at a time, threads over rows.

The errors of the columns before, for the rows in hand, lie in a tile that fits the first cache; a column is
corrected by all of them just before it is rounded, four at a time to spare loads, in the order of columns.

Only ``framequant.kernels.feedback`` imports this module, and only when numba is present. Imports numba and
numpy, no torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

_ROWS = 16


@njit(nogil=True, cache=True, error_model="numpy")
def _round_rows(
    work,
    factor,
    scales,
    offsets,
    zeros,
    levels,
    middles,
    groups,
    previous,
    codes,
    values,
    solved,
    start,
    stop,
):
    count, top = work.shape[0], levels.shape[0] - 1.0
    uniform, moves = middles.shape[0] == 0, previous.shape[0] > 0
    tile = np.zeros((count, _ROWS))
    x = np.zeros(_ROWS)
    for first in range(start, stop, _ROWS):
        width = min(_ROWS, stop - first)
        for j in range(count):
            for r in range(width):
                x[r] = work[j, first + r]
            for k in range(0, j - j % 4, 4):
                f0, f1, f2, f3 = factor[j, k], factor[j, k + 1], factor[j, k + 2], factor[j, k + 3]
                for r in range(_ROWS):
                    part = x[r] - f0 * tile[k, r] - f1 * tile[k + 1, r]
                    x[r] = part - f2 * tile[k + 2, r] - f3 * tile[k + 3, r]
            for k in range(j - j % 4, j):
                f0 = factor[j, k]
                for r in range(_ROWS):
                    x[r] -= f0 * tile[k, r]
            group = groups[j]
            for r in range(width):
                row = first + r
                scale = scales[group, row]
                unit = x[r] / scale + offsets[group, row]
                if uniform:
                    unit = min(max(np.rint(unit), 0.0), top) if unit == unit else unit
                    codes[j, row] = np.uint8(unit) if unit == unit else np.uint8(0)
                    value = (unit + levels[0] - zeros[group, row]) * scale
                else:
                    code = 0
                    for middle in middles:
                        code += unit > middle
                    codes[j, row] = code
                    value = (levels[code] - zeros[group, row]) * scale if unit == unit else unit
                values[j, row] = value
                tile[j, r] = ((previous[j, row] if moves else x[r]) - value) / factor[j, j]
                solved[j, row] = tile[j, r]


def round_block(work, factor, table, groups, previous, out, threads):
    """Round a block; see ``framequant.kernels.feedback.round_block``.

    Args:
        work: (columns, rows), C-contiguous like all arrays.
        factor: (columns, columns), *transposed*: its lower triangle is read.
        table: scales, offsets, zero points, levels and middles of a ``GridTable``; uniform: empty middles.
        groups: (columns,) int64.
        previous: (columns, rows), or (0, rows) for none.
        out: codes, values and solved errors, written.
        threads: how many threads to use.
    """
    rows = work.shape[1]
    share = -(-rows // (max(1, threads) * _ROWS)) * _ROWS

    def run(start):
        _round_rows(work, factor, *table, groups, previous, *out, start, min(start + share, rows))

    starts = range(0, rows, share)
    if len(starts) == 1 or not _round_rows.signatures:
        for start in starts:  # the first call compiles, before threads start
            run(start)
    else:
        with ThreadPoolExecutor(len(starts)) as pool:
            list(pool.map(run, starts))
