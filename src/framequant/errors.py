"""Every exception this package raises on purpose.

All descend from ``FrameQuantError``, so one ``except`` catches them; each message says what was wrong and
what to do about it. This module imports nothing of ours and no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FrameQuantError(Exception):
    """Base of every deliberate error; the command line turns it into exit code 2."""


class ConfigError(FrameQuantError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class FrameError(FrameQuantError, ValueError):
    """The requested frame does not exist; the message names the nearest one that does."""


class CalibrationError(FrameQuantError, ValueError):
    """Calibration data is missing, empty, too short, or of the wrong kind."""


class DiscoveryError(FrameQuantError, ValueError):
    """No repeated blocks, or no linear that the patterns select, were found in a model."""


class NumericalError(FrameQuantError, ArithmeticError):
    """NaN or infinity in weights, activations or results; the message names the layer."""


class CheckpointError(FrameQuantError, ValueError):
    """A checkpoint is truncated, renamed, reshaped, or of another version; the message names the key."""


class ModelSourceError(FrameQuantError, ValueError):
    """A model could not be found or opened under the given name."""


class ReportError(FrameQuantError, ValueError):
    """Results that a page is to be made from are missing, empty, or of another kind."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest choice, or the list of choices if none is close."""
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Choose from: {', '.join(options)}." if options else ""
