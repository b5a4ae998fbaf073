"""Quantize a model without calibration data: every Hessian is the identity, so all directions matter alike.

The walk is the usual one, on a probe whose values play no part: it only shows which linears read one tensor, so
that these share an input frame as they do with data. Settings that need data fall back, and the report says so.
Codes that never take data (``model/data_free.py``) are made as always.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from framequant.config import CodeKind, FrameQuantConfig
from framequant.model import discovery
from framequant.model.data_free import quantize_data_free
from framequant.model.replay import Call, Replay, call_model, inference_mode
from framequant.model.report import QuantizationReport
from framequant.model.streams import FloatBlock, Stream
from framequant.model.trace import Group
from framequant.model.walk import _Walk, release_decoded, untie
from framequant.quantizers.hessian import Moments

#: What each setting that needs data becomes without.
FALLBACKS: dict[str, Any] = {
    "allocation": "uniform",
    "output_feedback": False,
    "token_weights": 0.0,
    "float_targets": 0.0,
    "residual_targets": 0.0,
    "train_ahead": 0,
    "rounding_samples": None,
    "recapture": False,
}


def without_data(config: FrameQuantConfig) -> tuple[FrameQuantConfig, list[str]]:
    """The settings as far as they can be followed without data.

    Returns:
        The settings; and for each field that changed one ``"name = old became new"``.
    """
    changes = dict(FALLBACKS)
    if config.code is CodeKind.SCALAR and config.sweeps:
        changes["refine_sweeps"] = 0
    if config.code is CodeKind.TRELLIS:
        changes["bits"] = int(8 * config.bits) / 8
    changed = replace(config, **changes)
    notes = [
        f"{name} = {_plain(getattr(config, name))} became {_plain(value)}"
        for name, value in changes.items()
        if getattr(config, name) != value and name != "recapture"
    ]
    return changed, notes


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def quantize_without_data_(
    model: nn.Module, config: FrameQuantConfig, probe: Mapping[str, Tensor] | None = None
) -> QuantizationReport:
    """Quantize a model in place without calibration data.

    Args:
        model: any module with repeated blocks, with its weights loaded.
        config: settings; those that need data fall back, with a warning that names them.
        probe: arguments to run the model with once. Without it, or where the model cannot be run on it, every linear
            has an input frame of its own, which costs time when the model runs and no accuracy.

    Returns:
        The report; it is also kept on the model for ``save_pretrained``.

    Raises:
        ConfigError: a pattern matches nothing.
        DiscoveryError: the model has no repeated blocks.
        NumericalError: NaN or infinity in a weight; the linear is named.
    """
    if config.is_data_free:
        return quantize_data_free(model, config)
    config, notes = without_data(config)
    note = "quantized without calibration data: identity Hessians. " + "; ".join(notes)
    warnings.warn(f"framequant: the model is {note.rstrip('. ')}.", stacklevel=2)
    with inference_mode(model):
        problem = _problem(model, probe)
        walk = _WalkWithoutData(model, [] if problem else [probe], config, None)
        report = walk.run_apart() if problem else walk.run()
    report.warnings = [note.rstrip(". ") + "."]
    if problem:
        report.warnings.append(f"every linear has an input frame of its own: {problem}.")
    return report


def _problem(model: nn.Module, probe: Mapping[str, Tensor] | None) -> str | None:
    """Why a model cannot be run on a probe, or None if it can."""
    if probe is None:
        return "the inputs of this model are not known"
    try:
        call_model(model, probe)
    except Exception as error:  # whatever a model of any library raises on inputs it does not like
        return f"the model does not run on a probe ({type(error).__name__}: {error})"
    return None


class _WalkWithoutData(_Walk):
    """The walk with identity Hessians, over every selected linear, whether the probe reaches it or not."""

    def run_apart(self) -> QuantizationReport:
        """Quantize every linear by itself, running nothing."""
        start = time.perf_counter()
        self._begin()
        self._quantize_rest()
        self._finish(time.perf_counter() - start)
        return self.report

    def _capture(
        self,
        prefix: str,
        block: nn.Module,
        original: FloatBlock | None,
        calls: Sequence[Call],
        stage: list[Group],
    ) -> dict[str, Moments]:
        return {group.name: _no_moments(block.get_submodule(group.name)) for group in stage}

    def _quantize_outside(self, replay: Replay, stream: Stream) -> None:
        self._quantize_rest()

    def _quantize_rest(self) -> None:
        done = {entry.name for entry in self.report.linears}
        for name in self.selected:
            if name not in done:
                module = self.model.get_submodule(name)
                untie(self.model, module)
                self._quantize_group("", self.model, Group([name]), _no_moments(module))
        self.report.skipped.clear()
        release_decoded(self.model)


def _no_moments(module: nn.Module) -> Moments:
    return Moments(discovery.linear_weight(module).shape[1])
