"""An unfinished tuning on disk: one safetensors file, replaced atomically, that a later run goes on from.

It holds the trainable values, the best ones so far, the optimizer's moments, and in its metadata where the run
stands and what it was asked for. Another request is refused, with the difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from framequant.errors import CheckpointError, ConfigError

STATE_VERSION = 1


def save_state(
    path: Path, tensors: Mapping[str, Tensor], position: dict[str, Any], request: dict[str, Any]
) -> None:
    """Write a state; the file under ``path`` is the old one or the new one, never half of it.

    Args:
        path: of the file.
        tensors: by name.
        position: where the run stands, JSON-ready.
        request: what the run was asked for, JSON-ready.
    """
    partial = path.with_name(f".{path.name}.partial")
    metadata = {"state": json.dumps({"version": STATE_VERSION, "position": position, "request": request})}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(partial), metadata=metadata)
    os.replace(partial, path)


def load_state(path: Path, request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state, or return None if there is none.

    Raises:
        ConfigError: it belongs to another request; the differences are listed.
        CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            found, position, version = state["request"], state["position"], state["version"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no state of a tuning, or is damaged: {error}. Delete it."
        ) from error
    refuse_changes({"version": version, **found}, {"version": STATE_VERSION, **request}, str(path))
    return tensors, position


def refuse_changes(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Check that an unfinished run was asked for the same thing.

    Raises:
        ConfigError: it was not; the differences are listed.
    """
    changes = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if changes:
        raise ConfigError(
            f"{where} holds an unfinished run with other settings: {'; '.join(changes)}. Repeat the command that "
            "began it, or delete it to start anew."
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """A short fingerprint of tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return total.hexdigest()[:16]
