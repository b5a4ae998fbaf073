"""``save_pretrained`` and ``load``: a quantized model to a directory and back, whoever defined the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from framequant import checkpoint, integrity
from framequant.config import FrameQuantConfig
from framequant.errors import CheckpointError
from framequant.fused import refuse_fused
from framequant.model.report import QuantizationReport
from framequant.model.walk import quantized_linears
from framequant.report.model_card import model_card
from framequant.untrusted import check_config


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    overwrite: bool = False,
    source: str | None = None,
    tokenizer: Any = None,
    model_args: dict[str, Any] | None = None,
    name: str | None = None,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> Path:
    """Write a quantized model to a directory.

    The directory appears complete or not at all. It holds ``config.json``, safetensors, the report, a model card
    and, where given, the tokenizer or image processor.

    Args:
        model: quantized by ``quantize_``; a transformers model, a timm model, or any module.
        directory: where to; must not exist or be empty unless ``overwrite``.
        overwrite: replace what is there.
        source: name of the float model, for the model card.
        tokenizer: anything with ``save_pretrained``: a tokenizer, an image processor.
        model_args: arguments that rebuild a timm model, where timm does not know them itself.
        name: under which others will load it, for the model card: the hub's name. The directory's if not given.
        max_shard_bytes: a new file is begun when one would grow beyond this.

    Returns:
        The directory.

    Raises:
        CheckpointError: the model is not quantized, is fused, or the directory cannot be written.
    """
    refuse_fused(model)
    linears = {name: layer.spec for name, layer in quantized_linears(model).items()}
    report: QuantizationReport | None = getattr(model, "framequant_report", None)
    if not linears:
        raise CheckpointError(
            f"{type(model).__name__} has no quantized linear; call framequant.quantize_ first."
        )
    config = FrameQuantConfig.from_dict(report.config) if report else FrameQuantConfig()
    tensors, aliases = checkpoint.unique_tensors(model)
    # transformers ties embeddings by its own config.
    data = checkpoint.quantization_dict(config, linears, {} if _is_transformers(model) else aliases)
    with checkpoint.atomic_directory(directory, overwrite) as partial:
        write_description(model, partial, data, report, tokenizer, source, name, model_args)
        if _is_transformers(model):
            tensors |= checkpoint.guard(linears)
        checkpoint.write_tensors(tensors, partial, max_shard_bytes)
        checkpoint.write_checksums(partial)
    return Path(directory)


def write_description(
    model: nn.Module,
    directory: Path,
    data: dict[str, Any],
    report: QuantizationReport | None,
    tokenizer: Any = None,
    source: str | None = None,
    name: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Write all of a checkpoint but its tensors; see ``save_pretrained``.

    Args:
        model: quantized; its tensors may be on the meta device.
        directory: where to.
        data: what ``checkpoint.quantization_dict`` gives.
        report: of the run, or None.
        tokenizer, source, name, model_args: see ``save_pretrained``.
    """
    _write_config(model, directory, data, model_args)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if report is not None:
        checkpoint.write_json(report.to_dict(), directory / checkpoint.REPORT_NAME)
        card = model_card(report, source, _library(model), name)
        (directory / "README.md").write_text(card, encoding="utf-8")


def load(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    verify: bool | None = None,
) -> nn.Module:
    """Load a quantized model.

    Args:
        directory: a framequant checkpoint.
        device: where the model goes.
        dtype: of the unquantized parameters; the saved one by default. Codes and scales keep theirs.
        model: a float skeleton to load into, for models that are neither transformers' nor timm's.
        verify: check every tensor and every key of the config against ``framequant_checksums.json``, if the
            checkpoint has it. None for what the environment variable ``FRAMEQUANT_VERIFY`` says: yes unless it is 0.

    Returns:
        The model in evaluation mode; its report is ``model.framequant_report``.

    Raises:
        CheckpointError: the directory is no framequant checkpoint or is damaged; the key is named.
    """
    path = Path(directory)
    config = checkpoint.read_json(path / checkpoint.CONFIG_NAME)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / checkpoint.CONFIG_NAME} holds no mapping.")
    entry = checkpoint.parse_quantization(config.get("quantization_config"))
    files = checkpoint.weight_files(path)
    header = checkpoint.read_header(files)
    checkpoint.check_header(entry, header)
    if integrity.is_wanted(verify):  # after what names the fault more exactly, before anything is built
        checkpoint.verify(path)
    check_config(config, header)
    if integrity.is_wanted(verify):
        checkpoint.verify(path, files)
    if model is not None:
        loaded = checkpoint.load_into(model, path, entry, device)
        loaded = loaded.to(dtype) if dtype is not None else loaded
    elif "architecture" in config:
        from framequant.integrations import timm

        loaded = timm.load(path, device, dtype)
    elif "architectures" in config:
        from framequant.integrations import transformers

        loaded = transformers.load(path, device, dtype)
    else:
        raise CheckpointError(f"{path} belongs to a model of your own: pass a float instance as model=….")
    loaded.framequant_report = read_report(path)
    return loaded


def read_report(directory: str | Path) -> QuantizationReport | None:
    """The report of a checkpoint, or None if it has none.

    Raises:
        CheckpointError: the report is damaged.
    """
    path = Path(directory) / checkpoint.REPORT_NAME
    if not path.is_file():
        return None
    try:
        return QuantizationReport.from_dict(checkpoint.read_json(path))
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no report of this version: {error}.") from error


def _is_transformers(model: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def _library(model: nn.Module) -> str:
    if _is_transformers(model):
        return "transformers"
    return "timm" if isinstance(getattr(model, "pretrained_cfg", None), dict) else "torch"


def _write_config(
    model: nn.Module, directory: Path, data: dict[str, Any], model_args: dict[str, Any] | None
) -> None:
    library = _library(model)
    if library == "transformers":
        from framequant.integrations import transformers

        transformers.attach(model, data)
        transformers.write_config(model, directory)
        return
    description: dict[str, Any] = {}
    if library == "timm":
        from framequant.integrations import timm

        description = timm.config_dict(model, model_args)
    checkpoint.write_json({**description, "quantization_config": data}, directory / checkpoint.CONFIG_NAME)
