"""The post-pass: move single codes by one level, or two nearby codes against each other, while ‖x - L q‖ falls.

Sigma-Delta chooses codes causally, and leaves an error that later codes could still repair. A single code moves the
decoded vector by ``s t_n``, which is far; a pair of opposite moves at distance h moves it by ``s (t_n - t_{n+h})``,
which is short, because nearby frame vectors are alike. With e the error and ``g = T e`` its coefficients, all moves
are judged at once: a move along v lowers ``‖e‖²`` by ``2 <e, v> - ‖v‖²``. In each pass the frame is cut into
windows, each window names its best move, and the best windows of a vector are carried out together; where the error
did not fall after all, because moves are not orthogonal, the vector keeps its old codes and tries fewer. The error
never rises, and the codes cost what they did.

Pure functions of tensors on any device. Must not import models or layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from framequant.codes.sigma_delta import code_values
from framequant.frames import DualStage, HarmonicFrame

#: Codes within a window; pairs lie at most ``LAGS`` apart inside one.
WINDOW = 16
LAGS = 8


@dataclass(frozen=True)
class MoveCosts:
    """Squared lengths of moves by one step: ``‖t_n‖²``, and ``‖t_n - t_{n+h}‖²`` for h = 1 … ``LAGS``.

    Attributes:
        single: (N,) or (1,).
        pairs: for each h a tensor (N - h,) or (1,).
    """

    single: Float[Tensor, " n"]
    pairs: tuple[Float[Tensor, " n"], ...]

    @classmethod
    def of(cls, stage: DualStage, device: torch.device) -> MoveCosts:
        """Work out the lengths for a decoder; from the Gram matrix's one line where that is circulant."""
        lags = range(1, min(LAGS, stage.num_coefficients - 1) + 1)
        if stage.dual_order == 0 and isinstance(stage.frame, HarmonicFrame):
            gram = stage.frame.kernel().to(device) * (stage.dim / stage.num_coefficients)
            return cls(gram[:1], tuple(2 * (gram[:1] - gram[h : h + 1]) for h in lags))
        rows = stage.as_matrix(device=device)
        return cls(rows.square().sum(1), tuple((rows[:-h] - rows[h:]).square().sum(1) for h in lags))


def flip_codes(
    codes: UInt8[Tensor, "vectors size"],
    vectors: Float[Tensor, "vectors dim"],
    scales: Float[Tensor, " vectors"],
    num_levels: int,
    stage: DualStage,
    passes: int,
) -> UInt8[Tensor, "vectors size"]:
    """Improve codes without changing what they cost.

    Args:
        codes: what the quantizer chose.
        vectors: x, float64.
        scales: s of each vector, ``sqrt(d/N) δ``: decoding is ``stage.synthesis(s · values)``.
        num_levels: 2K.
        stage: the frame and the dual that decodes.
        passes: at most so many.

    Returns:
        New codes; no vector's error is larger than before.

    Cost:
        Two transforms and ``LAGS`` elementwise steps over all codes a pass. Most of the gain comes in 20 to 40.
    """
    costs = MoveCosts.of(stage, vectors.device)
    scale = scales.double()[:, None]
    error = vectors - stage.synthesis(code_values(codes, num_levels, torch.float64) * scale)
    energy = error.square().sum(1)
    windows = -(-codes.shape[1] // WINDOW) + 1
    quota = torch.full_like(energy, max(windows // 2, 1))
    current = codes.to(torch.int16)
    for number in range(passes):
        offset = WINDOW // 2 * (number % 2)  # so that pairs across a border of windows get their turn
        change = _best_moves(current, stage.analysis(error), scale, num_levels, costs, offset, quota)
        trial = error - stage.synthesis(change.double() * scale)
        trial_energy = trial.square().sum(1)
        better = trial_energy < energy
        current = torch.where(better[:, None], current + change, current)
        error = torch.where(better[:, None], trial, error)
        energy = torch.where(better, trial_energy, energy)
        quota = torch.where(better, (quota * 1.3).ceil().clamp(max=windows), (quota / 3).clamp(min=1).floor())
    return current.to(torch.uint8)


def _best_moves(
    codes: Int[Tensor, "v n"],
    slopes: Float[Tensor, "v n"],
    scale: Float[Tensor, "v 1"],
    num_levels: int,
    costs: MoveCosts,
    offset: int,
    quota: Float[Tensor, " v"],
) -> Int[Tensor, "v n"]:
    """The change of codes, int16, that the best windows of each vector ask for."""
    gains, lags = _gains(codes, slopes, scale, num_levels, costs, offset)
    vectors, size = codes.shape
    windows = -(-size // WINDOW) + 1
    padded = gains.new_full((vectors, windows * WINDOW), -1.0)
    padded[:, offset : offset + size] = gains
    best, where = padded.unflatten(1, (windows, WINDOW)).max(2)
    starts = torch.arange(windows, device=codes.device) * WINDOW - offset
    first = (where + starts).clamp(0, size - 1)
    lag = lags.gather(1, first).long()
    second = (first + lag).clamp(max=size - 1)
    here, there = slopes.gather(1, first), slopes.gather(1, second)
    direction = torch.where(lag > 0, here - there, here).sign()
    chosen = (best > 0) & (best >= _threshold(best, quota)[:, None])
    move = (direction * chosen).to(torch.int16)
    change = torch.zeros_like(codes).scatter_add_(1, first, move)
    return change.scatter_add_(1, second, torch.where(lag > 0, -move, 0).to(torch.int16))


def _gains(
    codes: Tensor, slopes: Tensor, scale: Tensor, num_levels: int, costs: MoveCosts, offset: int
) -> tuple[Float[Tensor, "v n"], Int[Tensor, "v n"]]:
    """The best gain of a move that starts at each code, over the scale, and its distance (0: a single code)."""
    up, down = codes < num_levels - 1, codes > 0
    allowed = torch.where(slopes > 0, up, down)
    gains = torch.where(allowed, 2 * slopes.abs() - scale * costs.single, -1.0)
    lags = torch.zeros_like(codes)
    window = (torch.arange(codes.shape[1], device=codes.device) + offset) // WINDOW
    for number, cost in enumerate(costs.pairs):
        lag = number + 1
        difference = slopes[:, :-lag] - slopes[:, lag:]
        allowed = torch.where(difference > 0, up[:, :-lag] & down[:, lag:], down[:, :-lag] & up[:, lag:])
        allowed &= window[:-lag] == window[lag:]
        gain = torch.where(allowed, 2 * difference.abs() - scale * cost, -1.0)
        better = gain > gains[:, :-lag]
        gains[:, :-lag] = torch.where(better, gain, gains[:, :-lag])
        lags[:, :-lag] = torch.where(better, lag, lags[:, :-lag])
    return gains, lags


def _threshold(best: Float[Tensor, "v w"], quota: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """The gain of the last window within each vector's quota."""
    ranked = best.sort(dim=1, descending=True).values
    index = (quota.long() - 1).clamp(0, best.shape[1] - 1)
    return ranked.gather(1, index[:, None])[:, 0]
