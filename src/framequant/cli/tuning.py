"""``framequant quantize --tune``: the untuned model and the state of its tuning are kept beside the output.

While a run is unfinished, ``OUT.tuning`` holds the settings it was begun with, the untuned checkpoint, and the state
of the tuning. The same command goes on from there; another one is refused with the difference.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framequant.cli.console import Reporter

if TYPE_CHECKING:
    from framequant.config import FrameQuantConfig
    from framequant.evaluation.mix import Mix
    from framequant.integrations.sources import OpenedModel
    from framequant.model.tune_config import TuneConfig

SETTINGS = "settings.json"
UNTUNED = "untuned"
STATE = "state.safetensors"


def tune_settings(
    steps: int | None,
    learning_rate: float | None,
    batch: int | None,
    seed: int,
    embedding_rate: float | None = None,
) -> TuneConfig | None:
    """The settings that ``--tune`` and its companions make; None without ``--tune``.

    Raises:
        ConfigError: a value out of range, or one of the others without ``--tune``.
    """
    from framequant.errors import ConfigError
    from framequant.model.tune_config import TuneConfig

    given = {"learning_rate": learning_rate, "batch": batch, "embedding_rate": embedding_rate}
    given = {key: value for key, value in given.items() if value is not None}
    if steps is None:
        if given:
            raise ConfigError(
                "--tune-lr, --tune-batch and --tune-embeddings say how to tune; give --tune STEPS too."
            )
        return None
    return TuneConfig(steps, seed=seed, **given)


class Tuning:
    """The tuning of one command: what is beside its output, and the steps that lead there.

    Args:
        out: the output directory.
        settings: of the tuning.
        request: everything else that decides the result, JSON-ready.

    Raises:
        ConfigError: an unfinished run with other settings lies beside the output; the differences are listed.
    """

    def __init__(self, out: Path, settings: TuneConfig, request: dict[str, Any]) -> None:
        from framequant.model.tune_state import refuse_changes

        self.settings = settings
        self.folder = out.absolute().with_name(f"{out.name}.tuning")
        self.request = json.loads(json.dumps({**request, **_prefixed("tune", asdict(settings))}))
        if self.begun:
            found = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            refuse_changes(found, self.request, str(self.folder))

    @property
    def begun(self) -> bool:
        """Whether an unfinished run with an untuned model lies beside the output."""
        return (self.folder / SETTINGS).is_file()

    def check(self, samples: Any) -> None:
        """Refuse calibration data that are too few, before anything slow is done.

        Raises:
            CalibrationError: how many samples are needed is said.
        """
        from framequant.model.calibration import as_batches, as_samples
        from framequant.model.tune_config import split_samples

        split_samples(len(as_samples(as_batches(samples))), self.settings)

    def calibration(self, samples: Any, device: str) -> Any:
        """What quantizes the model: all samples but those that will judge its tuning."""
        from framequant.model.tune_config import without_judges

        return without_judges(samples, self.settings, device)

    def reopen(self, device: str, reporter: Reporter) -> OpenedModel:
        """The untuned model of the run that was begun."""
        from framequant.integrations.sources import open_model

        with reporter.stage(f"going on with {self.folder}"):
            return open_model(str(self.folder / UNTUNED), "auto", device)

    def keep(self, opened: OpenedModel, reporter: Reporter) -> None:
        """Write the untuned model beside the output, the settings last."""
        from framequant import save_pretrained

        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with reporter.stage(f"keeping the untuned model in {self.folder}"):
            save_pretrained(
                opened.model, self.folder / UNTUNED, source=opened.name, tokenizer=opened.processor
            )
        partial = self.folder / f".{SETTINGS}.partial"
        partial.write_text(json.dumps(self.request, indent=2), encoding="utf-8")
        os.replace(partial, self.folder / SETTINGS)

    def tune(self, opened: OpenedModel, teacher: OpenedModel, data: Any, reporter: Reporter) -> None:
        """Tune the model in place, with a progress bar over the steps."""
        from framequant import tune_

        with reporter.bar("tuning", "steps") as update:
            tune_(
                opened.model,
                teacher.model,
                data,
                self.settings,
                state=self.folder / STATE,
                progress=lambda at: update(at.done, at.total, at.message),
            )

    def finish(self) -> None:
        """Remove what was kept, once the tuned model is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


def request_of(
    model: str,
    config: FrameQuantConfig,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    dtype: str,
    mix: Mix,
) -> dict[str, Any]:
    """What decides the result of a quantization, beside its tuning."""
    return {
        "model": model,
        "calibration": calibration,
        "samples": samples,
        "sequence_length": length,
        "dtype": dtype,
        **_prefixed("mix", asdict(mix)),
        **_prefixed("config", config.to_dict()),
    }


def describe_tuning(tuning: dict[str, Any]) -> str:
    """What a tuning brought, in words."""
    if not tuning["chosen_step"]:
        before = f"{tuning['loss']} {tuning['loss_before']:.4g}"
        return f"no step was better on held-out data than the untuned model ({before})"
    return (
        f"held-out {tuning['loss']} {tuning['loss_before']:.4g} → {tuning['loss_after']:.4g}, step "
        f"{tuning['chosen_step']} of {tuning['steps']} ({tuning['seconds']:.0f} s)"
    )


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in values.items()}
