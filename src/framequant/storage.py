"""Which tensors a quantized linear stores, their shapes and dtypes, and how rows are decoded from them.

This is the meeting point of the codes (what integers mean) and everything that holds or reads them: the
quantizer fills these tensors, ``FrameLinear`` carries them as buffers, the checkpoint writes and checks them.
Names are part of the file format (see ``docs/format.md``)::

    packed_codes  uint8   codes of the coefficient matrix D, (m_out, m_in), packed row by row or tile by tile
    scales        bf16    value of one code step, per row, row group or tensor
    zero_points           in code units, only where the grid has them
    activation_steps  f32 steps of activations that do not follow from the token
    packed_bias, bias_scale   the bias, only where a Sigma-Delta code holds it

Must not import layers or models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.codes import sigma_delta, trellis_storage
from framequant.codes.grid import Grid, GridSpec, ZeroPoint, decode, levels
from framequant.codes.packing import bytes_per_row, unpack_codes
from framequant.codes.sigma_delta import SigmaDeltaSpec
from framequant.codes.trellis import TrellisSpec
from framequant.errors import CheckpointError
from framequant.frames import FrameKind, FrameOperator, FrameSpec
from framequant.spec import LinearSpec

#: Rows of D decoded at a time by the reference product, so that no dense matrix stays resident.
ROWS_PER_TILE = 1024

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(spec: LinearSpec) -> Layout:
    """Shape and dtype of every stored tensor of a linear, by name; the bias is not among them."""
    tensors = _code_layout(spec)
    if spec.activation is not None and spec.activation.stored_steps:
        tensors["activation_steps"] = ((spec.activation.stored_steps,), torch.float32)
    return tensors


def _code_layout(spec: LinearSpec) -> Layout:
    rows, cols = spec.coefficient_shape
    if isinstance(spec.code, GridSpec):
        return _grid_layout(spec.code, rows, cols)
    if isinstance(spec.code, SigmaDeltaSpec):
        return sigma_delta.layout(spec.code, rows, cols)
    return trellis_storage.layout(spec.code, rows, cols)


def _grid_layout(grid: GridSpec, rows: int, cols: int) -> Layout:
    scale_shape = (1, 1) if grid.per_tensor else (rows, -(-cols // (grid.group_size or cols)))
    tensors: Layout = {
        "packed_codes": ((rows, bytes_per_row(cols, grid.num_levels)), torch.uint8),
        "scales": (scale_shape, getattr(torch, grid.scale_dtype)),
    }
    if grid.zero_point is not ZeroPoint.SYMMETRIC:
        dtype = torch.int16 if grid.zero_point is ZeroPoint.INTEGER else torch.bfloat16
        tensors["zero_points"] = (scale_shape, dtype)
    return tensors


def check(spec: LinearSpec, tensors: Mapping[str, Tensor], name: str) -> None:
    """Check that the tensors of one linear are those its spec asks for.

    Args:
        spec: the linear's spec.
        tensors: stored tensors by their short name.
        name: prefix of the keys, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape or dtype; the key is named.
    """
    expected = layout(spec)
    for key in sorted(set(expected) | set(tensors)):
        if key not in tensors:
            raise CheckpointError(f"{name}.{key} is missing from the checkpoint.")
        if key not in expected:
            raise CheckpointError(f"{name}.{key} is not expected by the linear's scheme.")
        shape, dtype = expected[key]
        found = tensors[key]
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise CheckpointError(
                f"{name}.{key}: expected {dtype} of shape {shape}, found {found.dtype} of shape {tuple(found.shape)}."
            )


def num_bytes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each stored tensor, by name."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def decode_rows(
    spec: LinearSpec, tensors: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype
) -> Float[Tensor, "rows m_in"]:
    """Decode rows ``start … stop - 1`` of the coefficient matrix D̃.

    Args:
        spec: the linear's spec.
        tensors: its stored tensors.
        start: first row; for a trellis a multiple of its tile height.
        stop: one past the last row; likewise, or the number of rows.
        dtype: of the result; decoding is done in float32 at least, then cast.

    Returns:
        A new tensor (stop - start, m_in) on the tensors' device.
    """
    rows, cols = spec.coefficient_shape
    if isinstance(spec.code, SigmaDeltaSpec):
        return sigma_delta.decode_rows(spec.code, tensors, cols, start, stop, dtype)
    if not isinstance(spec.code, GridSpec):
        return trellis_storage.decode_rows(spec.code, tensors, rows, cols, start, stop, dtype)
    codes = unpack_codes(tensors["packed_codes"][start:stop], spec.code.num_levels, cols)
    return decode(codes, stored_grid(spec.code, tensors, start, stop), dtype=dtype)


def holds_bias(spec: LinearSpec) -> bool:
    """Whether the code stores the linear's bias too; it is then no parameter of its own."""
    return isinstance(spec.code, SigmaDeltaSpec) and spec.code.bias_size > 0


def decode_bias(
    spec: LinearSpec, tensors: Mapping[str, Tensor], frame: FrameOperator, dtype: torch.dtype
) -> Float[Tensor, " out_features"]:
    """The bias that a code with ``holds_bias`` stores, synthesised by ``frame``; a new tensor."""
    assert isinstance(spec.code, SigmaDeltaSpec)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return frame.synthesis(sigma_delta.decode_bias(spec.code, tensors, work)).to(dtype)


def bias_frame(spec: LinearSpec) -> FrameSpec:
    """The frame in R^out that a quantized bias was expanded in: harmonic, with dual and seed of the weight's frame."""
    assert isinstance(spec.code, SigmaDeltaSpec)
    dual = max(spec.frame_in.dual_order, spec.frame_out.dual_order)
    seed = spec.frame_in.seed or spec.frame_out.seed
    return FrameSpec(
        FrameKind.HARMONIC,
        spec.out_features,
        num_subspaces=spec.code.bias_size,
        subspace_dim=1,
        seed=seed,
        dual_order=dual,
    )


def stored_grid(grid: GridSpec, tensors: Mapping[str, Tensor], start: int, stop: int) -> Grid:
    """The grid of some rows, rebuilt from the stored scales and zero points."""
    rows = slice(None) if grid.per_tensor else slice(start, stop)
    scales = tensors["scales"]
    zeros = tensors.get("zero_points")
    return Grid(
        spec=grid,
        levels=levels(grid).to(scales.device),
        scales=scales[rows],
        zero_points=None if zeros is None else zeros[rows],
    )


def row_tiles(spec: LinearSpec) -> list[tuple[int, int]]:
    """Row ranges in which the reference product decodes D̃, aligned to the code's tiles."""
    rows = spec.coefficient_shape[0]
    step = ROWS_PER_TILE
    if isinstance(spec.code, TrellisSpec):
        step = max(ROWS_PER_TILE // spec.code.tile_rows, 1) * spec.code.tile_rows
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
