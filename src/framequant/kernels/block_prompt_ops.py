"""A prompt's linear whose output frame is local to blocks of rows, as a ``torch.library`` operator.

Panels are rows of the weight itself, seen from the input frame, so cuBLAS writes outputs. Kernels start early
(``triton_support``) where they have something to do that does not need the one before: the first panel may be written
while tokens are analysed, since its memory is asked for before that. Parts of the operator are functions, for
benchmarks. Its fake implementation gives shapes to ``torch.compile``; it has no derivative.

Must not import layers. Only ``framequant.kernels.triton_linear`` imports this module. Imports torch and triton.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from framequant.kernels import launches, prompt_ops
from framequant.kernels.block_plan import FOLD_BLOCK, FOLD_WIDTH, fold_gain, fraction_and_power
from framequant.kernels.block_triton import finish_tokens
from framequant.kernels.panel_fold_triton import fold_bytes, fold_panel
from framequant.kernels.panel_turn_triton import turn_bytes, turn_panel
from framequant.kernels.prompt_transform_triton import prompt_transform
from framequant.kernels.prompt_walsh_triton import SIZE, walsh_tokens
from framequant.kernels.trellis_triton import tile_words
from framequant.kernels.triton_ops import starts_early, turns_matrices
from framequant.kernels.triton_support import COMPILED

#: Tokens that a program of ``finish_tokens`` looks at where there is no bias: it rarely has anything to do.
FINISHED = 16


@torch.library.custom_op("framequant::block_prompt", mutates_args=())
def prompt(
    x: Tensor,
    flips: Tensor | None,
    x_signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    columns: int,
    words: Tensor,
    scales: Tensor,
    top: Tensor,
    places: Tensor,
    signs: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    frame: Tensor | None,
    ends: list[int],
    layout: list[int],
    factor: float,
) -> Tensor:
    """Outputs (tokens, rows) in the dtype of ``x``, whose rows may be apart.

    The first seven are those of ``analysis``, the others those of ``product``.
    """
    panel = new_panel(x, columns, ends)
    z, unit = analysis(x, flips, x_signs, matrices, sizes, norm, columns)
    return product(
        words, z, unit, scales, top, places, signs, matrix, bias, frame, ends, layout, factor, panel, True
    )


@prompt.register_fake
def _(x, flips, x_signs, matrices, sizes, norm, columns, words, scales, top, places, *others):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], places.shape[0]))


def analysis(
    x: Tensor,
    flips: Tensor | None,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Coefficients of tokens (tokens, dim) in the dtype of ``x`` (tokens, width(columns)), and their units (tokens,).

    A unit is 1 unless halves do not suit a token's norm. The next kernel may start early; see ``product``. ``flips``
    are ``TransformPlan.flips``, the others after it also are those of the plan.
    """
    (tokens, dim), wide, early = x.shape, prompt_ops.width(columns), starts_early(x.device)
    make = torch.empty if wide == columns else torch.zeros  # the filling meets the filling of a panel
    z = make((tokens, wide), dtype=x.dtype, device=x.device)
    unit = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if flips is not None and dim == SIZE and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        warps = launches.WALSH_WARPS
        walsh_tokens[(-(-tokens // warps),)](
            x, flips, z, unit, tokens, x.stride(0), norm, WARPS=warps, PDL=early, SPARE=launches.WALSH_SPARE,
            num_warps=warps, launch_pdl=early,
        )  # fmt: skip
        return z, unit
    prompt_transform[(tokens,)](
        x, signs, *matrices, x, unit, z, unit, x.stride(0), wide, norm, *sizes, ANALYSIS=True, BIAS=False, PLAIN=True,
        PDL=early, num_warps=launches.prompt_warps(sizes), maxnreg=launches.prompt_registers(sizes), launch_pdl=early,
    )  # fmt: skip
    return z, unit


def new_panel(x: Tensor, columns: int, ends: list[int]) -> Tensor:
    """Memory for the largest panel, in the dtype of ``x``; of no use to kernels that are launched from here on."""
    wide = prompt_ops.width(columns)
    found = pairwise([0, *launches.panel_ends(ends, wide, len(x))])
    return torch.empty((max(end - start for start, end in found), wide), dtype=x.dtype, device=x.device)


def product(
    words: Tensor,
    z: Tensor,
    unit: Tensor,
    scales: Tensor,
    top: Tensor,
    places: Tensor,
    signs: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    frame: Tensor | None,
    ends: list[int],
    layout: list[int],
    factor: float,
    panel: Tensor,
    behind: bool = False,
) -> Tensor:
    """Outputs (tokens, rows) in the dtype of ``z``; no more than a panel of the weight is decoded at a time.

    Args:
        z: made by ``analysis``, of a ``FoldPlan`` if there is a ``frame``; so is ``unit``.
        frame: the lanes of that plan.
        ends: of the chunks of a ``BlockPlan``, as are ``places``, ``signs`` and ``matrix``.
        layout: trellis or not, bits, multiplier, addend, pattern, levels.
        panel: ``new_panel``.
        behind: ``analysis`` is the last that was launched, and ``panel`` is from before that: no kernel that analysis
            does not wait for uses it.
    """
    (tokens, wide), rows, block = z.shape, len(places), len(matrix)
    y = torch.empty((tokens, rows), dtype=z.dtype, device=z.device)
    if frame is None:
        gain = prompt_ops.gain(bool(layout[0]), factor) * block**-0.5
    else:
        gain = fold_gain(factor)[1]
    for start, end in pairwise([0, *launches.panel_ends(ends, wide, tokens)]):
        count = end - start
        row_scales = scales[start:end] if scales.numel() > 1 else scales
        turned = places[start:], signs[start:]
        early = behind and start == 0
        if frame is not None:
            _fold(words[start:], row_scales, top, panel[:count], frame, *turned, gain, start, early)
        elif layout[0] and block == FOLD_BLOCK and turns_matrices(z.device):
            down = start // 16 * tile_words(layout[4])
            _turn(words[down:], row_scales, top, panel[:count], *turned, gain, start, layout, early)
        else:
            prompt_ops.decode(
                words, start, row_scales, top, panel[:count], layout, launches.block_panel_tile(block),
                places_ptr=turned[0], signs_ptr=turned[1], matrix_ptr=matrix, gain=gain, first=start, BLOCK=block,
            )  # fmt: skip
        torch.mm(z, panel[:count].t(), out=y[:, start:end])
    _finish(y, unit, top, bias)
    return y


def _fold(
    words: Tensor,
    scales: Tensor,
    top: Tensor,
    panel: Tensor,
    frame: Tensor,
    places: Tensor,
    signs: Tensor,
    gain: float,
    first: int,
    behind: bool,
) -> None:
    """Decode as many rows as ``panel`` has of two-bit ``words``, with both frames multiplied in.

    ``behind``: an analysis, to write while it runs.
    """
    tile, units = launches.FOLD_TILE, panel.shape[1] // FOLD_WIDTH
    grid, how = _rotating(tile, units, panel, behind)
    memory = None if COMPILED else torch.empty(fold_bytes(tile.units, tile.warps) // 4, device=words.device)
    fold_panel[grid](
        words, scales, top, panel, frame, places, signs, memory, 2 * words.stride(0), units, panel.shape[1], gain,
        first, ROW_SCALES=scales.numel() > 1, **how,
    )  # fmt: skip


def _turn(
    words: Tensor,
    scales: Tensor,
    top: Tensor,
    panel: Tensor,
    places: Tensor,
    signs: Tensor,
    gain: float,
    first: int,
    layout: list[int],
    behind: bool,
) -> None:
    """Decode as many rows as ``panel`` has of ``words`` of a trellis, rotated; ``behind`` as in ``_fold``."""
    _, bits, multiplier, addend, pattern, _ = layout
    tile, units = launches.TURN_TILE, -(-panel.shape[1] // FOLD_WIDTH)
    grid, how = _rotating(tile, units, panel, behind)
    memory = (
        None
        if COMPILED
        else torch.empty(turn_bytes(tile.units, tile.warps, pattern) // 4, device=words.device)
    )
    turn_panel[grid](
        words, scales, top, panel, places, signs, memory, words.stride(0), units, panel.shape[1],
        *fraction_and_power(gain), first,
        BITS=bits, MULTIPLIER=multiplier, ADDEND=addend, PATTERN=pattern, ROW_SCALES=scales.numel() > 1, **how,
    )  # fmt: skip


def _rotating(
    tile: launches.FoldTile, units: int, panel: Tensor, behind: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs for so many units a row, and how they are launched."""
    early = starts_early(panel.device)
    return (-(-units // (tile.units * tile.warps)), len(panel) // FOLD_BLOCK), {
        "UNITS": tile.units, "WARPS": tile.warps, "PDL": early, "BEHIND": behind,
        "num_warps": tile.warps, "maxnreg": tile.registers, "launch_pdl": early,
    }  # fmt: skip


def _finish(y: Tensor, unit: Tensor, top: Tensor, bias: Tensor | None) -> None:
    """Multiply outputs by what ``analysis`` and panels were divided by, and add the bias."""
    (tokens, rows), half, early = y.shape, y.dtype == torch.float16, starts_early(y.device)
    if half or bias is not None:
        each = FINISHED if bias is None else 1
        finish_tokens[(-(-tokens // each),)](
            y, unit, top, unit if bias is None else bias, tokens, rows, HALF=half, BIAS=bias is not None,
            TOKENS=each, STEP=1024, PDL=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
