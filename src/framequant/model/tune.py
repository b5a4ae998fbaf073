"""Tuning: with the codes as they are, scales, norms, biases and embeddings are trained towards the float model.

The loss is the divergence of the logits (language models, classifiers) or the relative error of the outputs
(encoders). A part of the calibration data is held out; the model is judged on it as it would be stored, and the
best state found is the one that stays, be it the untuned one.

Must not import checkpoint or integrations.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framequant.errors import ConfigError, NumericalError
from framequant.memory import return_freed_memory
from framequant.model.calibration import as_batches, as_samples, collate, to_device
from framequant.model.capture import token_mask
from framequant.model.replay import call_model, inference_mode
from framequant.model.report import recount
from framequant.model.tunable import Tunable
from framequant.model.tune_config import TuneConfig, TuningReport, rows_of_step, split_samples
from framequant.model.tune_loss import distance, output_of, probe, samples_at_once, tensors_of, weight_of
from framequant.model.tune_state import digest, load_state, save_state
from framequant.model.walk import Progress, ProgressCallback, quantized_linears

#: Evaluations in a row without an improvement that end the tuning.
PATIENCE = 4
SECONDS_BETWEEN_SAVES = 60.0
#: Where training steps of a float32 model run in bfloat16, the float model's part too; the judging stays in float32.
HALF_DEVICES = ("cuda",)


def tune_(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Any,
    config: TuneConfig | int,
    state: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> TuningReport:
    """Tune a quantized model in place; its codes stay as they are.

    Trellis linears get a byte per row for their factors, which is counted; if no step was better than the untuned
    model on the held-out samples, the model is left exactly as it was.

    Args:
        model: quantized by ``quantize_`` or loaded; evaluation mode.
        teacher: the float model, on any device; not changed.
        calibration: as for ``quantize_``; best so that the samples which judge did not calibrate, see
            ``tune_config.without_judges``.
        config: settings, or just the number of steps.
        state: a file to keep unfinished work in. If it exists, the tuning goes on from there; it stays when the
            tuning is done, until the caller deletes it.
        progress: called after every step with steps done and in all.

    Returns:
        The report; it is also added to the model's own.

    Raises:
        CalibrationError: too few samples for the steps asked for; the message says how many are needed.
        ConfigError: the model has no quantized linear, or no embeddings where these are to be trained, or the state
            belongs to a tuning with other settings.
        NumericalError: the loss became NaN or infinite.
    """
    config = TuneConfig(config) if isinstance(config, int) else config
    if not quantized_linears(model):
        raise ConfigError(f"{type(model).__name__} has no quantized linear to tune; call quantize_ first.")
    samples = as_samples(as_batches(calibration))
    train, held = split_samples(len(samples), config)
    with inference_mode(model), inference_mode(teacher):
        run = _Run(
            model, teacher, samples, train, held, config, None if state is None else Path(state), progress
        )
        report = run.run()
    _write_report(model, report)
    return report


def _write_report(model: nn.Module, report: TuningReport) -> None:
    own = getattr(model, "framequant_report", None)
    if own is None:
        return
    own.tuning = report.to_dict()
    layers = quantized_linears(model)
    for entry in own.linears:
        recount(entry, layers[entry.name].spec, layers[entry.name].tensors)


@dataclass
class _Position:
    """Where a tuning stands; goes into the state file."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    stale: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)


class _Run:
    """One tuning: what it works on, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        samples: list[Any],
        train: np.ndarray,
        held: np.ndarray,
        config: TuneConfig,
        path: Path | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.model, self.teacher, self.config = model, teacher, config
        self.samples, self.train, self.held = samples, train, held
        self.path, self.progress = path, progress
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.kind, outputs = probe(teacher, samples[0], config.loss)
        self.at_once = samples_at_once(samples[0], outputs, self.device.type, config.batch)
        self.request = {**asdict(config), "model": _model_digest(model), "calibration": _data_digest(samples)}

    def run(self) -> TuningReport:
        loaded = None if self.path is None else load_state(self.path, self.request)
        self.mixed = self.dtype == torch.float32 and self.device.type in HALF_DEVICES
        tunable = Tunable(
            self.model, torch.bfloat16 if self.mixed else self.dtype, self.config.embedding_rate > 0
        )
        try:
            return self._train(tunable, loaded)
        except BaseException:
            tunable.restore()
            raise

    def _train(
        self, tunable: Tunable, loaded: tuple[dict[str, Tensor], dict[str, Any]] | None
    ) -> TuningReport:
        start, saved = time.perf_counter(), time.perf_counter()
        optimizer = _optimizer(tunable, self.config)
        untuned = tunable.snapshot()
        at, best = _Position(), untuned
        if loaded is not None:
            best, at = _resume(tunable, optimizer, *loaded, untuned)
        else:
            self._judge(tunable, at, untuned)
        before, earlier = at.history[0][1], at.seconds
        while at.step < self.config.steps and at.stale < PATIENCE:
            self._step(tunable, optimizer, at.step)
            at.step += 1
            if at.step % self.config.between == 0 or at.step == self.config.steps:
                best = self._judge(tunable, at, best)
                saved = -math.inf
            at.seconds = earlier + time.perf_counter() - start
            if self.path is not None and time.perf_counter() - saved > SECONDS_BETWEEN_SAVES:
                save_state(self.path, _tensors(tunable, optimizer, best), asdict(at), self.request)
                saved = time.perf_counter()
            if self.progress:
                message = f"{self.kind} {at.best_loss:.4g}, before {before:.4g}"
                self.progress(Progress(at.step, self.config.steps, message))
        if at.best_step:
            tunable.install(best)
        else:
            tunable.restore()
        return TuningReport(
            steps=self.config.steps,
            chosen_step=at.best_step,
            loss=self.kind,
            loss_before=before,
            loss_after=at.best_loss,
            history=[(int(step), float(loss)) for step, loss in at.history],
            samples=len(self.train),
            held_out=len(self.held),
            parameters=sum(value.numel() for value in tunable.values.values()),
            settings=asdict(self.config),
            seconds=earlier + time.perf_counter() - start,
        )

    def _step(self, tunable: Tunable, optimizer: torch.optim.Optimizer, step: int) -> None:
        chosen = [self.samples[i] for i in rows_of_step(self.train, step, self.config)]
        parts = [chosen[i : i + self.at_once] for i in range(0, len(chosen), self.at_once)]
        batches = [self._batch(part) for part in parts]
        counts = [weight_of(batch) for batch in batches]
        with tunable.training(), torch.enable_grad():
            for batch, count in zip(batches, counts, strict=True):
                total, positions = self._loss(batch, self.mixed)
                share = count / sum(counts) / positions
                if not bool(torch.isfinite(total)):
                    raise NumericalError(
                        f"tuning: the loss is NaN or infinite at step {step + 1}; try a smaller learning rate."
                    )
                (total * share).backward()
            tunable.collect()
        for group in optimizer.param_groups:
            group["lr"] = self.config.rate(step) * group["size"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return_freed_memory()

    def _judge(self, tunable: Tunable, at: _Position, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the held-out loss of the model as it would be stored; return the best values so far."""
        values = tunable.snapshot()
        tunable.install(values)
        total = positions = 0.0
        for start in range(0, len(self.held), self.at_once):
            rows = self.held[start : start + self.at_once]
            with torch.no_grad():
                part, count = self._loss(self._batch([self.samples[i] for i in rows]))
            total, positions = total + float(part), positions + count
        loss = total / positions
        if not math.isfinite(loss):
            raise NumericalError(f"tuning: the held-out loss is {loss} after {at.step} steps.")
        at.history.append((at.step, loss))
        at.stale += 1
        if loss < at.best_loss:
            at.best_loss, at.best_step, at.stale, best = loss, at.step, 0, values
        return best

    def _batch(self, samples: list[Any]) -> Any:
        return to_device(collate(samples), self.device, self.dtype)

    def _loss(self, batch: Any, mixed: bool = False) -> tuple[Tensor, int]:
        """Sum over the batch's real positions of the distance to the float model, and their number."""
        reference = next(self.teacher.parameters())
        half = torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()
        with half, torch.no_grad():
            target = self._output(self.teacher, to_device(batch, reference.device, reference.dtype))
        with half:
            output = self._output(self.model, batch)
        return distance(output, target.to(output.device), token_mask(batch), self.kind)

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        return output_of(call_model(model, batch), self.kind)


def _optimizer(tunable: Tunable, config: TuneConfig) -> torch.optim.AdamW:
    """AdamW with one group for all values of one size, to which their rate is relative."""
    groups: dict[float, list[Tensor]] = {}
    for name, value in tunable.values.items():
        ratio = config.embedding_rate / config.learning_rate if name in tunable.tables else 1.0
        groups.setdefault(tunable.size(name) * ratio, []).append(value)
    parameters = [{"params": values, "size": size} for size, values in groups.items()]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)


def _tensors(
    tunable: Tunable, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    tensors = {f"value/{name}": value for name, value in tunable.values.items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, value in tunable.values.items():
        for part, tensor in optimizer.state.get(value, {}).items():
            tensors[f"optimizer/{part}/{name}"] = torch.as_tensor(tensor)
    return tensors


def _resume(
    tunable: Tunable,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    position: dict[str, Any],
    untuned: dict[str, Tensor],
) -> tuple[dict[str, Tensor], _Position]:
    """Set values and optimizer as a state has them; return the best values and the position."""
    device = next(iter(untuned.values())).device
    tunable.load({name: tensors[f"value/{name}"].to(device) for name in untuned})
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, part, name = key.split("/", 2)
            place = tensor if part == "step" else tensor.to(device)
            optimizer.state[tunable.values[name]][part] = place
    position["history"] = [(int(step), float(loss)) for step, loss in position["history"]]
    return {name: tensors[f"best/{name}"].to(device) for name in untuned}, _Position(**position)


def _model_digest(model: nn.Module) -> str:
    return digest(model.state_dict().values())


def _data_digest(samples: list[Any]) -> str:
    return digest(tensor for sample in samples for tensor in tensors_of(sample))
