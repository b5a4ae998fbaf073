"""What tuning may change of a quantized model while its codes stay: scales of rows, norms, biases, embeddings.

A coefficient matrix is decoded once and multiplied by a trainable factor per scale: scalar codes have one for each
stored scale, trellis codes one per row, stored as a byte (``codes.trellis_storage``). Every parameter of one
dimension that the model has (gains and biases of norms, biases of linears, LayerScale) is trained too, and if asked
for its token embeddings and its output head, which stay float and take no bits of the codes. Training sees float32
numbers; ``install`` writes what the file will hold, and that is what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from framequant.codes.trellis import TrellisSpec
from framequant.codes.trellis_storage import decode_factors, encode_factors
from framequant.errors import ConfigError
from framequant.kernels import reference
from framequant.layers import FrameLinear
from framequant.model.replay import forwards_replaced
from framequant.storage import decode_rows

#: Factors of scalar codes stay within this range of the scale that the codes were chosen for.
FACTOR_RANGE = (0.25, 4.0)
#: Rows of coefficients up to which the output transform is one more matrix, faster there than its many short steps.
DENSE_SYNTHESIS = 2048
#: Rate of a vector's entries, relative to their size, is not below that of entries of this size.
SMALLEST_SIZE = 0.01


class TunableLinear:
    """A quantized linear with a trainable factor per scale.

    Args:
        layer: the linear; a trellis without row factors gets a copy with factors of one, ``layer`` afterwards.
        dtype: in which the decoded matrix is kept.

    Attributes:
        layer: the linear that ``install`` writes to.
        offsets: factors minus one, a leaf with gradient, float32.
    """

    def __init__(self, layer: FrameLinear, dtype: torch.dtype) -> None:
        self.layer = _with_row_factors(layer)
        self._scales = layer.tensors["scales"].clone()
        spec, (rows, self._columns) = self.layer.spec, self.layer.spec.coefficient_shape
        with torch.no_grad():
            self._matrix = decode_rows(spec, self.layer.tensors, 0, rows, torch.float32).to(dtype)
        self._trellis = isinstance(spec.code, TrellisSpec)
        self._synthesis: Tensor | None = None
        shape = (rows, 1) if self._trellis else tuple(self._scales.shape)
        self.offsets = torch.zeros(shape, device=self._matrix.device, requires_grad=True)
        if self._trellis:  # factors that a tuning before this one left
            factors = decode_factors(self.layer.tensors["row_factors"], torch.float32)
            self.offsets.data += factors - 1
            self._matrix /= factors.to(dtype)
        self._folded = shape[1] == 1 and self.layer.spec.activation is None
        if self._folded:
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        """Factors of whole rows come after the product, so the analysis can be part of the matrix: fewer operations."""
        frame_in, frame_out = self.layer.frames
        self._matrix = reference.synthesis(frame_in, self._matrix)
        rows = self._matrix.shape[0]
        if rows <= DENSE_SYNTHESIS:
            identity = torch.eye(rows, device=self._matrix.device)
            self._synthesis = frame_out.synthesis(identity).T.to(self._matrix.dtype)

    def _coefficients(self, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """What the matrix is multiplied with: the inputs themselves where it holds the analysis."""
        if self._folded:
            return inputs
        return reference.coefficients(self.layer.spec, self.layer.tensors, self.layer.frames[0], inputs)

    def _product(self, coefficients: Float[Tensor, "*b m"]) -> Float[Tensor, "*b rows"]:
        factors = 1 + self.offsets
        if factors.shape[1] == 1:
            return functional.linear(coefficients, self._matrix) * factors[:, 0]
        group = -(-self._columns // factors.shape[1])
        spread = factors.repeat_interleave(group, dim=1)[:, : self._columns]
        return functional.linear(coefficients, self._matrix * spread.to(self._matrix.dtype))

    def forward(self, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
        """Apply the linear with its factors as they are, differentiably."""
        outputs = self._product(self._coefficients(inputs).to(self._matrix.dtype))
        if self._synthesis is None:
            outputs = reference.synthesis(self.layer.frames[1], outputs.to(inputs.dtype))
        else:
            outputs = functional.linear(outputs.to(self._matrix.dtype), self._synthesis).to(inputs.dtype)
        return outputs if self.layer.bias is None else outputs + self.layer.bias.to(outputs.dtype)

    @torch.no_grad()
    def install(self, offsets: Tensor) -> None:
        """Write factors into the layer, rounded as the format stores them."""
        factors = 1 + offsets.detach()
        if self._trellis:
            self.layer.row_factors = encode_factors(factors)
        else:
            scaled = self._scales.float() * factors.clamp(*FACTOR_RANGE)
            self.layer.scales = scaled.to(self._scales.dtype)


def _with_row_factors(layer: FrameLinear) -> FrameLinear:
    """A linear of the same tensors whose trellis has row factors, all one; other linears as they are."""
    code = layer.spec.code
    if not isinstance(code, TrellisSpec) or code.row_factors:
        return layer
    spec = replace(layer.spec, code=replace(code, row_factors=True))
    ones = torch.zeros(
        (spec.coefficient_shape[0], 1), dtype=torch.int8, device=layer.tensors["scales"].device
    )
    copy = FrameLinear.from_tensors(spec, {**layer.tensors, "row_factors": ones}, layer.bias)
    return copy.train(layer.training)


def embedding_tables(model: nn.Module) -> set[str]:
    """Names of the parameters that hold token embeddings or a float output head, tied ones once.

    Raises:
        ConfigError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or (module is head and isinstance(module, nn.Linear))
    }
    names = {name for name, p in model.named_parameters() if id(p) in found and p.is_floating_point()}
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no token embeddings to tune: leave embedding_rate at 0."
        )
    return names


class Tunable:
    """The trainable numbers of a quantized model, by name, and the way back to what it was.

    Args:
        model: quantized; its trellis linears are replaced by ones with row factors until ``restore``.
        dtype: in which decoded matrices are kept.
        embeddings: whether token embeddings and a float output head are trained too.

    Attributes:
        tables: names of these.
        values: trainable leaves, float32: offsets under the linear's name and ``.factors``, vectors under theirs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, embeddings: bool = False) -> None:
        self._model = model
        self.tables = embedding_tables(model) if embeddings else set()
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, FrameLinear)}
        self._linears = {name: TunableLinear(layer, dtype) for name, layer in self._layers.items()}
        self._scales = {name: layer.tensors for name, layer in self._layers.items()}
        for name, linear in self._linears.items():
            model.set_submodule(name, linear.layer)
        self._vectors = {
            name: p
            for name, p in model.named_parameters()
            if p.is_floating_point() and (p.ndim == 1 or name in self.tables)
        }
        self._before = {name: p.detach().clone() for name, p in self._vectors.items()}
        self.values: dict[str, Tensor] = {
            f"{name}.factors": linear.offsets for name, linear in self._linears.items()
        }
        for name, vector in self._vectors.items():
            self.values[name] = vector.detach().float().clone().requires_grad_(True)

    def size(self, name: str) -> float:
        """The size that a value's rate of learning is relative to: 1 for factors, a vector's root mean square."""
        if name not in self._before:
            return 1.0
        return max(float(self._before[name].float().square().mean().sqrt()), SMALLEST_SIZE)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Run the model on the trainable numbers; call ``collect`` after each backward pass."""
        forwards: dict[nn.Module, Callable[..., Any]] = {
            linear.layer: linear.forward for linear in self._linears.values()
        }
        with ExitStack() as stack:
            for parameter in self._model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            for name, vector in self._vectors.items():
                vector.data.copy_(self.values[name].data)
                vector.requires_grad_(True)
            with forwards_replaced(forwards):
                yield

    def collect(self) -> None:
        """Hand the gradients of the model's own vectors to their float32 leaves."""
        for name, vector in self._vectors.items():
            self.values[name].grad = None if vector.grad is None else vector.grad.float()
            vector.grad = None

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all values."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set all values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def install(self, values: dict[str, Tensor]) -> None:
        """Write values into the model as it will be stored."""
        for name, linear in self._linears.items():
            linear.install(values[f"{name}.factors"])
        for name, vector in self._vectors.items():
            vector.data.copy_(values[name])

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was: its linears, their tensors, its vectors."""
        for name, vector in self._vectors.items():
            vector.data.copy_(self._before[name])
        for name, layer in self._layers.items():
            for part, tensor in self._scales[name].items():
                setattr(layer, part, tensor)
            self._model.set_submodule(name, layer)
