"""The plain-torch product of a quantized linear: the definition that every fast kernel is held to.

``y = T_outᵀ (D̃ (T_in x)) + b``: the transforms act on activations, never on the weight, and D̃ is decoded a
tile of rows at a time. Transforms run in float32 (float64 for float64 inputs), the product in the input's dtype.

Must not import layers or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from framequant.codes.activation import ActivationSpace, round_activations
from framequant.frames import FrameOperator
from framequant.spec import LinearSpec
from framequant.storage import decode_rows, row_tiles


def transform_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which analysis and synthesis run for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def analysis(frame: FrameOperator, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
    """Coefficients ``T_in x`` in the dtype of the inputs; linears that share a frame share this result."""
    return frame.analysis(inputs.to(transform_dtype(inputs.dtype))).to(inputs.dtype)


def coefficients(
    spec: LinearSpec, tensors: Mapping[str, Tensor], frame: FrameOperator, inputs: Float[Tensor, "*b n"]
) -> Float[Tensor, "*b m"]:
    """What the codes of a linear are multiplied with: ``T_in x``, its activations rounded where the spec says so."""
    activation = spec.activation
    if activation is None:
        return analysis(frame, inputs)
    steps = tensors.get("activation_steps")
    if activation.space is ActivationSpace.INPUT:
        return analysis(frame, round_activations(inputs, activation, steps))
    return round_activations(analysis(frame, inputs), activation, steps)


def product(
    coefficients: Float[Tensor, "*b m_in"], spec: LinearSpec, tensors: Mapping[str, Tensor]
) -> Float[Tensor, "*b m_out"]:
    """``D̃ z`` for every row z of the input, decoding D̃ tile by tile."""
    return multiply(coefficients, decoded_tiles(spec, tensors, coefficients.dtype))


def decoded_tiles(
    spec: LinearSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[Float[Tensor, "rows m_in"]]:
    """The tiles of rows of D̃, decoded one after the other."""
    return (decode_rows(spec, tensors, start, stop, dtype) for start, stop in row_tiles(spec))


def multiply(
    coefficients: Float[Tensor, "*b m_in"], tiles: Iterable[Float[Tensor, "rows m_in"]]
) -> Float[Tensor, "*b m_out"]:
    """The product with decoded tiles; the same bits whether these are kept or decoded anew."""
    outputs = [functional.linear(coefficients, tile) for tile in tiles]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def synthesis(frame: FrameOperator, outputs: Float[Tensor, "*b m"]) -> Float[Tensor, "*b o"]:
    """``T_outᵀ u`` in the dtype of the input."""
    return frame.synthesis(outputs.to(transform_dtype(outputs.dtype))).to(outputs.dtype)


def dense_weight(
    spec: LinearSpec,
    tensors: Mapping[str, Tensor],
    frame_in: FrameOperator,
    frame_out: FrameOperator,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "o n"]:
    """The weight ``Ŵ = T_outᵀ D̃ T_in`` that the linear is equal to, dense: for export and analysis only."""
    work = transform_dtype(dtype)
    tiles = [decode_rows(spec, tensors, start, stop, work) for start, stop in row_tiles(spec)]
    inner = torch.cat([frame_in.synthesis(tile) for tile in tiles])
    return frame_out.synthesis(inner.T).T.contiguous().to(dtype)
