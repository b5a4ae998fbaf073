"""How far a model in the making is from the float model: what comes after any block, run to the end and compared.

Blocks that were rounded no longer change, so their outputs on the calibration data are stored, and a look ahead
begins behind them.

Must not import layers, quantizers or checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framequant.model.calibration import as_samples, to_device
from framequant.model.capture import token_mask
from framequant.model.replay import Replay, call_model
from framequant.model.rows import count_rows, form_of, pick
from framequant.model.streams import Stream
from framequant.model.tune_loss import distance, output_of, probe, samples_at_once, weight_of

#: Samples that are run together at most.
SAMPLES_AT_ONCE = 8
#: Where training steps of a float32 model run in bfloat16, and the float model's part of every look.
HALF_DEVICES = ("cuda",)

#: Some rows of several batches, by the batch's number.
Rows = dict[int, list[int]]


class Outlook:
    """Compares a model that is being walked with the float model that it was.

    Args:
        model: all of it float yet; in evaluation mode.
        replay: its blocks in the order of the walk.
        batches: the calibration batches of the walk, on the model's device.

    Attributes:
        mixed: whether training steps run in bfloat16.
    """

    def __init__(self, model: nn.Module, replay: Replay, batches: Sequence[Any]) -> None:
        self._model, self._replay, self._batches = model, replay, batches
        parameter = next(model.parameters())
        self._device = parameter.device
        self.mixed = parameter.dtype == torch.float32 and self._device.type in HALF_DEVICES
        sample = as_samples([batches[0]])[0]
        self._kind, outputs = probe(model, sample, "auto")
        self._at_once = samples_at_once(sample, outputs, self._device.type, SAMPLES_AT_ONCE)
        self._teacher = copy.deepcopy(model)
        if self.mixed:
            self._teacher.to(torch.bfloat16)
        self._targets = self._run_teacher()
        self._forms = [form_of(batch, count_rows(batch)) for batch in batches]

    def _run_teacher(self) -> Stream:
        """The float model's activations behind its last block: a look needs no more of it than its head."""
        targets = Stream(self._replay.on(self._teacher), self._batches)
        targets.run_through(lambda number: self._for_teacher(self._batches[number]))
        return targets

    def order(self, seed: int) -> Iterator[tuple[int, int]]:
        """Batch and row of one sample after the other: permutations of all of them without end."""
        return sample_order(self._batches, seed)

    def parts(self, chosen: Sequence[tuple[int, int]]) -> list[tuple[Rows, Any, float]]:
        """Samples, as batch and row, in parts that can be run at once: rows, their batch, its share of all."""
        by_form: dict[Hashable, list[tuple[int, int]]] = {}
        for number, row in sorted(chosen):
            by_form.setdefault(self._forms[number], []).append((number, row))
        parts: list[Rows] = []
        for alike in by_form.values():
            size = -(-len(alike) // -(-len(alike) // self._at_once))  # parts of nearly one size
            for start in range(0, len(alike), size):
                rows: Rows = {}
                for number, row in alike[start : start + size]:
                    rows.setdefault(number, []).append(row)
                parts.append(rows)
        batches = [self._batch(rows) for rows in parts]
        weights = [weight_of(batch) for batch in batches]
        return [
            (rows, batch, weight / sum(weights))
            for rows, batch, weight in zip(parts, batches, weights, strict=True)
        ]

    def _batch(self, rows: Rows) -> Any:
        batches = [self._batches[number] for number in rows]
        return pick(batches, [count_rows(batch) for batch in batches], list(rows.values()))

    def distance(self, count: int, stream: Stream, rows: Rows, batch: Any, half: bool) -> Tensor:
        """Mean distance to the float model over ``batch``, differentiable.

        Args:
            count: blocks to skip; the stream holds the outputs of the last of them.
            stream: of the quantized chain.
            rows: which samples.
            batch: these samples.
            half: whether the model in the making runs in bfloat16.
        """
        short = torch.autocast(self._device.type, torch.bfloat16)
        float_blocks = self._targets.behind_rows(rows, len(self._replay.names))
        with short if self.mixed else nullcontext(), torch.no_grad(), float_blocks:
            target = output_of(call_model(self._teacher, self._for_teacher(batch)), self._kind)
        behind = stream.behind_rows(rows, count) if count else nullcontext()
        with short if half else nullcontext(), behind:
            output = output_of(call_model(self._model, batch), self._kind)
        total, positions = distance(output, target, token_mask(batch), self._kind)
        return total / max(positions, 1)

    def _for_teacher(self, batch: Any) -> Any:
        reference = next(self._teacher.parameters())
        return to_device(batch, reference.device, reference.dtype)


def sample_order(batches: Sequence[Any], seed: int) -> Iterator[tuple[int, int]]:
    """Batch and row of one sample after the other: permutations of all of them without end."""
    every = [(number, row) for number, batch in enumerate(batches) for row in range(count_rows(batch))]
    draw = np.random.RandomState(seed % 2**32)
    while True:
        for place in draw.permutation(len(every)):
            yield every[place]
