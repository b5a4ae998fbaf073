"""transformers: our quantizer for ``from_pretrained``, and what a transformers checkpoint needs beside tensors.

``AutoModelForCausalLM.from_pretrained(directory)`` finds ``quant_method: framequant`` in ``config.json``, asks
``FrameQuantHfQuantizer`` to swap the linears of the empty model for ``FrameLinear`` and then loads tensors by
name, as for any model. Files are checked against the specs before that, since transformers only warns about
tensors that are missing.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto as _registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from framequant import checkpoint
from framequant.checkpoint import QUANT_METHOD, QuantizationEntry
from framequant.errors import CheckpointError, ConfigError
from framequant.layers import FrameLinear

MINIMUM_VERSION = (5, 17)
MAXIMUM_MAJOR = 5


def check_version() -> None:
    """Refuse a transformers outside the supported range.

    Raises:
        ConfigError: with the command that installs one inside it.
    """
    from transformers import __version__

    numbers = tuple(int(part) for part in __version__.split(".")[:2] if part.isdigit())
    if numbers < MINIMUM_VERSION or numbers[0] > MAXIMUM_MAJOR:
        raise ConfigError(
            f"transformers {__version__} is not supported; install a version from "
            f"{'.'.join(map(str, MINIMUM_VERSION))} to {MAXIMUM_MAJOR}.x: pip install 'transformers>=5.17,<6'."
        )


class FrameQuantHfConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers carries it: the dictionary of the checkpoint, unchanged."""

    def __init__(self, **data: Any) -> None:
        data.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.__dict__.update(data)

    def entry(self) -> QuantizationEntry:
        """Parse and validate.

        Raises:
            CheckpointError: a field is wrong; the key is named.
        """
        return checkpoint.parse_quantization(self.to_dict())


class FrameQuantHfQuantizer(HfQuantizer):
    """Prepares an empty transformers model for the tensors of a framequant checkpoint."""

    requires_calibration = True
    quantization_config: FrameQuantHfConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the version of transformers."""
        check_version()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        entry = self.quantization_config.entry()
        if checkpoint_files:
            checkpoint.check_header(entry, checkpoint.read_header([Path(name) for name in checkpoint_files]))
        checkpoint.install_linears(model, entry)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, FrameLinear):
                for part, tensor in module.tensors.items():
                    if tensor.is_meta and not hasattr(module, "_hf_hook"):
                        raise CheckpointError(f"{name}.{part} was not loaded.")
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Quantized models save what they hold."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of frozen quantized linears can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The reference product is plain torch."""
        return True


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every ``FrameLinear`` of a model by the dense ``nn.Linear`` that it is equal to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrameLinear):
            linear = module.to_linear(dtype or torch.get_default_dtype())
            model.set_submodule(name, linear)
    return model


def register(registry: ModuleType) -> None:
    """Add our classes to ``transformers.quantizers.auto``; harmless when repeated."""
    registry.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = FrameQuantHfQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = FrameQuantHfConfig


def attach(model: nn.Module, data: dict[str, Any]) -> None:
    """Mark an in-memory model as quantized, so that its own ``save_pretrained`` writes what ours does."""
    config = FrameQuantHfConfig(**data)
    model.config.quantization_config = config
    model.hf_quantizer = FrameQuantHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


def write_config(model: nn.Module, directory: Path) -> None:
    """Write ``config.json`` and, for a model that generates, ``generation_config.json``."""
    model.config.architectures = [type(model).__name__]
    # Without it transformers would take the dtype of the first tensor of the file, which may be our scales'.
    model.config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.save_pretrained(directory)


def load(directory: Path, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Load a transformers checkpoint with the class that its config names.

    Raises:
        CheckpointError: the class is unknown, or a tensor is missing, unknown or reshaped; the key is named.
    """
    import transformers

    check_version()
    config = checkpoint.read_json(directory / checkpoint.CONFIG_NAME)
    entry = checkpoint.parse_quantization(config.get("quantization_config"))
    checkpoint.check_header(entry, checkpoint.read_header(checkpoint.weight_files(directory)))
    names = config.get("architectures") or []
    model_class = getattr(transformers, str(names[0]), None) if names else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise CheckpointError(f"config.json: architectures {names!r} names no model class of transformers.")
    model, info = model_class.from_pretrained(
        directory, dtype=dtype or "auto", device_map=None, output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(f"{directory}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}.")
    return model.to(device)


register(_registry)
