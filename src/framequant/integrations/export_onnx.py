"""ONNX of a vision model: pixels in, logits out, any batch size, checked against torch before it is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import ModelSourceError, NumericalError
from framequant.integrations.export import atomic_file, image_description
from framequant.integrations.sources import OpenedModel

#: Largest difference from torch, as a share of the largest logit, at which the graph is kept.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
PIXELS, LOGITS = "pixels", "logits"


def import_onnx() -> tuple[Any, Any]:
    """Import onnx and onnxruntime.

    Raises:
        ModelSourceError: one of them, or onnxscript, is not installed; the message has the command.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelSourceError(
            f"ONNX needs the onnx extra ({error.name} is missing). Run: pip install 'framequant[onnx]'"
        ) from error
    return onnx, onnxruntime


class _Logits(nn.Module):
    """A model as a function from a tensor to a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        outputs = self.model(pixels)
        return outputs if isinstance(outputs, Tensor) else outputs[0]


def write(opened: OpenedModel, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write one ``.onnx`` file; weights beyond 2 GB go to a second file beside it.

    Raises:
        ModelSourceError: the model reads no images, or torch cannot export it.
        NumericalError: onnxruntime's logits are not torch's.
    """
    if not opened.is_vision:
        raise ModelSourceError(
            f"{opened.name} reads text; ONNX export is for vision models. Use --format safetensors or gguf."
        )
    settings = opened.require_images()
    model = _Logits(opened.model).eval()
    dtype = next(model.parameters()).dtype
    example = torch.randn(2, 3, settings.height, settings.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _quiet():
        expected = model(example.to(dtype))
        try:
            program = torch.onnx.export(
                model,
                (example.to(dtype),),
                dynamo=True,
                input_names=[PIXELS],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # torch raises many kinds here, all of them about the model
            raise ModelSourceError(f"{opened.name}: torch cannot export it to ONNX: {error}") from error
    assert program is not None
    program.model.metadata_props["framequant.images"] = image_description(opened)
    with atomic_file(out) as partial:
        program.save(str(partial))
        difference = _difference(partial, example.to(dtype), expected)
        if not difference <= TOLERANCE[dtype]:
            raise NumericalError(
                f"{opened.name}: onnxruntime's logits differ from torch's by {difference:.2g} of the largest; "
                "nothing was written. Try --dtype float32."
            )
    return {"inputs": {PIXELS: ["batch", 3, settings.height, settings.width]}, "difference": difference}


def _difference(path: Path, example: Tensor, expected: Tensor) -> float:
    """Largest difference between onnxruntime's logits and torch's, relative to the largest logit."""
    _, onnxruntime = import_onnx()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy(example.float().numpy())
    if example.dtype == torch.float16:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(example.numpy())
    logits = torch.from_numpy(session.run_with_ort_values([LOGITS], {PIXELS: value})[0].numpy()).float()
    return float((logits - expected.float()).abs().max() / expected.float().abs().max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own passes off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
