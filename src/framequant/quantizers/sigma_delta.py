"""Sigma-Delta quantization of vectors expanded in a unit-norm tight frame: which codes and which step.

``SigmaDelta`` holds the choices, ``SigmaDelta.quantize`` carries them out for many vectors at once:
``c = E x`` → step δ → codes by the recursion (``kernels.sigma_delta``) → post-pass (``flips``) → measured error.
Order 0 is memoryless quantization of the same coefficients (frame PCM), so that both are compared with everything
else equal. Steps are rounded to what the file stores before codes are chosen against them.

Everything is float64 and free of modules; any device. Must not import models or layers.

References:
    Benedetto, Powell, Yılmaz, "Sigma-Delta quantization and finite frames", IEEE Trans. Inf. Theory 52, 2006.
    Czaja, Na, "Frame quantization of neural networks", arXiv 2404.08131.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Float64, Int32, UInt8
from torch import Tensor

from framequant.codes.sigma_delta import (
    SCALE_DTYPE,
    Dual,
    Step,
    check_levels,
    code_values,
    parse_dual,
    parse_step,
)
from framequant.errors import ConfigError, NumericalError
from framequant.frames import DualStage
from framequant.kernels.sigma_delta import Sequences, quantize_sequences
from framequant.quantizers.flips import flip_codes

#: Coefficients worked on at a time, so that memory stays far below that of a whole matrix.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
#: Shares of the stable step that ``step = "mse"`` tries; all of them on a sample of so many vectors, and on the others
#: those between the least and the greatest that suited the sample. The stable step itself is always tried.
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
SAMPLE = 64


@dataclass(frozen=True)
class Expansion:
    """Quantized vectors, and what it cost; lines are vectors.

    Attributes:
        codes: (vectors, N).
        scales: (vectors,) in storage dtype: ``sqrt(d/N) δ``; 0 for a zero vector, whose codes mean nothing.
        overloads: (vectors,) states beyond half a step in the recursion, before the post-pass.
        peaks: (vectors,) largest |u| over δ; at most 1/2 where the recursion was stable.
        energies: (vectors,) Σ (u/δ)².
        stable_steps: (vectors,) the least δ tried with which no state overloaded, infinite if none was. The error
            is at most that of this δ, since the best is kept: what a-priori bounds rest on.
        errors: (vectors,) measured ‖x - L q‖ of the codes as they are stored, in units of x.
    """

    codes: UInt8[Tensor, "vectors size"]
    scales: Float[Tensor, " vectors"]
    overloads: Int32[Tensor, " vectors"]
    peaks: Float64[Tensor, " vectors"]
    energies: Float64[Tensor, " vectors"]
    stable_steps: Float64[Tensor, " vectors"]
    errors: Float64[Tensor, " vectors"]

    def steps(self, stage: DualStage) -> Float64[Tensor, " vectors"]:
        """δ of each vector, in units of the frame coefficients."""
        return self.scales.double() * math.sqrt(stage.num_coefficients / stage.dim)


def stable_gain(num_levels: int, order: int) -> float:
    """Return g such that ``|c_n| <= g δ`` for all n keeps every state of order ρ within ±δ/2.

    The quantizer's input is at most ``(2^ρ - 1) δ/2 + max|c|``, and must not pass K δ. For order 1 that is
    ``K - 1/2``; for order 0 it is K, and the bound is on the rounding error.

    Examples:
        >>> stable_gain(2, 1), stable_gain(4, 2), stable_gain(8, 3)
        (0.5, 0.5, 0.5)
    """
    return num_levels / 2 - (2**order - 1) / 2


@dataclass(frozen=True)
class SigmaDelta:
    """The choices of a Sigma-Delta quantizer.

    Attributes:
        order: ρ, 1 … 3; 0 for memoryless quantization.
        levels: 2K, even, from 2^ρ to 256.
        step: "stable", "norm", "mse", or δ itself as a positive number.
        dual: "canonical" or "sobolev".
        passes: of the post-pass at most; 0 for none.

    Raises:
        ConfigError: a value is out of range or the order is unstable with so few levels; the message names the
            nearest valid choice.
    """

    order: int = 1
    levels: int = 2
    step: Step | float | str = Step.MSE
    dual: Dual | str = Dual.CANONICAL
    passes: int = 0

    def __post_init__(self) -> None:
        check_levels(self.levels, self.order)
        object.__setattr__(self, "step", parse_step(self.step))
        object.__setattr__(self, "dual", parse_dual(self.dual, self.order))
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or not 0 <= self.passes <= 1000:
            raise ConfigError(f"flip passes = {self.passes!r}: expected an integer from 0 to 1000.")

    @property
    def dual_order(self) -> int:
        """Order of the Sobolev dual; 0 for the canonical."""
        return self.order if self.dual is Dual.SOBOLEV else 0

    def quantize(
        self, vectors: Float[Tensor, "vectors dim"], stage: DualStage, backend: str = "auto"
    ) -> Expansion:
        """Quantize vectors.

        Args:
            vectors: x, one a line, any float dtype.
            stage: the frame, with the dual that decodes (``dual_order`` of this object).
            backend: of the recursion, see ``kernels.sigma_delta``.

        Returns:
            Codes, scales and figures.

        Raises:
            NumericalError: NaN or infinity in the vectors.
            ConfigError: the stage decodes with another dual than this object says.
        """
        if stage.dual_order != self.dual_order:
            raise ConfigError(
                f"the stage has dual order {stage.dual_order}, this quantizer {self.dual_order}."
            )
        if not bool(torch.isfinite(vectors).all()):
            raise NumericalError("the vectors to quantize contain NaN or infinity.")
        fractions = self._fractions(vectors, stage, backend)
        parts = [self._chunk(chunk.double(), stage, backend, fractions) for chunk in _chunks(vectors, stage)]
        return Expansion(
            *(torch.cat([getattr(part, entry.name) for part in parts]) for entry in fields(Expansion))
        )

    def _fractions(self, vectors: Tensor, stage: DualStage, backend: str) -> tuple[float, ...]:
        """The shares of the stable step to try."""
        if self.step is not Step.MSE:
            return (1.0,)
        if len(vectors) <= SAMPLE:
            return FRACTIONS
        sample = vectors[:: -(-len(vectors) // SAMPLE)].double()
        coefficients = stage.frame.analysis(sample)
        full = self._full_steps(sample, coefficients, stage)
        tried = [self._try(sample, coefficients, full * f, stage, backend, f == 1.0) for f in FRACTIONS]
        suited = torch.stack([found.errors for found in tried]).argmin(0)
        low, high = int(suited.min()), int(suited.max())
        return (1.0, *FRACTIONS[max(low, 1) : high + 1])

    def _chunk(
        self, vectors: Tensor, stage: DualStage, backend: str, fractions: tuple[float, ...]
    ) -> Expansion:
        coefficients = stage.frame.analysis(vectors)
        full = self._full_steps(vectors, coefficients, stage)
        best: Expansion | None = None
        for fraction in fractions:
            found = self._try(vectors, coefficients, full * fraction, stage, backend, fraction == 1.0)
            best = found if best is None else _better(best, found)
        assert best is not None
        if self.passes:
            codes = flip_codes(best.codes, vectors, best.scales, self.levels, stage, self.passes)
            error = _errors(vectors, codes, best.scales, self.levels, stage)
            best = replace(best, codes=codes, errors=error)
        return best

    def _full_steps(self, vectors: Tensor, coefficients: Tensor, stage: DualStage) -> Float64[Tensor, " v"]:
        """The step that is given, or the one that is stable."""
        if not isinstance(self.step, Step):
            return torch.full_like(vectors[:, 0], float(self.step))
        largest = vectors.norm(dim=1) if self.step is Step.NORM else coefficients.abs().amax(1)
        return largest / stable_gain(self.levels, self.order)

    def _try(
        self,
        vectors: Tensor,
        coefficients: Tensor,
        steps: Tensor,
        stage: DualStage,
        backend: str,
        round_up: bool,
    ) -> Expansion:
        root = math.sqrt(stage.dim / stage.num_coefficients)
        scales = stored_scales(steps * root, round_up)
        real = torch.where(scales > 0, scales.double() / root, 1.0)
        found: Sequences = quantize_sequences(coefficients, real, self.levels, self.order, backend)
        errors = _errors(vectors, found.codes, scales, self.levels, stage)
        stable = torch.where(found.overloads == 0, scales.double() / root, torch.inf)
        stable = torch.where(scales > 0, stable, 0.0)
        return Expansion(found.codes, scales, found.overloads, found.peaks, found.energies, stable, errors)


def stored_scales(scales: Float64[Tensor, " v"], round_up: bool) -> Float[Tensor, " v"]:
    """Round scales to their storage dtype; upwards where a bound rests on them."""
    rounded = scales.to(SCALE_DTYPE)
    if round_up:
        above = (rounded.view(torch.int16) + 1).view(SCALE_DTYPE)  # the next number, since none is negative
        rounded = torch.where(rounded.double() < scales, above, rounded)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError(f"a step is beyond what {SCALE_DTYPE} can hold.")
    return rounded


def _errors(
    vectors: Tensor, codes: Tensor, scales: Tensor, levels: int, stage: DualStage
) -> Float64[Tensor, " v"]:
    decoded = stage.synthesis(code_values(codes, levels, torch.float64)) * scales.double()[:, None]
    return (vectors - decoded).norm(dim=1)


def _better(one: Expansion, other: Expansion) -> Expansion:
    """The better of two expansions, vector by vector."""
    take = other.errors < one.errors
    merged = {}
    for entry in fields(Expansion):
        old, new = getattr(one, entry.name), getattr(other, entry.name)
        merged[entry.name] = torch.where(take[:, None] if old.dim() == 2 else take, new, old)
    merged["stable_steps"] = torch.minimum(one.stable_steps, other.stable_steps)
    return Expansion(**merged)


def _chunks(vectors: Tensor, stage: DualStage) -> Iterator[Tensor]:
    count = max(CHUNK.get(vectors.device.type, CHUNK["cpu"]) // stage.num_coefficients, 1)
    yield from vectors.split(count)
