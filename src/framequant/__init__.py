"""framequant: vision transformers and language models at two point something bits, in fusion-frame space.

The public names, and nothing else. Importing this package imports neither transformers nor triton.
"""

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
from framequant.integrations.registration import install as _install
from framequant.layers import FrameLinear
from framequant.model.report import QuantizationReport
from framequant.model.walk import Progress, quantize_
from framequant.pretrained import load, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DiscoveryError",
    "FrameError",
    "FrameLinear",
    "FrameQuantConfig",
    "FrameQuantError",
    "ModelSourceError",
    "NumericalError",
    "Progress",
    "QuantizationReport",
    "load",
    "preset",
    "quantize_",
    "save_pretrained",
]

_install()
