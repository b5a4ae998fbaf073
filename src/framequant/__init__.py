"""framequant: vision transformers and language models at two point something bits, in fusion-frame space.

The public names, and nothing else. They are imported when first used, so that importing the package is cheap; it
imports neither torch nor transformers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from framequant.integrations.registration import install as _install

if TYPE_CHECKING:
    from framequant.config import PRESETS, FrameQuantConfig, preset
    from framequant.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        DiscoveryError,
        FrameError,
        FrameQuantError,
        ModelSourceError,
        NumericalError,
    )
    from framequant.frames.harmonic import HarmonicFrame
    from framequant.fused import fuse_, unfuse_
    from framequant.integrations.decoding import Decoder
    from framequant.integrations.export import export
    from framequant.integrations.hub import push_to_hub
    from framequant.layers import FrameLinear
    from framequant.model.fake_quant import bake_fake_quant_, prepare_fake_quant_
    from framequant.model.report import QuantizationReport
    from framequant.model.tune import tune_
    from framequant.model.tune_config import TuneConfig, TuningReport
    from framequant.model.walk import Progress, quantize_
    from framequant.pretrained import load, save_pretrained
    from framequant.quantizers.sigma_delta import SigmaDelta
    from framequant.streaming.run import quantize_streaming

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "config",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Decoder": "integrations.decoding",
    "DiscoveryError": "errors",
    "FrameError": "errors",
    "FrameLinear": "layers",
    "FrameQuantConfig": "config",
    "FrameQuantError": "errors",
    "HarmonicFrame": "frames.harmonic",
    "ModelSourceError": "errors",
    "NumericalError": "errors",
    "Progress": "model.walk",
    "QuantizationReport": "model.report",
    "SigmaDelta": "quantizers.sigma_delta",
    "TuneConfig": "model.tune_config",
    "TuningReport": "model.tune_config",
    "bake_fake_quant_": "model.fake_quant",
    "export": "integrations.export",
    "fuse_": "fused",
    "load": "pretrained",
    "prepare_fake_quant_": "model.fake_quant",
    "preset": "config",
    "push_to_hub": "integrations.hub",
    "quantize_": "model.walk",
    "quantize_streaming": "streaming.run",
    "save_pretrained": "pretrained",
    "tune_": "model.tune",
    "unfuse_": "fused",
}

__all__ = [
    "PRESETS",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Decoder",
    "DiscoveryError",
    "FrameError",
    "FrameLinear",
    "FrameQuantConfig",
    "FrameQuantError",
    "HarmonicFrame",
    "ModelSourceError",
    "NumericalError",
    "Progress",
    "QuantizationReport",
    "SigmaDelta",
    "TuneConfig",
    "TuningReport",
    "bake_fake_quant_",
    "export",
    "fuse_",
    "load",
    "prepare_fake_quant_",
    "preset",
    "push_to_hub",
    "quantize_",
    "quantize_streaming",
    "save_pretrained",
    "tune_",
    "unfuse_",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'framequant' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"framequant.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
