"""Export a quantized checkpoint to what other engines read: float safetensors, ONNX, GGUF.

What is exported is dense: every ``FrameLinear`` becomes the float linear that it is equal to, so the files have the
size of the float model and the quality of the quantized one. Each format has a file of its own; this one holds what
they share.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framequant import checkpoint
from framequant.errors import CheckpointError, ConfigError, ModelSourceError, nearest
from framequant.integrations.sources import DTYPES, OpenedModel, open_model
from framequant.layers import FrameLinear
from framequant.model.discovery import is_conv1d
from framequant.model.experts import fuse_, unfuse_


class ExportFormat(StrEnum):
    """What an export writes: a directory of safetensors, or one file."""

    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    GGUF = "gguf"


def export(
    directory: str | Path,
    out: str | Path,
    format: str = "safetensors",
    *,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a quantized checkpoint as a float model for other engines.

    Args:
        directory: a checkpoint of framequant.
        out: a directory for "safetensors": a plain transformers or timm model; a file for "onnx" (vision models;
            checked with onnxruntime against torch) and "gguf" (Llama, Mistral, Qwen2 and Qwen3).
        format: "safetensors", "onnx" or "gguf".
        dtype: "auto" (as the checkpoint's unquantized parameters), "float32", "bfloat16" or "float16".
        overwrite: replace what is at ``out``.

    Returns:
        What was written: ``format``, ``out``, ``bytes``, ``dtype``, and what the format adds.

    Raises:
        ConfigError: unknown format or dtype.
        ModelSourceError: the directory is no checkpoint of ours, the format cannot hold its architecture, or a
            package is missing; the message has the command that installs it.
        CheckpointError: the checkpoint is damaged, or something is at ``out``.
    """
    if format not in set(ExportFormat):
        raise ConfigError(f"format = {format!r}.{nearest(format, [choice.value for choice in ExportFormat])}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}.{nearest(dtype, DTYPES)}")
    target = Path(out)
    if target.exists() and Path(directory).exists() and target.resolve() == Path(directory).resolve():
        raise CheckpointError(f"{target} is the checkpoint itself; choose another place.")
    write = _writer(ExportFormat(format))
    if format == ExportFormat.SAFETENSORS:
        checkpoint.prepare_output(target, overwrite)
    elif target.exists() and (target.is_dir() or not overwrite):
        what = (
            "is a directory; give a file name"
            if target.is_dir()
            else "exists; overwrite it or choose another"
        )
        raise CheckpointError(f"{target} {what}.")
    opened = open_model(str(directory))
    if any(isinstance(m, FrameLinear) and m.spec.activation for m in opened.model.modules()):
        raise ModelSourceError(
            f"{directory} rounds activations at run time, which a float model cannot hold; quantize without "
            "activation_bits to export."
        )
    if not opened.quantized:
        raise ModelSourceError(
            f"{directory} is not quantized by framequant, so there is nothing to dequantize."
        )
    kind = next(parameter.dtype for parameter in opened.model.parameters() if parameter.is_floating_point())
    kind = kind if dtype == "auto" else DTYPES[dtype]
    densify_(opened.model, kind)
    added = write(opened, target, overwrite)
    files = [path for path in target.iterdir() if path.is_file()] if target.is_dir() else [target]
    return {
        "format": str(format),
        "out": str(target),
        "dtype": str(kind).removeprefix("torch."),
        "bytes": sum(path.stat().st_size for path in files),
        **added,
    }


def _writer(format: ExportFormat) -> Any:
    """The function that writes a format; its packages are looked for before anything slow is done."""
    if format is ExportFormat.ONNX:
        from framequant.integrations import export_onnx

        export_onnx.import_onnx()
        return export_onnx.write
    if format is ExportFormat.GGUF:
        from framequant.integrations import export_gguf

        export_gguf.import_gguf()
        return export_gguf.write
    return write_safetensors


def densify_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace every ``FrameLinear`` by the float module it was made from, and cast the rest.

    GPT-2's ``Conv1D`` comes back as one, with its transposed weight, so that the model saves what its class reads.
    """
    floats = _float_skeleton(model)
    if floats is not None:
        unfuse_(floats, [name for name, layer in model.named_modules() if isinstance(layer, FrameLinear)])
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FrameLinear):
            continue
        dense = floats.get_submodule(name) if floats is not None else None
        transposed = dense is not None and is_conv1d(dense)
        bias = layer.dense_bias(dtype)
        if dense is None or not transposed:
            dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
        weight = layer.dequantize(dtype)
        dense.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach(), requires_grad=False)
        model.set_submodule(name, dense)
    return fuse_(model.to(dtype)).eval()


def _float_skeleton(model: nn.Module) -> nn.Module | None:
    """An empty model as transformers builds it from the config; None for other libraries, which have no Conv1D."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def write_safetensors(opened: OpenedModel, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write a dense model in its own library's form: transformers' or timm's local directory."""
    assert opened.path is not None
    config = checkpoint.read_json(opened.path / checkpoint.CONFIG_NAME)
    with checkpoint.atomic_directory(out, overwrite) as partial:
        if opened.kind == "timm":
            config.pop("quantization_config", None)
            checkpoint.write_json(config, partial / checkpoint.CONFIG_NAME)
            tensors = {name: tensor.contiguous() for name, tensor in opened.model.state_dict().items()}
            checkpoint.write_tensors(tensors, partial, checkpoint.MAX_SHARD_BYTES)
        else:
            from framequant.integrations.gguf import forget_quantization

            forget_quantization(opened.model)
            opened.model.config.dtype = next(opened.model.parameters()).dtype
            opened.model.save_pretrained(partial)
            if opened.processor is not None:
                opened.processor.save_pretrained(partial)
    load = f"timm.create_model('local-dir:{out}', pretrained=True)" if opened.kind == "timm" else None
    return {"load": load or f"transformers.{type(opened.model).__name__}.from_pretrained('{out}')"}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to; what lies there, and beside it under longer names, is moved into place on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), reverse=True):
            os.replace(file, path.with_name(file.name))


def image_description(opened: OpenedModel) -> str:
    """How a vision model wants its images, as JSON: what an exported graph cannot know by itself."""
    from dataclasses import asdict

    return json.dumps(asdict(opened.require_images()))
