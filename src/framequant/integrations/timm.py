"""timm: what a checkpoint of a timm model needs beside tensors, and how it is loaded.

``config.json`` has timm's own local-directory form (``architecture``, ``model_args``, ``pretrained_cfg``), so
timm's transforms and data config are found where timm keeps them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from framequant import checkpoint
from framequant.errors import CheckpointError, ModelSourceError


def import_timm() -> Any:
    """Import timm.

    Raises:
        ModelSourceError: it is not installed; the message has the command.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelSourceError("timm is not installed; run: pip install 'framequant[vision]'.") from error
    return timm


def config_dict(model: nn.Module, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """Timm's description of a model: architecture, arguments, data config."""
    import json
    import tempfile

    from timm.models._hub import save_config_for_hf  # the public save_for_hf would write the weights too

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        save_config_for_hf(model, str(path), **({"model_args": model_args} if model_args else {}))
        return dict(json.loads(path.read_text()))


def load(directory: Path, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Load a timm checkpoint.

    Raises:
        CheckpointError: the architecture is unknown, or a tensor is missing, unknown or reshaped.
    """
    timm = import_timm()
    config = checkpoint.read_json(directory / checkpoint.CONFIG_NAME)
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"config.json: architecture {name!r} is no model of timm {timm.__version__}.")
    args = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    overlay = {
        key: value for key, value in (config.get("pretrained_cfg") or {}).items() if key != "architecture"
    }
    # Not on the meta device: buffers that are computed and not stored (Swin's masks) must hold their values.
    skeleton = timm.create_model(
        name, pretrained=False, num_classes=config.get("num_classes"), pretrained_cfg_overlay=overlay, **args
    )
    model = checkpoint.load_into(skeleton, directory, config, device)
    return model.to(dtype) if dtype is not None else model
