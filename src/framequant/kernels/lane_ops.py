"""Linears of few tokens through registers alone as ``torch.library`` operators, and how they are launched.

Fake implementations give shapes to ``torch.compile``; the operators have no derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from framequant.kernels import launches, triton_ops
from framequant.kernels.column_triton import column_analysis, column_bytes
from framequant.kernels.lane_analysis_triton import LARGEST
from framequant.kernels.lane_product_triton import lane_product as kernel
from framequant.kernels.lane_product_triton import shared_bytes
from framequant.kernels.lane_token_analysis_triton import regions as token_regions
from framequant.kernels.lane_token_analysis_triton import token_analysis as token_kernel
from framequant.kernels.lane_tokens_triton import lane_tokens, token_bytes
from framequant.kernels.launches import TokenLaunch
from framequant.kernels.transform_plan import TransformPlan, in_one
from framequant.kernels.transform_triton import LAST_BIT, first_factor
from framequant.kernels.triton_support import COMPILED

#: Twice the sum of two bytes that is the level 0 of a trellis (``codes/trellis_codebook.py``).
CENTRE = 510.0


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side."""
    return _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def analysed(sizes: list[int], block: list[int], warps: int = launches.LANE_WARPS) -> int:
    """Numbers of a token that every program analyses for itself, 0 where it copies coefficients."""
    return sizes[0] * sizes[1] * sizes[2] if in_one(sizes, block, 32 * warps) else 0


def fits(codes: int, count: int, numbers: int) -> bool:
    """Whether planes of coefficients fit into the shared memory that a kernel may have; ``codes`` 0 for a trellis.

    With what it takes to analyse so many ``numbers``.
    """
    return shared_bytes(launches.LANE_WARPS, count, codes, numbers) <= launches.LANE_SHARED


def tokens_fit(tokens: int, bits: int) -> bool:
    """Whether slices of coefficients of so many tokens fit into the shared memory that a kernel may have."""
    return token_bytes(-(-tokens // 8), bits, launches.TOKEN_WARPS) <= launches.LANE_SHARED


def analysis(
    x: Tensor,
    gate: Tensor | None,
    signs: Tensor,
    matrices: list[Tensor],
    columns: list[Tensor],
    sizes: list[int],
    norm: float,
    codes: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes of coefficients of one token, its unit and sums, by a launch of their own; ``codes`` 0 for a trellis.

    With a ``gate`` the token is ``silu(gate) x``.
    """
    if not columns:
        x = x if gate is None else gated(gate, x)
        bits = 8 // codes if codes else 0
        return triton_ops.analysis(x, signs, matrices, sizes, norm, max(codes, 1), count, True, bits)
    head, block = columns
    early, rows = triton_ops.starts_early(x.device), len(head)
    z = torch.empty((1, 4, max(codes, 1), count), dtype=torch.int8, device=x.device)
    unit, sums = x.new_empty(1, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    memory = unit if COMPILED else torch.empty(column_bytes() // 4, device=x.device)
    each = block.shape[1]
    column_analysis[(rows,)](
        x, x if gate is None else gate, signs, head, block, z, unit, sums, memory, norm, F0=rows,
        GATED=gate is not None, EACH=each, COUNT=count, CODES=codes,
        PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return z, unit, sums


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """The token that two linears before it make: ``silu(gate) x``."""
    return functional.silu(gate) * x


def _outputs(like: Tensor, tokens: int, rows: int, block: int, dtype: torch.dtype) -> Tensor:
    """What both operators write: outputs of ``dtype``, or with ``block`` 0 products in units of the tokens."""
    shape = (tokens, rows) if block else (1, tokens, rows)
    return like.new_empty(shape, dtype=dtype if block else torch.float32)


@torch.library.custom_op("framequant::lane_linear", mutates_args=())
def linear(
    words: Tensor,
    x: Tensor,
    x_signs: Tensor,
    matrices: list[Tensor],
    columns: list[Tensor],
    sizes: list[int],
    x_block: list[int],
    x_norm: float,
    scales: Tensor,
    places: Tensor | None,
    signs: Tensor | None,
    bias: Tensor | None,
    rows: int,
    block: int,
    layout: list[int],
    factor: float,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    epsilon: float = 0.0,
    gate: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (1, rows) of ``dtype``, or with ``block`` 0 ``D̃ z`` in units of the token, float32 (1, 1, rows); unit.

    ``layout`` holds: weights of a trellis' state or 0, bits, multiplier, addend, codes of a byte, bytes of a plane for
    each of them (``TritonPlan.lane_coefficients``). ``x_signs`` (``lane_signs``), ``matrices``, ``columns``, ``sizes``,
    ``x_block`` and ``x_norm`` are those of the analysis' ``TransformPlan``, ``places`` and ``signs`` those of a
    ``BlockPlan``.

    What comes before and after in a model's block may be part of it: with ``weight`` the token is the root-mean-square
    norm of ``x``, with ``gate`` (1, n) it is ``silu(gate) x``, and ``added`` (1, rows) is added to outputs.
    """
    trellis, bits, multiplier, addend, codes, count = layout
    early, stride = triton_ops.starts_early(x.device), words.stride(0) * words.element_size()
    launch = launches.trellis_launch if trellis == 1 else launches.lane_launch
    how = launch(rows, stride, multiprocessors(x.device))
    y = _outputs(x, 1, rows, block, dtype)
    numbers = analysed(sizes, x_block, how.warps)
    if numbers and gate is not None:
        x, gate = gated(gate, x), None
    if weight is not None and not numbers:
        x, weight = functional.rms_norm(x, x.shape[-1:], weight, epsilon), None
    if numbers:
        if x.data_ptr() % 16:  # programs copy it in pieces of 16 bytes
            x = x.clone()
        unit = torch.empty(1, dtype=torch.float32, device=x.device)
        z, sums = x, unit
    else:
        z, unit, sums = analysis(
            x, gate, x_signs, matrices, columns, sizes, x_norm, 0 if trellis else codes, count
        )
    size = shared_bytes(how.warps, count, 0 if trellis else codes, numbers)
    memory = unit if COMPILED else torch.empty(size // 4, device=x.device)
    last = 1 / LARGEST.value if numbers else LAST_BIT
    level, zero = (factor, CENTRE / trellis) if trellis else (1.0, (1 << bits) / 2 - 0.5)
    kernel[(how.programs,)](
        words.view(torch.uint8), x, z, sums, unit, scales, y, unit if places is None else places,
        unit if signs is None else signs, unit if bias is None else bias, x_signs,
        x if weight is None else weight, x if added is None else added, memory,
        rows, stride, last * level, zero * level, max(block, 1) ** -0.5, x_norm, epsilon, ANALYSED=numbers,
        NORMED=weight is not None, ADDED=added is not None, OUTPUTS=x_block[0], WIDTH=x_block[1], COUNT=count,
        PARTS=sums.numel(), BITS=bits, MULTIPLIER=multiplier, ADDEND=addend, TRELLIS=trellis,
        ROW_SCALES=scales.numel() > 1, BLOCK=block, BIAS=bias is not None, CHUNKS=how.chunks, ROUNDS=how.rounds,
        WARPS=how.warps, WARPS_K=how.warps_k, AHEAD=how.ahead, PDL=early, num_warps=how.warps, launch_pdl=early,
    )  # fmt: skip
    return y, unit


@linear.register_fake
def _(
    words,
    x,
    x_signs,
    matrices,
    columns,
    sizes,
    x_block,
    x_norm,
    scales,
    places,
    signs,
    bias,
    rows,
    block,
    layout,
    factor,
    dtype,
    weight=None,
    epsilon=0.0,
    gate=None,
    added=None,
):  # type: ignore[no-untyped-def]
    return _outputs(x, 1, rows, block, dtype), x.new_empty(1, dtype=torch.float32)


def _token_memory(sizes: list[int], block: list[int], item: int) -> int:
    """Bytes of shared memory of an analysis of tokens, of numbers of ``item`` bytes."""
    size = sizes[0] * sizes[1] * sizes[2]
    return token_regions(size, item, block[0] * 16 // block[1], 32 * launches.LANE_WARPS)[2]


def token_coefficients(
    into: TransformPlan, x: Tensor, interleave: int, count: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Halves, units and sums of a few tokens, as ``tokens`` takes them: by the passes of one token where these serve.

    Args:
        into: of the analysis.
        interleave: coefficients that meet a word, ``16 / bits``; of which a row has ``count``.
    """
    sizes, block = [*into.sizes, *into.padded], list(into.block)
    one = in_one(sizes, block, 32 * launches.LANE_WARPS) and into.lane_signs is not None
    if one and _token_memory(sizes, block, x.element_size()) <= launches.LANE_SHARED:
        return token_analysis(x, into.lane_signs, sizes, block, into.norm, interleave, count)
    return triton_ops.analysis(
        x, into.signs, list(into.matrices), sizes, into.norm, interleave, count, False, bits
    )


@torch.library.custom_op("framequant::lane_token_analysis", mutates_args=())
def token_analysis(
    x: Tensor,
    signs: Tensor,
    sizes: list[int],
    block: list[int],
    norm: float,
    interleave: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (tokens, interleave, count) of tokens (tokens, dim), units (tokens,), sums, and zeros behind them.

    What ``triton_ops.analysis`` makes with ``pair_bits``, in other units, where ``in_one`` holds. ``signs``
    (``lane_signs``), ``sizes``, ``block`` and ``norm`` are those of the ``TransformPlan``.
    """
    number, size = x.shape[0], sizes[0] * sizes[1] * sizes[2]
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16:
        x = x.contiguous()
    if x.data_ptr() % 16:  # programs copy it in pieces of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    z, unit, sums = _token_tensors(x, interleave, count)
    early = triton_ops.starts_early(x.device)
    memory = (
        unit if COMPILED else torch.empty(_token_memory(sizes, block, x.element_size()) // 4, device=x.device)
    )
    token_kernel[(number * launches.TOKEN_PLACES,)](
        x, signs, z, unit, sums, memory, number, x.stride(0), norm, SIZE=size, OUTPUTS=block[0], WIDTH=block[1],
        COUNT=count, BITS=16 // interleave, WARPS=launches.LANE_WARPS, PLACES=launches.TOKEN_PLACES,
        PDL=early, num_warps=launches.LANE_WARPS, launch_pdl=early,
    )  # fmt: skip
    return z, unit, sums


def _token_tensors(x: Tensor, interleave: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ``token_analysis`` writes."""
    number = x.shape[0]
    return (
        x.new_empty((number, interleave, count), dtype=torch.float16),
        x.new_empty(number, dtype=torch.float32),
        x.new_empty((number + launches.MOST_SPARE, 1), dtype=torch.float32),
    )


@token_analysis.register_fake
def _(x, signs, sizes, block, norm, interleave, count):  # type: ignore[no-untyped-def]
    return _token_tensors(x, interleave, count)


def _token_launch(
    rows: int, row_bytes: int, tiles: int, bits: int, programs: int, counters: int
) -> TokenLaunch:
    """The launch for so many tiles of tokens; ``counters`` that are 0."""
    fits = token_bytes(tiles, bits, launches.TOKEN_WARPS, 3) <= launches.LANE_SHARED
    return launches.token_launch(rows, row_bytes, programs, min(counters, launches.MOST_SPARE) if fits else 0)


@torch.library.custom_op("framequant::lane_tokens", mutates_args=())
def tokens(
    words: Tensor,
    z: Tensor,
    sums: Tensor,
    unit: Tensor,
    scales: Tensor,
    places: Tensor | None,
    signs: Tensor | None,
    bias: Tensor | None,
    rows: int,
    block: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, rows) of ``dtype``, or with ``block`` 0 ``D̃ z`` in units of tokens, float32 (1, tokens, rows).

    Args:
        words: of scalar codes of so many ``bits``.
        z: halves (tokens, 16 / bits, count), from ``token_coefficients``, as ``sums`` and ``unit``.
        sums: (tokens, parts), and rows of zeros behind them, which count spare warps and are zeros again afterwards.
            Without such rows three warps share nothing.
        places: of a ``BlockPlan``, as ``signs``.
    """
    number, _, count = z.shape
    early, stride = triton_ops.starts_early(z.device), words.stride(0) * words.element_size()
    y = _outputs(z, number, rows, block, dtype)
    tiles, warps, programs = -(-number // 8), launches.TOKEN_WARPS, multiprocessors(z.device)
    counters = (sums.shape[0] - number) * sums.shape[1]
    how = _token_launch(rows, 2 * count, tiles, bits, programs, counters)
    parts = torch.empty(how.left * 3 * 256 * tiles, device=z.device) if how.left else unit
    memory = (
        unit if COMPILED else torch.empty(token_bytes(tiles, bits, warps, how.share) // 4, device=z.device)
    )
    lane_tokens[(programs,)](
        words.view(torch.uint8), z, sums, unit, scales, y, unit if places is None else places,
        unit if signs is None else signs, unit if bias is None else bias, parts, memory,
        rows, stride, count, number, 2.0**24 / first_factor(bits), (1 << bits) / 2 - 0.5, max(block, 1) ** -0.5,
        TILES=tiles, BITS=bits, PARTS=sums.shape[1], ROW_SCALES=scales.numel() > 1, BLOCK=block, BIAS=bias is not None,
        SLICES=-(-count * 2 // (64 * how.share)), SHARE=how.share, ONCE=how.once, WARPS=warps, PDL=early,
        num_warps=warps, launch_pdl=early,
    )  # fmt: skip
    return y


@tokens.register_fake
def _(words, z, sums, unit, scales, places, signs, bias, rows, block, bits, dtype):  # type: ignore[no-untyped-def]
    return _outputs(z, z.shape[0], rows, block, dtype)
