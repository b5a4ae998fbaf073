"""Trials: several roundings of one group of linears, of which the model's outputs choose one.

A rounding depends on the random signs of the frames. Losses of layers hardly differ between signs, but what the
errors do in company differs: whether they add to what earlier linears did, or take some of it back, shows at the
end of the model only. So each trial is put in its place, and the rest of the model is run behind it.

Must not import layers, quantizers or checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from framequant.model.outlook import Outlook
from framequant.model.streams import Stream

#: Samples that judge the trials of a group; the next group is judged on others.
SAMPLES = 32

Result = TypeVar("Result")


class Trials:
    """Chooses between roundings of the group that a walk has come to.

    Args:
        outlook: compares the model with the float model.
        stream: the quantized chain's.
        count: trials of a group, 1 or more.
        seed: of the order of the samples.
    """

    def __init__(self, outlook: Outlook, stream: Stream, count: int, seed: int) -> None:
        self._outlook, self._stream, self._count = outlook, stream, count
        self._order: Iterator[tuple[int, int]] = outlook.order(seed + 1)

    def best(self, done: int, make: Callable[[int], Result], install: Callable[[Result], None]) -> Result:
        """The best of several roundings, installed.

        Args:
            done: blocks before the one that is worked on.
            make: makes the rounding of a number from 0 on.
            install: puts one into the model.
        """
        samples = [next(self._order) for _ in range(SAMPLES)]
        chosen, least = None, math.inf
        for number in range(self._count):
            result = make(number)
            install(result)
            found = self._judge(done, samples)
            if chosen is None or found < least:
                chosen, least = result, found
        assert chosen is not None
        install(chosen)
        return chosen

    @torch.no_grad()
    def _judge(self, done: int, samples: Sequence[tuple[int, int]]) -> float:
        """Distance to the float model with the trial in place; NaN is worse than any."""
        total = sum(
            float(self._outlook.distance(done, self._stream, rows, batch, half=False)) * share
            for rows, batch, share in self._outlook.parts(samples)
        )
        return total if math.isfinite(total) else math.inf
