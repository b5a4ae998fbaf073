"""A quantized linear on the CPU: which layers the compiled kernels cover, and their constants.

Few tokens (decoding) take one compiled call: transforms in float32, codes decoded in registers, exact sums. Many
tokens (prompts) take the plain transforms and a dense product of tiles of rows that are decoded one after the other.
What is kept beside the stored tensors: scales in float32; for a trellis a second arrangement of its bytes, tile
beside tile; for level counts that are no power of two, codes of whole bits.

Must not import layers; imports numba only when a layer asks for a kernel, and works without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from framequant.codes.grid import GridSpec
from framequant.codes.packing import bytes_per_row, pack_codes, unpack_codes
from framequant.codes.trellis import TrellisSpec
from framequant.codes.trellis_storage import decode_factors
from framequant.frames import BlockHadamard, FrameOperator, FusionFrame, RandomizedHadamard
from framequant.kernels import openmp
from framequant.spec import LinearSpec

#: Up to this many tokens are multiplied with codes in registers; more take a dense product of decoded tiles.
FEW = 8
#: Products of codes and tokens above which a layer's rows are shared out to threads: of torch's OpenMP, or else, since
#: waking them takes longer, of Python.
SHARED, POOLED = 1 << 16, 1 << 22
#: Rows that are decoded together for a dense product.
TILE = 512
SIZES = 5  # place of the product's sizes among a plan's arrays
_KINDS = {torch.bfloat16: 1, torch.float32: 0}
_DTYPES, _PLAIN = (torch.bfloat16, torch.float32, torch.float16), (Tensor, torch.nn.Parameter)


@cache
def compiled() -> ModuleType | None:
    """The module of compiled kernels, or None without numba or on a big-endian machine."""
    if sys.byteorder != "little":
        return None
    try:
        from framequant.kernels import product_cpu
    except ImportError:
        return None
    return product_cpu


@dataclass(frozen=True)
class CpuPlan:
    """The constants of one linear as the compiled kernels take them.

    Attributes:
        arrays: everything that the header points to, kept alive; see ``product_cpu`` for its order.
        header: (22,) int64: address and length of each.
        rows: of the coefficient matrix.
        products: codes of the matrix.
        out_features: length of an output.
        parts: streams of a token for inputs of at most 16 bits.
    """

    arrays: tuple[Any, ...]
    header: NDArray[np.int64]
    rows: int
    products: int
    out_features: int
    parts: int


def cpu_plan(
    spec: LinearSpec,
    tensors: Mapping[str, Tensor],
    frames: tuple[FrameOperator, FrameOperator],
    bias: Tensor | None,
) -> CpuPlan | None:
    """Prepare a linear whose tensors are on the CPU, or return None where the kernels do not cover it.

    Covered: every uniform grid of at most 16 levels with one scale a row or a tensor, with any zero point; every
    trellis with tiles of 16 x 16; frames of up to three Hadamard factors, with a block-diagonal fusion frame or none,
    or of Hadamard transforms in blocks.
    """
    analysis, synthesis = frame_constants(frames[0], True), frame_constants(frames[1], False)
    if analysis is None or synthesis is None or compiled() is None:
        return None
    made: _Product | None = None
    if isinstance(spec.code, GridSpec):
        made = _grid_product(spec, spec.code, tensors)
    elif isinstance(spec.code, TrellisSpec):
        made = _trellis_product(spec, spec.code, tensors)
    if made is None:
        return None
    codes, sizes, places, book, factor, offsets = made
    rows = spec.coefficient_shape[0]
    scales = (tensors["scales"].flatten().float() * factor).expand(rows)
    if "row_factors" in tensors:
        scales = scales * decode_factors(tensors["row_factors"].flatten(), torch.float32)
    arrays = (
        codes.view(-1).view(torch.uint8).numpy(),
        *analysis,
        *synthesis,
        np.array(sizes, np.int64),
        places,
        book,
        np.ascontiguousarray(scales.numpy()),
        np.ascontiguousarray(offsets.expand(rows).numpy()),
        np.zeros(0, np.float32) if bias is None else bias.detach().float().contiguous().numpy(),
    )
    header = np.array([number for array in arrays for number in (array.ctypes.data, array.size)], np.int64)
    # Without a Hadamard transform a few coefficients tower above the others: the step is finer then.
    parts = 1 if len(analysis[0]) else 2
    return CpuPlan(arrays, header, rows, rows * spec.coefficient_shape[1], spec.out_features, parts)


_Product = tuple[Tensor, list[int], NDArray[np.int64], NDArray[np.int32], float, Tensor]


def _grid_product(spec: LinearSpec, grid: GridSpec, tensors: Mapping[str, Tensor]) -> _Product | None:
    rows, cols = spec.coefficient_shape
    if not grid.is_uniform or grid.group_size is not None or grid.num_levels > 16:
        return None
    codes, bits = tensors["packed_codes"].contiguous(), (grid.num_levels - 1).bit_length()
    if grid.num_levels != 1 << bits:
        codes = pack_codes(unpack_codes(codes, grid.num_levels, cols), 1 << bits)
    common = math.gcd(bits, 16)
    chunks = -(-cols // (16 * 16 // common))
    # Pairs of products of 2**14 at most and codes below 2**bits go to half the sums of a stream each.
    split = max((1 << 31) // ((2 << bits << 14) * -(-16 // common // 2)), 1)
    sizes = [bits, rows, cols, bytes_per_row(cols, 1 << bits), chunks, split, 0, 0, 0]
    zeros = tensors.get("zero_points")
    offsets = torch.full((1,), grid.first_level, dtype=torch.float32)
    if zeros is not None:
        offsets = offsets - zeros.flatten().float()
    return codes, sizes, np.zeros((1, 3), np.int64), np.zeros(3, np.int32), 1.0, offsets


def _trellis_product(spec: LinearSpec, code: TrellisSpec, tensors: Mapping[str, Tensor]) -> _Product | None:
    rows, cols = spec.coefficient_shape
    if (code.tile_rows, code.tile_cols) != (16, 16) or code.bits_per_tile % 32:
        return None
    down, across = code.grid(rows, cols)
    words, padded = code.bits_per_tile // 32, -(-across // 8) * 8
    stored = tensors["packed_codes"].contiguous().view(torch.int32).view(down, across, words)
    codes = torch.zeros((down, words, padded), dtype=torch.int32)
    codes[:, :, :across] = stored.transpose(1, 2)
    places = [
        (offset // 32 * padded, (offset // 32 + 1) % words * padded, offset % 32) for offset in code.offsets
    ]
    book = code.book
    numbers = np.array([(1 << code.state_bits) - 1, book.multiplier, book.addend], np.uint32)
    sizes = [0, rows, cols, 4 * words * padded, 0, 0, code.per_state, padded, words]
    offsets = torch.full((1,), -float(book.centre))
    return codes, sizes, np.array(places, np.int64), numbers.view(np.int32), book.scale, offsets


def frame_constants(
    frame: FrameOperator, analysis: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Constants and sizes of one direction of a frame, as ``transform_cpu`` takes them, or None if not covered.

    Constants: signs, then the three factors and the block, the first two to multiply from the left and the others
    from the right.
    """
    stages = getattr(frame, "stages", ())
    if not stages:
        return np.zeros(0, np.float32), np.array([0, 0, 0, 0, 0, 0, frame.dim, frame.dim], np.int64)
    if isinstance(stages[0], BlockHadamard):
        return _block_constants(stages[0])
    hadamard = stages[0]
    if not isinstance(hadamard, RandomizedHadamard) or len(stages) > 2 or len(hadamard.factors) > 3:
        return None
    originals = hadamard._constants.originals
    one = torch.ones(1, 1, dtype=torch.float64)
    factors = [originals[f"factor{i}"] for i in range(len(hadamard.factors))]
    factors = [*factors[:-1], *[one] * (3 - len(factors)), factors[-1]]
    left = factors if analysis else [factor.mT for factor in factors]
    parts = [originals["signs"], left[0], left[1], left[2].mT]
    blocks = inner = outer = 0
    if len(stages) == 2:
        form = getattr(stages[1], "_form", None)
        if not isinstance(stages[1], FusionFrame) or type(form).__name__ != "_BlockForm" or frame.dim % 2:
            return None
        block = form._constants.originals["block"]
        outer, inner = block.shape
        blocks = form.groups
        parts.append(block.mT if analysis else block)
    constants = torch.cat([part.flatten() for part in parts]).float().numpy()
    sizes = [*map(len, factors), inner, outer, blocks, frame.dim, frame.num_coefficients]
    return constants, np.array(sizes, np.int64)


def _block_constants(stage: BlockHadamard) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Constants and sizes of a Hadamard transform in blocks: no factors, and a block that is its own transpose."""
    originals = stage._constants.originals
    parts = [originals["signs"], torch.ones(3, dtype=torch.float64), originals["matrix"].flatten()]
    sizes = [1, 1, 1, stage.block, stage.block, stage.dim // stage.block, stage.dim, stage.dim]
    return torch.cat(parts).float().numpy(), np.array([*sizes, *originals["order"].tolist()], np.int64)


def takes(inputs: Tensor, in_features: int) -> bool:
    """Whether the compiled kernels know these inputs: plain tensors on the CPU, of a dtype of theirs, no tracing."""
    return (
        inputs.is_cpu
        and type(inputs) in _PLAIN
        and inputs.dim() > 0
        and inputs.size(-1) == in_features
        and inputs.dtype in _DTYPES
        and inputs.numel() > 0
        and not torch.compiler.is_compiling()
    )


def is_few(inputs: Tensor) -> bool:
    """Whether ``linear`` takes them: few tokens, and no gradient asked for."""
    return inputs.numel() <= FEW * inputs.size(-1) and not (inputs.requires_grad and torch.is_grad_enabled())


def linear(plan: CpuPlan, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
    """Apply a linear to few tokens: ``takes(inputs)`` and ``is_few(inputs)`` hold.

    Returns:
        A new tensor of the inputs' dtype. Not finite wherever an input of its token is not finite.
    """
    kernels: Any = compiled()
    kind = _KINDS.get(inputs.dtype)
    x = inputs.contiguous() if kind is not None else inputs.float().contiguous()
    *outer, width = x.shape
    tokens = x.numel() // width
    out = torch.empty_like(x) if width == plan.out_features else x.new_empty((*outer, plan.out_features))
    kind = kind or 0
    parts = 2 if inputs.dtype == torch.float32 else plan.parts
    arguments = (x.data_ptr(), out.data_ptr(), tokens, kind, parts, plan.header)
    products = plan.products * tokens
    threads = torch.get_num_threads() if products >= SHARED else 1
    if threads > 1 and openmp.fork_address():
        from framequant.kernels import team_cpu

        team_cpu.linear(*arguments, openmp.fork_address(), team_cpu.PART, threads)
    elif threads > 1 and products >= POOLED:
        _linear_by_pool(plan, threads, *arguments)
    else:
        kernels.linear(*arguments)
    return out if out.dtype == inputs.dtype else out.to(inputs.dtype)


def _linear_by_pool(
    plan: CpuPlan,
    threads: int,
    x: int,
    out: int,
    tokens: int,
    kind: int,
    parts: int,
    header: NDArray[np.int64],
) -> None:
    """``product_cpu.linear`` on Python threads."""
    kernels: Any = compiled()
    prepared = kernels.prepare(x, tokens, kind, parts, header)
    u = np.zeros((tokens, plan.rows))
    share(lambda start, stop: kernels.multiply(*prepared, parts, header, u, start, stop), plan.rows, threads)
    kernels.finish(u, out, kind, header)


def _groups(plan: CpuPlan) -> tuple[int, int]:
    """Into how many groups the codes of a row fall, and how many are in each; see ``dense_cpu``."""
    bits, stride, across = (int(plan.arrays[SIZES][i]) for i in (0, 3, 7))
    if across:
        return across, 16
    return (-(-stride // 3), 8) if bits == 3 else (stride, 8 // bits)


def arranged(plan: CpuPlan, coefficients: Float[Tensor, "*b m_in"]) -> Float[Tensor, "*b columns"]:
    """Coefficients in the order of the columns of ``decoded_tiles``, zero where these have padding.

    Args:
        plan: the linear's plan.
        coefficients: of a dtype that ``takes`` allows.

    Returns:
        A new tensor of the same dtype, float32 for halves, in which the product is to be taken.
    """
    groups, size = _groups(plan)
    z = coefficients.float() if coefficients.dtype == torch.float16 else coefficients
    z = torch.nn.functional.pad(z, (0, groups * size - z.shape[-1]))
    return z.unflatten(-1, (groups, size)).transpose(-1, -2).flatten(-2)


def decoded_tiles(plan: CpuPlan, dtype: torch.dtype) -> Iterator[Float[Tensor, "rows columns"]]:
    """Tiles of rows of D̃, decoded one after the other, their columns in the order of ``arranged``.

    Args:
        plan: the linear's plan.
        dtype: bfloat16 or float32.
    """
    groups, size = _groups(plan)
    for first in range(0, plan.rows, TILE):
        tile = torch.empty((min(TILE, plan.rows - first), groups * size), dtype=dtype)
        share(partial(_decode, plan, groups, tile, first), len(tile), torch.get_num_threads(), 16)
        yield tile


def _decode(plan: CpuPlan, groups: int, tile: Tensor, first: int, start: int, stop: int) -> None:
    """Decode rows ``start … stop - 1`` of a tile whose first row is the matrix's row ``first``."""
    from framequant.kernels import dense_cpu as dense

    codes, sizes, places, book, scales, offsets = (plan.arrays[i] for i in (0, SIZES, 6, 7, 8, 9))
    bits, stride, each, across, words = (int(sizes[i]) for i in (0, 3, 6, 7, 8))
    address = tile.data_ptr() + start * tile.element_size() * tile.shape[1]
    span = (first + start, first + stop)
    if across:
        numbers = book.view(np.uint32)
        dense.trellis_rows(
            codes.ctypes.data,
            words,
            across,
            places,
            numbers,
            each,
            scales,
            address,
            _KINDS[tile.dtype],
            *span,
        )
    else:
        dense.scalar_rows(
            codes.ctypes.data, stride, bits, groups, scales, offsets, address, _KINDS[tile.dtype], *span
        )


def share(work: Callable[[int, int], object], count: int, threads: int, multiple: int = 1) -> None:
    """Call ``work(start, stop)`` on even parts of ``range(count)``, one of them on the caller's own thread."""
    step = -(-count // (threads * multiple)) * multiple
    spans = [(start, min(start + step, count)) for start in range(0, count, step)]
    jobs = [_pool(threads).submit(work, *span) for span in spans[1:]]
    work(*spans[0])
    for job in jobs:
        job.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="framequant")
