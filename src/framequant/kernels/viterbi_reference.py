"""The Viterbi search in plain torch: the oracle of the fast ones, and the path without numba and Triton.

A step keeps one metric per ``p = s >> k`` (a state's predecessors share it): ``cost(s) = metric[s >> k] + w
(x - c_s)**2``, then the minimum over the top bits of ``s`` gives the next step's metric. The last step closes
the ring: it minimises over the first step's bits, so the metric it leaves is indexed by the ``L - k_0`` bits
that both ends share. Imports torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUDGET = 1 << 26  # elements of the largest intermediate


def search(
    values: Tensor,
    weights: Tensor,
    codebook: Tensor,
    rates: tuple[int, ...],
    overlap: Tensor,
    state_bits: int,
) -> Tensor:
    """Return the states of least squared error; arguments as in ``framequant.kernels.viterbi.search``.

    ``codebook`` is (states, values of a state).
    """
    values, weights = (tensor.unflatten(1, (-1, codebook.shape[1])) for tensor in (values, weights))
    steps = values.shape[1]
    size = max(1 << state_bits, steps << (state_bits - min(rates)))
    share = max(1, _BUDGET // size)
    parts = [
        _search_some(values[i : i + share], weights[i : i + share], codebook, rates, overlap[i : i + share])
        for i in range(0, len(values), share)
    ]
    return torch.cat(parts) if parts else values.new_empty((0, steps), dtype=torch.int32)


def _search_some(
    values: Tensor, weights: Tensor, codebook: Tensor, rates: tuple[int, ...], overlap: Tensor
) -> Tensor:
    states, (batch, steps), period = len(codebook), values.shape[:2], len(rates)
    metric = values.new_zeros((batch, states >> rates[0]))
    first = torch.arange(states >> rates[0], device=values.device)
    bound = (overlap >= 0)[:, None]
    metric = metric.masked_fill(bound & (first != overlap[:, None]), torch.inf)
    back = []
    for t in range(steps):
        error = sum(  # a state's values one after the other: no tensor is larger than the states
            weights[:, t, None, i] * (values[:, t, None, i] - codebook[:, i]) ** 2
            for i in range(codebook.shape[1])
        )
        branch = error.unflatten(1, (metric.shape[1], -1))
        cost = (metric[:, :, None] + branch).flatten(1)
        metric, index = cost.unflatten(1, (1 << rates[(t + 1) % period], -1)).min(dim=1)
        back.append(index.to(torch.uint8))
    node = torch.where(overlap >= 0, overlap, metric.argmin(dim=1))
    path = []
    for t in range(steps - 1, -1, -1):
        top = back[t].gather(1, node[:, None])[:, 0].to(torch.int64)
        state = node + top * (states >> rates[(t + 1) % period])
        path.append(state)
        node = state >> rates[t % period]
    return torch.stack(path[::-1], dim=1).to(torch.int32)
