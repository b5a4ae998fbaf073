"""The settings of a tuning, what it reports, and which samples it sees when."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from framequant.errors import CalibrationError, ConfigError
from framequant.model.calibration import as_batches, as_samples, collate

#: How often the training samples may be gone through; beyond, a longer calibration is worth more than steps.
MOST_PASSES = 100
#: More samples than these would not judge better, only longer.
MOST_HELD_OUT = 256


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a tuning.

    Attributes:
        steps: of the optimizer (AdamW without weight decay), at most.
        learning_rate: at its highest: for factors absolute, for norms and biases relative to their size.
        embedding_rate: of token embeddings and the output head that stayed float, relative to the size of their
            entries; 0 leaves them as they are.
        batch: samples of a step.
        warmup: share of the steps in which the rate rises; afterwards it falls to zero along a cosine.
        held_out: share of the calibration samples that judges and is never trained on; ``MOST_HELD_OUT`` at most.
        evaluations: how often the held-out samples are looked at.
        loss: "kl" (divergence of logits), "mse" (relative squared error of outputs), or "auto": "kl" for models
            that return logits.
        seed: of the held-out choice and of the order of the samples.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int
    learning_rate: float = 1e-3
    embedding_rate: float = 0.0
    batch: int = 8
    warmup: float = 0.05
    held_out: float = 0.125
    evaluations: int = 10
    loss: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"tuning {name} = {value!r}: expected a positive integer.")
        for name, low, high in (("learning_rate", 0.0, 1.0), ("held_out", 0.0, 1.0)):
            if not low < getattr(self, name) < high:
                raise ConfigError(
                    f"tuning {name} = {getattr(self, name)}: expected more than 0 and less than 1."
                )
        if not 0 <= self.embedding_rate < 1:
            raise ConfigError(
                f"tuning embedding_rate = {self.embedding_rate}: expected 0 or more and less than 1."
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"tuning warmup = {self.warmup}: expected 0 or more and less than 1.")
        if self.loss not in ("auto", "kl", "mse"):
            raise ConfigError(f"tuning loss = {self.loss!r}: choose auto, kl or mse.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(round(self.warmup * self.steps), 1)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return (
            self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(self.steps - rising, 1)))
        )

    @property
    def between(self) -> int:
        """Steps from one evaluation to the next."""
        return max(self.steps // self.evaluations, 1)


@dataclass
class TuningReport:
    """What a tuning did.

    Attributes:
        steps: asked for.
        chosen_step: the step whose state was kept; 0 means the untuned model.
        loss: "kl", in nats per position, or "mse", relative to the outputs' energy.
        loss_before: of the untuned model on the held-out samples.
        loss_after: of the model that was kept, as it is stored.
        history: every evaluation, as step and held-out loss.
        samples: trained on.
        held_out: samples that judged.
        parameters: trained numbers.
        settings: as ``TuneConfig`` has them.
        seconds: wall-clock time, resumed runs added up.
    """

    steps: int
    chosen_step: int
    loss: str
    loss_before: float
    loss_after: float
    history: list[tuple[int, float]]
    samples: int
    held_out: int
    parameters: int
    settings: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "history": [list(entry) for entry in self.history]}


def split_samples(count: int, config: TuneConfig) -> tuple[np.ndarray, np.ndarray]:
    """Choose by seed which of ``count`` samples train and which judge.

    Raises:
        CalibrationError: too few samples; the message says how many are needed.
    """
    held = _held(count, config)
    needed = max(config.batch, -(-config.steps * config.batch // MOST_PASSES))
    if count - held < needed:
        total = needed + 1
        while total - _held(total, config) < needed:
            total += 1
        raise CalibrationError(
            f"the calibration is too short for this tuning: {config.steps} steps of {config.batch} samples need "
            f"{total} samples ({total - needed} of them held out), and there are {count}. Give more calibration data, "
            "fewer steps or a smaller batch."
        )
    order = np.random.RandomState(config.seed % 2**32).permutation(count)
    return order[held:], order[:held]


def _held(count: int, config: TuneConfig) -> int:
    return min(max(round(config.held_out * count), 1), MOST_HELD_OUT)


def without_judges(calibration: Any, config: TuneConfig, device: str = "cpu") -> list[Any]:
    """The calibration batches to quantize with before a tuning on all of ``calibration``.

    A quantized model is fitted to the samples it was calibrated on. Judged on some of these, the untuned model looks
    better than it is, and a tuning that helps everywhere else would be thrown away.

    Args:
        calibration: as for ``quantize_`` and ``tune_``.
        config: of the tuning, whose held-out samples are left out.
        device: kind of device that will run the batches.

    Raises:
        CalibrationError: too few samples; the message says how many are needed.
    """
    batches = as_batches(calibration, device)
    samples = as_samples(batches)
    train, _ = split_samples(len(samples), config)
    rows, size = sorted(train.tolist()), -(-len(samples) // len(batches))
    return [collate([samples[row] for row in rows[i : i + size]]) for i in range(0, len(rows), size)]


def rows_of_step(train: np.ndarray, step: int, config: TuneConfig) -> list[int]:
    """The samples of a step: permutations of the training samples, one after the other."""
    rows: list[int] = []
    for place in range(step * config.batch, (step + 1) * config.batch):
        turn, index = divmod(place, len(train))
        order = np.random.RandomState((config.seed + 1 + turn) % 2**32).permutation(len(train))
        rows.append(int(train[order[index]]))
    return rows
