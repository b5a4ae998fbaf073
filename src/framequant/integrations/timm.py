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
from framequant.untrusted import check_skeleton

#: Arguments of ``timm.create_model`` that read files or turn the model into something else.
_LOADING = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("features_only", "scriptable", "exportable", "no_jit"),
}


def _mapping(config: dict[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: {key} is no mapping.")
    return dict(found)


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
    entry = checkpoint.parse_quantization(config.get("quantization_config"))
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"config.json: architecture {name!r} is no model of timm {timm.__version__}.")
    args = {**_mapping(config, "model_args"), "num_classes": config.get("num_classes")}
    overlay = _mapping(config, "pretrained_cfg")
    overlay.pop("architecture", None)
    for key in sorted(_LOADING & set(args)):
        raise CheckpointError(
            f"config.json: model_args.{key} would load other weights; a checkpoint has its own."
        )

    def build() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay, **args)
        except Exception as error:  # whatever a model of timm raises on arguments it does not like
            raise CheckpointError(
                f"config.json: timm cannot build {name} from model_args, num_classes and pretrained_cfg "
                f"({type(error).__name__}: {str(error)[:200]})."
            ) from error

    header = checkpoint.read_header(checkpoint.weight_files(directory))
    with torch.device("meta"):
        check_skeleton(build(), header, entry.linears)
    # Not on the meta device: buffers that are computed and not stored (Swin's masks) must hold their values.
    model = checkpoint.load_into(build(), directory, entry, device)
    return model.to(dtype) if dtype is not None else model
