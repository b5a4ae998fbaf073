"""Quantization-aware training: codes that move, in frame space.

``prepare_fake_quant_`` puts a ``FakeQuantLinear`` in the place of every ``FrameLinear``. Its parameter is the float
matrix D of frame coefficients; the forward rounds D to the layer's own grid, so the model computes exactly what the
quantized one will, and the backward takes the rounding for the identity within a step of the grid and for a constant
beyond it (straight-through estimator). ``bake_fake_quant_`` turns the rounded coefficients back into codes. Grids,
frames and bits stay as they are. Scalar codes only: others do not round coefficients one by one.

References:
    Bengio, Léonard, Courville 2013, arXiv 1308.3432, for the straight-through estimator.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from framequant import storage
from framequant.codes.grid import Grid, GridSpec, decode, encode
from framequant.codes.packing import pack_codes
from framequant.errors import ConfigError, DiscoveryError
from framequant.frames import build_frame
from framequant.kernels import reference
from framequant.layers import FrameLinear


class _StraightThrough(torch.autograd.Function):
    """Round to the grid; gradients pass where that moves a coefficient by no more than one step."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, grid: Grid) -> Tensor:
        widest = grid.levels.diff().amax().to(coefficients.dtype) * _over_columns(grid, coefficients.shape[1])
        rounded = decode(encode(coefficients, grid), grid, dtype=coefficients.dtype)
        ctx.save_for_backward((rounded - coefficients).abs() <= widest)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


def _over_columns(grid: Grid, columns: int) -> Tensor:
    """The scale of every column, (rows, columns) or broadcasting to it."""
    size = grid.spec.group_size
    return grid.scales if size is None else grid.scales.repeat_interleave(size, dim=1)[:, :columns]


class FakeQuantLinear(nn.Module):
    """``y = T_outᵀ round(D) T_in x + b`` with D and b trained.

    Args:
        layer: a quantized linear with a scalar code; its values are where D starts.

    Raises:
        ConfigError: the layer's code is not scalar.
    """

    def __init__(self, layer: FrameLinear) -> None:
        super().__init__()
        if not isinstance(layer.spec.code, GridSpec):
            raise ConfigError(
                "quantization-aware training needs code = 'scalar': a trellis or Sigma-Delta code does not round "
                "coefficients one by one. framequant.tune_ trains the scales of trellis codes."
            )
        self.spec = layer.spec
        self.in_features, self.out_features = layer.in_features, layer.out_features
        rows = self.spec.coefficient_shape[0]
        start = storage.decode_rows(self.spec, layer.tensors, 0, rows, torch.float32)
        self.coefficients = nn.Parameter(start)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self._fixed = tuple(name for name in layer.tensors if name != "packed_codes")
        for name in self._fixed:
            self.register_buffer(name, layer.tensors[name])
        self.frame_in, self.frame_out = build_frame(self.spec.frame_in), build_frame(self.spec.frame_out)

    @property
    def grid(self) -> Grid:
        """The grid that coefficients are rounded to."""
        fixed = {name: getattr(self, name) for name in self._fixed}
        return storage.stored_grid(self.spec.code, fixed, 0, self.spec.coefficient_shape[0])

    def forward(self, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
        """Apply the layer with rounded coefficients."""
        rounded = _StraightThrough.apply(self.coefficients, self.grid)
        fixed = {name: getattr(self, name) for name in self._fixed}
        coefficients = reference.coefficients(self.spec, fixed, self.frame_in, inputs)
        products = functional.linear(coefficients, rounded.to(inputs.dtype))
        outputs = reference.synthesis(self.frame_out, products)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def bake(self) -> FrameLinear:
        """The quantized linear that this one computes: same grid, new codes."""
        codes = encode(self.coefficients.detach(), self.grid)
        tensors = {
            "packed_codes": pack_codes(codes, self.spec.code.num_levels),
            **{name: getattr(self, name) for name in self._fixed},
        }
        layer = FrameLinear.from_tensors(self.spec, tensors, self.bias)
        layer.train(self.training)
        return layer


def prepare_fake_quant_(model: nn.Module) -> list[str]:
    """Replace every quantized linear of a model by one whose codes are trained; in place.

    Args:
        model: quantized by ``quantize_`` with a scalar code, or loaded.

    Returns:
        The names of the linears. Their ``coefficients`` are parameters of the model, in code units times scale, so
        an optimizer made before this call does not know them.

    Raises:
        ConfigError: a linear's code is not scalar.
        DiscoveryError: the model has no quantized linear.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, FrameLinear)}
    if not found:
        raise DiscoveryError(
            f"{type(model).__name__} has no quantized linear; call framequant.quantize_ first."
        )
    replacements = {name: FakeQuantLinear(layer) for name, layer in found.items()}
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    return list(replacements)


def bake_fake_quant_(model: nn.Module) -> list[str]:
    """Turn what ``prepare_fake_quant_`` made back into quantized linears, in place.

    Returns:
        The names of the linears. The model can be saved and computes what it computed before, on the backend
        "reference" bit for bit.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}
    for name, module in found.items():
        model.set_submodule(name, module.bake())
    return list(found)
