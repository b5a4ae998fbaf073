"""transformers: our quantizer for ``from_pretrained``, and what a transformers checkpoint needs beside tensors.

``AutoModelForCausalLM.from_pretrained(directory)`` finds ``quant_method: framequant`` in ``config.json``, asks
``FrameQuantHfQuantizer`` to swap the linears of the empty model for ``FrameLinear`` and then loads tensors by
name, as for any model. Files are checked against the specs before that, since transformers only warns about
tensors that are missing. With ``quantization_config=FrameQuantConfig(…)`` on a float model the weights are loaded
first and quantized afterwards, without data (``model/without_data.py``).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto as _registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from framequant import checkpoint, integrity
from framequant.checkpoint import QUANT_METHOD, QuantizationEntry
from framequant.config import FrameQuantConfig
from framequant.errors import CheckpointError, ConfigError, FrameQuantError
from framequant.fused import refuse_fused
from framequant.layers import FrameLinear
from framequant.model.discovery import stacked_parameters
from framequant.model.experts import fuse_, unfuse_
from framequant.pretrained import read_report
from framequant.untrusted import Header, check_skeleton

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
        with torch.device(
            "cpu"
        ):  # transformers calls this inside its meta device, where nothing can be computed
            return checkpoint.parse_quantization(self.to_dict())


class FrameQuantHfQuantizer(HfQuantizer):
    """Prepares an empty transformers model for a framequant checkpoint, or quantizes a float one when loaded.

    Args:
        quantization_config: what the checkpoint says, or the ``FrameQuantConfig`` that a float model was loaded
            with.
        pre_quantized: whether the weights on disk are quantized.
    """

    requires_calibration = False
    quantization_config: FrameQuantHfConfig | FrameQuantConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._unfused: set[str] = set()
        if not self.pre_quantized and not isinstance(quantization_config, FrameQuantConfig):
            raise ConfigError(
                "a float model is quantized with quantization_config=framequant.FrameQuantConfig(…), "
                f"not with {type(quantization_config).__name__}."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the version of transformers."""
        check_version()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not self.pre_quantized:
            return model
        stored = self.quantization_config.entry()
        self._unfused = {
            name for module in unfuse_(model, stored.linears).values() for name in stacked_parameters(module)
        }
        entry = fit_names(stored, model)
        header: Header = {}
        if checkpoint_files:
            header = _check_files(model, stored, [Path(name) for name in checkpoint_files])
        checkpoint.install_linears(model, entry)
        if checkpoint_files:
            check_skeleton(model, header, entry.linears)
            if integrity.is_wanted():  # last: other checks name a fault more exactly
                files = [Path(name) for name in checkpoint_files]
                checkpoint.verify(files[0].parent)
                checkpoint.verify(files[0].parent, files)
        guards = {f"{re.escape(name)}$" for name in checkpoint.guard(entry.linears)}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *guards,
        }
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            return quantize_loaded_(model, self.quantization_config)
        for name, module in model.named_modules():
            if isinstance(module, FrameLinear):
                for part, tensor in module.tensors.items():
                    if tensor.is_meta and not hasattr(module, "_hf_hook"):
                        raise CheckpointError(f"{name}.{part} was not loaded.")
        checkpoint.check_scales(model)
        source = Path(str(getattr(model.config, "name_or_path", "")))
        if (source / checkpoint.REPORT_NAME).is_file():
            model.framequant_report = read_report(source)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Drop conversions into stacked parameters that were taken apart: the file has our names for their parts."""
        kept = [
            conversion
            for conversion in weight_conversions
            if not isinstance(conversion, WeightConverter)
            or not any(target.rpartition(".")[2] in self._unfused for target in conversion.target_patterns)
        ]
        return super().update_weight_conversions(kept, *args)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model, dtype)

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The model's tensors and the guard against readers that do not know us, for ``save_pretrained``."""
        refuse_fused(model)
        names = {
            name: module.spec for name, module in model.named_modules() if isinstance(module, FrameLinear)
        }
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            return None, {}  # Offloaded: transformers gathers the tensors itself.
        return {**model.state_dict(), **checkpoint.guard(names)}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Quantized models save what they hold."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of frozen quantized linears can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Norms and biases are parameters beside the codes; ``Trainer`` evaluates no model that denies this."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The reference product is plain torch."""
        return True


def _check_files(model: nn.Module, entry: QuantizationEntry, files: list[Path]) -> Header:
    """Check the files of a checkpoint: inside its directory, well formed, and what its config says.

    Raises:
        CheckpointError: they are not; the key is named.
    """
    source = str(getattr(model.config, "name_or_path", ""))
    if os.path.isdir(source):
        home = os.path.abspath(source)
        for path in files:
            if os.path.commonpath([home, os.path.abspath(path)]) != home:
                raise CheckpointError(
                    f"{path} lies outside {source}; the index of the checkpoint is damaged."
                )
    header = checkpoint.read_header(files)
    checkpoint.check_header(entry, header)
    checkpoint.check_index(files[0].parent, files)
    return header


def fit_names(entry: QuantizationEntry, model: nn.Module) -> QuantizationEntry:
    """The entry for a model with or without a head: ``AutoModel`` of a language model's checkpoint, or the reverse."""
    names = dict(model.named_modules())
    if all(name in names for name in entry.linears):
        return entry
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    inner = {
        name.removeprefix(prefix): spec for name, spec in entry.linears.items() if name.startswith(prefix)
    }
    if inner and all(name in names for name in inner):
        return replace(entry, linears=inner)
    outer = {prefix + name: spec for name, spec in entry.linears.items()}
    return replace(entry, linears=outer) if all(name in names for name in outer) else entry


def quantize_loaded_(model: nn.Module, config: FrameQuantConfig) -> nn.Module:
    """Quantize a float transformers model in place without data, as far as ``from_pretrained`` goes.

    Raises:
        ConfigError: the model is spread over devices.
    """
    from framequant.model.without_data import quantize_without_data_

    if any(tensor.is_meta for tensor in model.parameters()) or len(_devices(model)) > 1:
        raise ConfigError(
            "a float model is quantized on one device. Load it with device_map={'': 'cpu'}, save it, and load the "
            "quantized model with the device_map that you want."
        )
    report = quantize_without_data_(model, config, probe_inputs(model))
    linears = {name: module.spec for name, module in model.named_modules() if isinstance(module, FrameLinear)}
    attach(model, checkpoint.quantization_dict(FrameQuantConfig.from_dict(report.config), linears))
    return model


def _devices(model: nn.Module) -> set[str]:
    return {str(tensor.device) for tensor in model.parameters()}


def probe_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Inputs of the right shape to run a model once, or None where they cannot be told from its config."""
    config, device = model.config, next(model.parameters()).device
    kind = getattr(model, "main_input_name", "")
    if kind == "input_ids":
        ids = torch.zeros(1, 8, dtype=torch.long, device=device)
        both = {"input_ids": ids, "decoder_input_ids": ids}
        return both if getattr(config, "is_encoder_decoder", False) else {"input_ids": ids}
    size = getattr(config, "image_size", None)
    if kind == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=device, dtype=model.dtype)}
    return None


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every ``FrameLinear`` by the dense ``nn.Linear`` that it is equal to, and fuse experts again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrameLinear):
            linear = module.to_linear(dtype or torch.get_default_dtype())
            model.set_submodule(name, linear)
    return fuse_(model)


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
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    model_class = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json: architectures {names!r} names no model class of transformers.")
    if (directory / "generation_config.json").is_file():
        checkpoint.read_json(directory / "generation_config.json")  # transformers passes a damaged one over
    with integrity.settled():
        try:
            model, info = model_class.from_pretrained(
                directory,
                dtype=dtype or "auto",
                device_map=None,
                output_loading_info=True,
                local_files_only=True,
            )
        except FrameQuantError:
            raise
        except Exception as error:  # whatever transformers raises on a config that it cannot follow
            raise CheckpointError(
                f"{directory}: transformers cannot build the {first} that config.json describes, or not fill it "
                f"({type(error).__name__}: {str(error)[:300]})."
            ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(problem, ())))
        if keys:
            raise CheckpointError(f"{directory}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}.")
    return model.to(device)


register(_registry)
