"""Low-bit activations: what a linear multiplies its codes with, rounded to a few levels per token.

A vector of activations z (a token's frame coefficients, or its features) becomes ``step · k`` with integers k. One
step per token, from the token's largest entry (*token*), or one per linear, chosen on calibration data (*static*).
In frame space coefficients of a token are nearly Gaussian, whatever outliers its features have, so few levels reach
far. *twin* steps are for features of two ranges, as after GELU: one bit says which of two steps holds, one for
negative entries and one, a power of two times as wide, for positive ones.

Nothing here is packed or stored but the static step: activations live for one product. Must not import layers.

References:
    Yao et al. 2022, arXiv 2206.01861 (ZeroQuant): a step per token, symmetric.
    Yuan et al. 2022, arXiv 2111.12293 (PTQ4ViT): twin uniform quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.errors import ConfigError, nearest

#: Widths of an activation that can be asked for.
LEAST_BITS, MOST_BITS = 2, 8
#: Fractions of the largest entry that a static step is tried for.
_FRACTIONS = [1.0 - i / 40 for i in range(39)]
#: How many times wider the positive range of a twin grid may be, as powers of two.
_TWIN_POWERS = 8


class ActivationScaling(StrEnum):
    """Where the step of an activation comes from."""

    TOKEN = "token"  # the token's largest entry, at run time
    STATIC = "static"  # calibration data, one step per linear
    TWIN = "twin"  # calibration data, one step for negative and one for positive entries


class ActivationSpace(StrEnum):
    """What is rounded."""

    FRAME = "frame"  # the coefficients T_in x
    INPUT = "input"  # the features x


@dataclass(frozen=True)
class ActivationSpec:
    """How the activations of a linear are rounded.

    Attributes:
        bits: of an activation, 2…8.
        scaling: where steps come from.
        space: what is rounded.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: int
    scaling: ActivationScaling = ActivationScaling.TOKEN
    space: ActivationSpace = ActivationSpace.FRAME

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ConfigError(
                f"activation_bits = {self.bits!r}: expected an integer from {LEAST_BITS} to {MOST_BITS}, or nothing "
                "for float activations."
            )
        for name, enum in (("scaling", ActivationScaling), ("space", ActivationSpace)):
            value = str(getattr(self, name))
            choices = [member.value for member in enum]
            if value not in choices:
                raise ConfigError(f"activation_{name} = {value!r}.{nearest(value, choices)}")
            object.__setattr__(self, name, enum(value))

    @property
    def stored_steps(self) -> int:
        """How many steps the linear stores: 0, 1 or 2."""
        return {"token": 0, "static": 1, "twin": 2}[self.scaling.value]

    @property
    def largest(self) -> int:
        """The largest integer: 2^(bits-1) - 1 on both sides of zero."""
        return 2 ** (self.bits - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``from_dict`` inverts it."""
        return {key: str(value) if key != "bits" else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationSpec:
        """Build a spec from what ``to_dict`` returned.

        Raises:
            ConfigError: a key is missing or unknown, or a value is not possible.
        """
        if set(data) != {"bits", "scaling", "space"}:
            raise ConfigError(
                f"activation: expected bits, scaling and space, found {sorted(map(str, data))}."
            )
        return cls(**data)


def round_activations(
    values: Float[Tensor, "*b m"], spec: ActivationSpec, steps: Float[Tensor, " steps"] | None = None
) -> Float[Tensor, "*b m"]:
    """Round activations to their grid.

    The result is not the integers but the values they stand for, so that any product can take them. Gradients pass
    as if nothing was rounded.

    Args:
        values: tokens, the last dimension is the token's vector.
        spec: the grid.
        steps: the stored steps, float32, for static and twin scaling.

    Returns:
        A new tensor of the same dtype; float32 inside. A token of zeros stays zeros.
    """
    work = values.detach().float() if values.dtype != torch.float64 else values.detach()
    if spec.scaling is ActivationScaling.TOKEN:
        step = work.abs().amax(-1, keepdim=True) / spec.largest
        step = torch.where(step > 0, step, torch.ones_like(step))
    else:
        assert steps is not None
        step = steps.to(work)
        if spec.scaling is ActivationScaling.TWIN:
            step = torch.where(work < 0, step[0], step[1])
    rounded = (work / step).round().clamp(-spec.largest, spec.largest).mul(step).to(values.dtype)
    if torch.is_grad_enabled() and values.requires_grad:
        return values + (rounded - values.detach())
    return rounded


def fit_steps(sample: Float[Tensor, "tokens m"], spec: ActivationSpec) -> Float[Tensor, " steps"]:
    """The stored steps of least squared error on a sample of activations.

    Args:
        sample: what is to be rounded: coefficients in frame space, else features.
        spec: static or twin scaling.

    Returns:
        float32, one step or two: of negative and of positive entries. The positive one of a twin grid is the negative
        one times a power of two, so that integers of both can be added up with a shift.
    """
    sample = sample.double()
    if spec.scaling is ActivationScaling.STATIC:
        return _best_step(sample, spec.largest).float().reshape(1)
    negative, positive = sample[sample < 0], sample[sample >= 0]
    wide = _best_step(positive, spec.largest)
    steps = [
        (float(_error(negative, wide / 2**power, spec.largest)), power) for power in range(_TWIN_POWERS + 1)
    ]
    return torch.stack([wide / 2 ** min(steps)[1], wide]).float()


def _best_step(values: Tensor, largest: int) -> Tensor:
    """The step of least squared error among fractions of what reaches the largest entry."""
    reach = values.abs().max() if values.numel() else values.new_zeros(())
    if reach <= 0:
        return torch.ones((), dtype=values.dtype, device=values.device)
    candidates = [reach * fraction / largest for fraction in _FRACTIONS]
    errors = torch.stack([_error(values, step, largest) for step in candidates])
    return candidates[int(errors.argmin())]


def _error(values: Tensor, step: Tensor, largest: int) -> Tensor:
    return ((values / step).round().clamp(-largest, largest) * step - values).square().sum()
