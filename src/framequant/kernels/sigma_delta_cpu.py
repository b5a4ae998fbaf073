"""The Sigma-Delta recursion on the CPU, compiled by numba: a few vectors side by side, threads over vectors.

One recursion is a chain of dependent operations; several vectors in turn keep the processor busy while each waits.

Only ``framequant.kernels.sigma_delta`` imports this module, and only when numba is present. Imports numba and
numpy, no torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

_LANES = 8


@njit(nogil=True, cache=True, error_model="numpy")
def _quantize(coefficients, inverse, codes, overloads, peaks, energies, levels, order, limit, start, stop):
    size = coefficients.shape[1]
    half, top = levels / 2, levels - 1.0
    middle = half - 0.5
    first, second, third = np.zeros(_LANES), np.zeros(_LANES), np.zeros(_LANES)
    peak, energy, count = np.zeros(_LANES), np.zeros(_LANES), np.zeros(_LANES)
    for line in range(start, stop, _LANES):
        width = min(_LANES, stop - line)
        first[:], second[:], third[:] = 0.0, 0.0, 0.0
        peak[:], energy[:], count[:] = 0.0, 0.0, 0.0
        for n in range(size):
            for r in range(width):
                value = coefficients[line + r, n] * inverse[line + r]
                if order == 1:
                    value = value + first[r]
                elif order == 2:
                    value = value + (2 * first[r] - second[r])
                elif order == 3:
                    value = value + (3 * (first[r] - second[r]) + third[r])
                code = min(max(np.floor(value + half), 0.0), top)
                codes[line + r, n] = np.uint8(code)
                third[r] = second[r]
                second[r] = first[r]
                state = value - (code - middle)
                first[r] = state
                peak[r] = max(peak[r], abs(state))
                energy[r] += state * state
                count[r] += abs(state) > limit
        for r in range(width):
            peaks[line + r], energies[line + r], overloads[line + r] = peak[r], energy[r], count[r]


def quantize_sequences(
    coefficients, inverse, codes, overloads, peaks, energies, levels, order, limit, threads
):
    """Quantize all lines; see ``framequant.kernels.sigma_delta.quantize_sequences``.

    Args:
        coefficients: (vectors, N) float64, C-contiguous like all arrays.
        inverse: one over the step of each vector.
        codes: (vectors, N) uint8, written, like overloads (int32), peaks and energies (float64).
        overloads: per vector.
        peaks: per vector.
        energies: per vector.
        levels: number of levels.
        order: 0 … 3.
        limit: a state beyond this is an overload.
        threads: how many threads to use.
    """
    vectors = coefficients.shape[0]
    share = -(-vectors // (max(1, threads) * _LANES)) * _LANES

    def run(start):
        _quantize(
            coefficients, inverse, codes, overloads, peaks, energies, levels, order, limit, start,
            min(start + share, vectors),
        )  # fmt: skip

    starts = range(0, vectors, share)
    if len(starts) == 1 or not _quantize.signatures:
        for start in starts:  # the first call compiles, before threads start
            run(start)
    else:
        with ThreadPoolExecutor(len(starts)) as pool:
            list(pool.map(run, starts))
