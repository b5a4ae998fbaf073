"""PEFT: low-rank adapters on top of frozen quantized linears.

``get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))`` works as on a float model, and so does
loading an adapter: importing framequant makes every ``LoraConfig`` know ``FrameLinear``
(``integrations/registration.py``). Merging is refused: the sum of a quantized weight and an adapter is no code.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor, nn

from framequant.errors import ConfigError
from framequant.layers import FrameLinear

_OPTIONS = ("use_dora", "use_qalora", "lora_bias", "velora_config")


def adapter_class() -> type[nn.Module]:
    """The class ``FrameLoraLinear``, made when it is first needed, since it descends from PEFT's ``LoraLayer``."""
    global _ADAPTER
    if _ADAPTER is None:
        _ADAPTER = _make_adapter_class()
    return _ADAPTER


_ADAPTER: type[nn.Module] | None = None


def _make_adapter_class() -> type[nn.Module]:
    import warnings

    from peft.tuners.lora.layer import LoraLayer

    class FrameLoraLinear(nn.Module, LoraLayer):
        """``y = FrameLinear(x) + B A x · scaling``: the first term is frozen, A and B are trained."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
            nn.Module.__init__(self)
            with warnings.catch_warnings():  # PEFT does not know the class, but reads its features rightly
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                LoraLayer.__init__(self, base_layer)
            for option in _OPTIONS:
                if getattr(config, option, None):
                    raise ConfigError(f"{option} is not supported on quantized linears; use plain LoRA.")
            self._active_adapter = adapter_name
            rank, alpha = kwargs.pop("r", config.r), kwargs.pop("lora_alpha", config.lora_alpha)
            self.update_layer(adapter_name, rank, lora_alpha=alpha, config=config)

        def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = self.base_layer(inputs)
            if self.disable_adapters:
                return result
            for name in self.active_adapters:
                if name in self.lora_A:
                    result = result + self._change(name, inputs).to(result.dtype)
            return result

        def _change(self, name: str, inputs: Tensor) -> Tensor:
            down, up = self.lora_A[name], self.lora_B[name]
            inputs = self.lora_dropout[name](inputs.to(down.weight.dtype))
            return up(down(inputs)) * self.scaling[name]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
            raise ConfigError(
                "an adapter cannot be merged into a quantized linear: the sum of its weight and the adapter is no "
                "code of its grid. Keep the adapter beside the model (model.save_pretrained writes it alone), or "
                "call framequant.integrations.transformers.dequantize_(model) on the base model and merge into that."
            )

        def unmerge(self) -> None:
            """Nothing is ever merged."""

    return FrameLoraLinear


def register(config_module: ModuleType) -> None:
    """Make every ``LoraConfig`` of ``peft.tuners.lora.config`` know ``FrameLinear``; harmless when repeated."""
    config_class = config_module.LoraConfig
    finish = config_class.__post_init__
    if getattr(finish, "knows_framequant", False):
        return

    def finish_and_register(self: Any) -> None:
        finish(self)
        self._register_custom_module({FrameLinear: _lazy_adapter})

    finish_and_register.knows_framequant = True  # type: ignore[attr-defined]
    config_class.__post_init__ = finish_and_register


def _lazy_adapter(base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    return adapter_class()(base_layer, adapter_name, **kwargs)
