"""vLLM: an out-of-tree plugin that serves framequant checkpoints of language models.

vLLM calls ``register`` in every one of its processes (entry point ``vllm.general_plugins``); it adds a quantization
config named ``framequant``, so that ``vllm serve DIR`` needs no flag. What vLLM fuses, q/k/v and gate/up, stays
apart in the file; the fused layer here holds one *part* for each and transforms their common input once where
their input frames are equal. Codes never become a dense weight.

Under tensor parallelism a rank holds whole rows of D (``integrations/tensor_parallel.py``); pipeline and data
parallelism divide nothing inside a linear. ``make test-vllm`` runs this module in vLLM's own linear layers,
on the CPU; other tests use stand-ins of its classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framequant import checkpoint, storage
from framequant.checkpoint import QUANT_METHOD, QuantizationEntry
from framequant.errors import CheckpointError, ConfigError
from framequant.integrations.vllm_layer import FusedParts, find_partition
from framequant.spec import LinearSpec

#: Fused modules of vLLM's models and the checkpoint's names of their parts, where a model does not say itself.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def part_names(prefix: str, linears: dict[str, LinearSpec], fused: dict[str, Any] | None = None) -> list[str]:
    """Names in the checkpoint of what a layer of vLLM is made of.

    Args:
        prefix: the layer's name in vLLM.
        linears: the quantized linears of the checkpoint.
        fused: ``packed_modules_mapping`` of the model; ``FUSED`` where it is empty.

    Returns:
        One name, or those of a fused layer in order; none where the layer is not quantized.

    Raises:
        CheckpointError: some parts of a fused layer are quantized and others are not.
    """
    if prefix in linears:
        return [prefix]
    parent, _, last = prefix.rpartition(".")
    names = [f"{parent}.{part}" if parent else part for part in ({**FUSED, **(fused or {})}).get(last, ())]
    found = [name for name in names if name in linears]
    if found and len(found) < len(names):
        missing = sorted(set(names) - set(found))
        raise CheckpointError(
            f"{prefix}: {', '.join(found)} are quantized, but {', '.join(missing)} are not, and vLLM fuses them. "
            "Quantize all of them or ignore all of them."
        )
    return found


#: vLLM names the shard of a fused layer that a loaded tensor belongs to by letter or by number.
_SHARDS = {"q": 0, "k": 1, "v": 2}


def shard_number(shard: Any) -> int:
    """Position of a part in its fused layer: "q", "k", "v", a number, or None for a layer that is not fused.

    Raises:
        CheckpointError: another name.
    """
    if shard is None:
        return 0
    number = _SHARDS.get(shard, shard)
    if isinstance(number, bool) or not isinstance(number, int):
        raise CheckpointError(f"vLLM names an unknown shard {shard!r} of a fused layer.")
    return number


def make_classes(interface: Any) -> tuple[type, type]:
    """The quantization config and the linear method, as classes of vLLM's.

    Args:
        interface: what holds the names that ``register`` imports from vLLM.

    Returns:
        The config class, to be registered, and the linear method.
    """

    class FrameQuantLinearMethod(interface.LinearMethodBase):  # type: ignore[misc, name-defined]
        """Holds the packed tensors of a layer's parts and multiplies with them."""

        def __init__(self, specs: dict[str, LinearSpec]) -> None:
            self.specs = specs

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra: Any,
        ) -> None:
            """Register one parameter per stored tensor name; its loader fills the part that vLLM names."""
            rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
            partition = find_partition(
                self.specs, input_size_per_partition, list(output_partition_sizes), rank, ranks
            )
            if partition.ranks > 1 and ranks != interface.get_tensor_model_parallel_world_size():
                raise ConfigError(
                    f"{next(iter(self.specs))}: vLLM divides it among {ranks} ranks of its own, which is not "
                    "supported; use the same tensor parallelism everywhere."
                )
            layer.framequant = FusedParts(self.specs, partition, interface.tensor_model_parallel_all_gather)
            names = {part for spec in self.specs.values() for part in storage.layout(spec)}
            for name in sorted(names):
                placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
                placeholder.weight_loader = _loader(layer.framequant, name)
                layer.register_parameter(name, placeholder)
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            layer.weight.weight_loader = _pass_over_guard

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Check that every stored tensor came, and drop the placeholders."""
            layer.framequant.check_loaded()
            for name in [key for key, _ in layer.named_parameters(recurse=False) if key != "bias"]:
                delattr(layer, name)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """``y = T_outᵀ D̃ T_in x + b`` for every part."""
            outputs = layer.framequant(x)
            return outputs if bias is None else outputs + bias

    class FrameQuantVllmConfig(interface.QuantizationConfig):  # type: ignore[misc, name-defined]
        """``quantization_config`` of a checkpoint, as vLLM carries it."""

        def __init__(self, entry: QuantizationEntry) -> None:
            super().__init__()
            self.entry = entry

        @classmethod
        def get_name(cls) -> str:
            """The name under which checkpoints ask for it."""
            return QUANT_METHOD

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            """Activations may be of any float dtype."""
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            """Plain torch runs on every GPU that vLLM supports."""
            return 70

        @staticmethod
        def get_config_filenames() -> list[str]:
            """Everything is in ``config.json``."""
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> FrameQuantVllmConfig:
            """Parse ``quantization_config``."""
            return cls(checkpoint.parse_quantization({"quant_method": QUANT_METHOD, **config}))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """The method of a linear that is quantized; vLLM's own float method for other linears."""
            if not isinstance(layer, interface.LinearBase):
                if prefix in self.entry.linears:
                    raise ConfigError(
                        f"{prefix} is quantized; in vLLM heads and embeddings must stay in float."
                    )
                return None
            fused = getattr(self, "packed_modules_mapping", None)
            names = part_names(prefix, self.entry.linears, fused)
            if not names:
                return interface.UnquantizedLinearMethod()
            return FrameQuantLinearMethod({name: self.entry.linears[name] for name in names})

    return FrameQuantVllmConfig, FrameQuantLinearMethod


def _loader(parts: FusedParts, name: str) -> Any:
    """VLLM's ``weight_loader`` of one stored tensor: put it into the part that the shard names."""

    def load(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        parts.load(shard_number(shard), name, loaded)

    return load


def _pass_over_guard(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
    """Take the empty tensor that guards against readers that do not know us; refuse a dense weight.

    Raises:
        CheckpointError: the checkpoint has a dense weight where a quantized one belongs.
    """
    if not checkpoint.is_guard("weight", tuple(loaded.shape)):
        raise CheckpointError(f"a quantized linear came with a dense weight of shape {tuple(loaded.shape)}.")


def register() -> None:
    """Entry point ``vllm.general_plugins``: make vLLM know framequant; harmless when repeated."""
    from types import SimpleNamespace

    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    interface = SimpleNamespace(
        LinearBase=LinearBase,
        LinearMethodBase=LinearMethodBase,
        UnquantizedLinearMethod=UnquantizedLinearMethod,
        QuantizationConfig=QuantizationConfig,
        get_tensor_model_parallel_world_size=get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather=tensor_model_parallel_all_gather,
    )
    register_quantization_config(QUANT_METHOD)(make_classes(interface)[0])
