"""Training ahead: after each block that was rounded, the blocks that are still float learn to live with it.

The rounded part of the model no longer changes, so its outputs are known; the rest is run on them and trained, by a
few steps of Adam, until the model's outputs are those of the float model again. What is rounded next are the trained
weights. A linear is thus not rounded to what it was, but to what serves after everything before it was rounded.

Must not import layers, quantizers or checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framequant.errors import NumericalError
from framequant.memory import return_freed_memory
from framequant.model.calibration import as_samples, to_device
from framequant.model.capture import token_mask
from framequant.model.replay import Replay, call_model
from framequant.model.rows import count_rows, form_of, pick
from framequant.model.streams import Stream
from framequant.model.tune_loss import distance, output_of, probe, samples_at_once, weight_of

#: Samples of a step.
SAMPLES_PER_STEP = 8
#: A parameter's rate is relative to the root mean square of its entries, which counts as no less than this.
SMALLEST_SIZE = 1e-3
#: Decay of Adam's two means; the second forgets faster than usual, since there are few steps between two blocks.
BETAS = (0.9, 0.95)
#: Where steps of a float32 model run in bfloat16.
HALF_DEVICES = ("cuda",)


class AheadTrainer:
    """Trains what is still float of a model that is being walked.

    Args:
        model: all of it float yet; in evaluation mode.
        replay: its blocks in the order of the walk.
        batches: the calibration batches of the walk, on the model's device.
        steps: after each block.
        rate: of a step, relative to the size of a parameter's entries.
        seed: of the order of the samples.
    """

    def __init__(
        self,
        model: nn.Module,
        replay: Replay,
        batches: Sequence[Any],
        steps: int,
        rate: float,
        seed: int,
    ) -> None:
        self._model, self._replay, self._batches = model, replay, batches
        self._steps, self._rate = steps, rate
        parameter = next(model.parameters())
        self._device, dtype = parameter.device, parameter.dtype
        self._mixed = dtype == torch.float32 and self._device.type in HALF_DEVICES
        sample = as_samples([batches[0]])[0]
        self._kind, outputs = probe(model, sample, "auto")
        self._at_once = samples_at_once(sample, outputs, self._device.type, SAMPLES_PER_STEP)
        self._teacher = copy.deepcopy(model)
        if self._mixed:
            self._teacher.to(torch.bfloat16)
        self._targets = self._run_teacher()
        self._forms = [form_of(batch, count_rows(batch)) for batch in batches]
        self._order = _order(batches, seed)
        self._state: dict[str, dict[str, Any]] = {}
        # What is trained after one block, in the order of the leaves, and what a leaf is multiplied by.
        self._parameters: list[nn.Parameter] = []
        self._sizes: list[Tensor] = []

    def _run_teacher(self) -> Stream:
        """The float model's activations behind its last block: a step needs no more of it than its head."""
        targets = Stream(self._replay.on(self._teacher), self._batches)
        targets.run_through(lambda number: self._for_teacher(self._batches[number]))
        return targets

    def train(self, index: int, stream: Stream) -> float:
        """Train what comes after block ``index``, whose outputs the stream holds.

        Returns:
            The mean distance to the float model during the steps: nats, or relative squared error.

        Raises:
            NumericalError: the loss became NaN or infinite.
        """
        values = self._values(index)
        optimizer = self._optimizer(values)
        total = 0.0
        with self._trainable():
            for _ in range(self._steps):
                total += self._step(index, stream, values)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self._write(values)
        for name, value in values.items():
            self._state[name] = optimizer.state[value]
        return_freed_memory()
        return total / self._steps

    def _values(self, index: int) -> dict[str, Tensor]:
        """Float32 leaves of what is trained: all of the blocks to come, and vectors outside of blocks.

        A leaf is its parameter over the root mean square of the entries, so that one rate suits all.
        """
        done = tuple(f"{name}." for name in self._replay.names[: index + 1])
        ahead = tuple(f"{name}." for name in self._replay.names[index + 1 :])
        held = {id(p) for name, p in self._model.named_parameters() if name.startswith(done)}
        chosen = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.is_floating_point()
            and id(parameter) not in held
            and (name.startswith(ahead) or (parameter.ndim == 1 and bool(ahead)))
        }
        counts = torch.tensor([p.numel() for p in chosen.values()], device=self._device)
        norms = torch._foreach_norm([p.detach().float() for p in chosen.values()])
        sizes = torch.stack(norms) / counts.sqrt()
        self._parameters = list(chosen.values())
        self._sizes = list(sizes.clamp(min=SMALLEST_SIZE).unbind())
        return {
            name: (parameter.detach().float() / size).requires_grad_(True)
            for (name, parameter), size in zip(chosen.items(), self._sizes, strict=True)
        }

    def _optimizer(self, values: dict[str, Tensor]) -> torch.optim.Adam:
        optimizer = torch.optim.Adam(
            list(values.values()), lr=self._rate, betas=BETAS, fused=self._device.type == "cuda"
        )
        for name, value in values.items():
            if name in self._state:
                optimizer.state[value] = self._state.pop(name)
        self._state.clear()
        return optimizer

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        parameters = list(self._model.parameters())
        before = [parameter.requires_grad for parameter in parameters]
        chosen = {id(parameter) for parameter in self._parameters}
        try:
            for parameter in parameters:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, needed in zip(parameters, before, strict=True):
                parameter.requires_grad_(needed)
                parameter.grad = None

    def _step(self, index: int, stream: Stream, values: dict[str, Tensor]) -> float:
        parts = self._parts([next(self._order) for _ in range(SAMPLES_PER_STEP)])
        batches = [self._batch(rows) for rows in parts]
        weights = [weight_of(batch) for batch in batches]
        loss = torch.zeros((), device=self._device)
        for rows, batch, weight in zip(parts, batches, weights, strict=True):
            with torch.enable_grad():
                value = self._loss(index, stream, rows, batch) * (weight / sum(weights))
            value.backward()
            loss += value.detach()
        found = float(loss)
        if not math.isfinite(found):
            raise NumericalError(
                f"training ahead of block {self._replay.names[index]}: the loss is {found}; try a smaller train_rate."
            )
        for parameter, leaf in zip(self._parameters, values.values(), strict=True):
            leaf.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        return found

    def _parts(self, chosen: list[tuple[int, int]]) -> list[dict[int, list[int]]]:
        """Samples, as batch and row, in parts that can be run at once: rows by batch."""
        by_form: dict[Hashable, list[tuple[int, int]]] = {}
        for number, row in sorted(chosen):
            by_form.setdefault(self._forms[number], []).append((number, row))
        parts: list[dict[int, list[int]]] = []
        for alike in by_form.values():
            size = -(-len(alike) // -(-len(alike) // self._at_once))  # parts of nearly one size
            for start in range(0, len(alike), size):
                rows: dict[int, list[int]] = {}
                for number, row in alike[start : start + size]:
                    rows.setdefault(number, []).append(row)
                parts.append(rows)
        return parts

    def _batch(self, rows: dict[int, list[int]]) -> Any:
        batches = [self._batches[number] for number in rows]
        return pick(batches, [count_rows(batch) for batch in batches], list(rows.values()))

    def _loss(self, index: int, stream: Stream, rows: dict[int, list[int]], batch: Any) -> Tensor:
        """Mean distance to the float model over ``batch``, some rows of the calibration batches."""
        half = torch.autocast(self._device.type, torch.bfloat16) if self._mixed else nullcontext()
        with half, torch.no_grad(), self._targets.behind_rows(rows, len(self._replay.names)):
            target = output_of(call_model(self._teacher, self._for_teacher(batch)), self._kind)
        with half, stream.behind_rows(rows, index + 1):
            output = output_of(call_model(self._model, batch), self._kind)
        total, positions = distance(output, target, token_mask(batch), self._kind)
        return total / max(positions, 1)

    def _for_teacher(self, batch: Any) -> Any:
        reference = next(self._teacher.parameters())
        return to_device(batch, reference.device, reference.dtype)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        scaled = torch._foreach_mul([value.detach() for value in values.values()], self._sizes)
        torch._foreach_copy_(self._parameters, scaled)


def _order(batches: Sequence[Any], seed: int) -> Iterator[tuple[int, int]]:
    """Batch and row of one sample after the other: permutations of all of them without end."""
    every = [(number, row) for number, batch in enumerate(batches) for row in range(count_rows(batch))]
    draw = np.random.RandomState(seed % 2**32)
    while True:
        for place in draw.permutation(len(every)):
            yield every[place]
