"""One number for the bit budget: choose each linear's rate by what its errors would cost the model.

With H the second moment of a linear's inputs, G that of its output gradients (``gradients.py``), d_j the squared
diagonal of the factor through which LDLQ feeds errors forward and σ² the variance of the coefficients, coding
at b bits leaves about ``½ σ² D(b) Σ_j d_j(H) · Σ_i d_i(G)`` nats per token: D(b) is the code's error on a unit
Gaussian, and the sum over G is its trace without feedback between rows. ``quantizers/budget.py`` shares the
bytes out.

Must not import layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from framequant.codes.trellis import gaussian_error
from framequant.config import Allocation, CodeKind, FrameQuantConfig
from framequant.frames import FrameSpec, build_frame
from framequant.model import discovery
from framequant.model.gradients import OutputGradients
from framequant.model.report import config_entry
from framequant.quantizers.budget import Option, check_fits, share_out
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.two_sided import feedback_loss
from framequant.quantizers.weight import frame_specs
from framequant.spec import LinearSpec
from framequant.storage import layout

#: Rates that are tried: the code's multiples of 1/8 bit.
RATES = tuple(step / 8 for step in range(8, 65))
#: Share of the budget that may stay unused before frames of a little redundancy fill it up.
SLACK = 0.002
#: ``rate_tilt`` where blocks to come are trained to make good what was lost; measured in experiments/quality/README.md.
TRAINED_TILT = 4.0
#: Redundancies for that, the largest first: those that the GPU kernels take for most dimensions.
FILL = (9 / 8, 17 / 16, 33 / 32, 65 / 64)


@dataclass
class Shares:
    """What each linear was given of the budget.

    Attributes:
        choices: by name.
        budget: bits per weight that were asked for.
        predicted: nats per token that quantization is predicted to cost.
        uniform: the same for one rate for all that fits the budget; None if no rate does.
    """

    choices: dict[str, Option] = field(default_factory=dict)
    budget: float = 0.0
    predicted: float = 0.0
    uniform: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, for the report."""
        return {
            "budget_bits": self.budget,
            "predicted_loss": self.predicted,
            "uniform_loss": self.uniform,
            "choices": {name: asdict(choice) for name, choice in self.choices.items()},
        }


def allocate_bits(
    model: nn.Module,
    names: Sequence[str],
    gradients: Mapping[str, OutputGradients],
    config: FrameQuantConfig,
    use: Mapping[str, float] | None = None,
    known: Mapping[str, float] | None = None,
) -> Shares:
    """Choose the rate of each linear so that all of them take ``config.bits`` bits per weight on disk.

    Args:
        model: the float model.
        names: linears to quantize, in the order in which they run.
        gradients: with inputs, by name; a linear that was not reached counts as insensitive.
        config: an override that names a linear's ``bits`` or ``code`` fixes what it takes of the budget.
        use: share of the model's tokens that pass a linear, 1 for those not named.
        known: what ``sensitivity_of`` gave for each linear, where weights and sums are no longer at hand.

    Returns:
        The choices; predicted to lose no more than one rate for all.

    Raises:
        ConfigError: the budget cannot be met.
    """
    options: dict[str, list[Option]] = {}
    tempering: dict[str, float] = {}
    weights = 0
    for name, tilt in zip(names, _tilts(len(names), config), strict=True):
        weight = discovery.linear_weight(model.get_submodule(name))
        weights += weight.numel()
        settings = config.for_linear(name) or config
        found = gradients.get(name)
        sensitivity = sensitivity_of(weight, found, config, name) if known is None else known.get(name, 0.0)
        sensitivity *= (use or {}).get(name, 1.0) * tilt
        tempering[name] = _tempering(sensitivity / weight.numel(), config.rate_spread)
        options[name] = _options(
            weight, sensitivity * tempering[name], settings, name, config.fixes_code(name)
        )
    budget = int(config.bits * weights / 8)
    choices = _untempered(share_out(options, budget, weights), tempering)
    uniform = _uniform(options, budget)
    uniform = None if uniform is None else _untempered(uniform, tempering)
    if uniform is not None and _loss(uniform) < _loss(choices):
        choices = uniform
    predicted = _loss(choices)
    fixed = {name for name in names if config.fixes_code(name)}
    choices = _fill(model, choices, budget, config, fixed)
    return Shares(choices, config.bits, predicted, None if uniform is None else _loss(uniform))


def check_budget(model: nn.Module, names: Sequence[str], config: FrameQuantConfig) -> None:
    """Refuse a budget that no rates can meet, before anything slow is done.

    Args:
        model: the float model.
        names: linears to quantize.
        config: its ``bits`` are the budget.

    Raises:
        ConfigError: the lowest rates exceed it.
    """
    least = weights = 0
    for name in names:
        weight = discovery.linear_weight(model.get_submodule(name))
        settings = config.for_linear(name) or config
        weights += weight.numel()
        fixed = config.fixes_code(name)
        lowest = replace(settings, allocation=Allocation.UNIFORM) if fixed else at_rate(settings, RATES[0])
        least += stored_bytes(weight.shape, lowest, name)
    check_fits(least, int(config.bits * weights / 8), weights)


def _tilts(count: int, config: FrameQuantConfig) -> list[float]:
    """What the sensitivities of the first to the last linear are multiplied with, see ``config.rate_tilt``."""
    tilt = config.rate_tilt
    if tilt is None:
        tilt = TRAINED_TILT if config.train_ahead else 1.0
    return [tilt ** (place / max(count - 1, 1) - 0.5) for place in range(count)]


def _tempering(per_weight: float, spread: float) -> float:
    """What a sensitivity is multiplied with, so that rates part only ``spread`` times as far.

    The best rates of two linears differ by half the binary logarithm of the ratio of their sensitivities per weight.
    """
    return per_weight ** (spread - 1) if per_weight > 0 else 1.0


def _untempered(choices: Mapping[str, Option], tempering: Mapping[str, float]) -> dict[str, Option]:
    """Choices with the losses that were predicted."""
    return {name: replace(choice, loss=choice.loss / tempering[name]) for name, choice in choices.items()}


def _loss(choices: Mapping[str, Option]) -> float:
    return sum(choice.loss for choice in choices.values())


def _uniform(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option] | None:
    """The highest rate that all linears can have; those with a code of their own keep it."""
    best = None
    for index in range(len(RATES)):
        choices = {name: some[min(index, len(some) - 1)] for name, some in options.items()}
        if sum(choice.size for choice in choices.values()) <= budget:
            best = choices
    return best


def _options(
    weight: Tensor, sensitivity: float, settings: FrameQuantConfig, name: str, fixed: bool
) -> list[Option]:
    """What each rate costs and loses; one option where an override has fixed the code."""
    if fixed:
        plain = replace(settings, allocation=Allocation.UNIFORM)
        rate = plain.bits if plain.code is CodeKind.TRELLIS else math.log2(plain.code_spec().num_levels)
        return [_option(weight, sensitivity, plain, name, rate)]
    rates = [rate for rate in RATES if rate * settings.weights_per_state <= RATES[-1]]
    return [_option(weight, sensitivity, at_rate(settings, rate), name, rate) for rate in rates]


def _option(weight: Tensor, sensitivity: float, settings: FrameQuantConfig, name: str, rate: float) -> Option:
    size = stored_bytes(weight.shape, settings, name)
    error = gaussian_error(rate, settings.weights_per_state)
    return Option(rate, settings.redundancy, size, sensitivity * error)


def at_rate(settings: FrameQuantConfig, rate: float, redundancy: float | None = None) -> FrameQuantConfig:
    """Settings of a linear whose rate is chosen."""
    chosen = settings.redundancy if redundancy is None else redundancy
    return replace(settings, allocation=Allocation.UNIFORM, bits=rate, redundancy=chosen)


def stored_bytes(shape: Sequence[int], settings: FrameQuantConfig, name: str) -> int:
    """Bytes on disk of a linear, its entry in ``config.json`` included."""
    out_features, in_features = shape
    frame_in, frame_out = frame_specs(settings, in_features, out_features, name, name)
    spec = LinearSpec(
        in_features, out_features, frame_in, frame_out, settings.code_spec(), settings.activation_spec()
    )
    sizes = [math.prod(size) * dtype.itemsize for size, dtype in layout(spec).values()]
    return sum(sizes) + len(json.dumps(config_entry(name, spec))) - 1


def _fill(
    model: nn.Module,
    choices: dict[str, Option],
    budget: int,
    config: FrameQuantConfig,
    fixed: set[str],
) -> dict[str, Option]:
    """Use up what steps of 1/8 bit leave of the budget: frames of a little redundancy, largest linears first."""
    left = budget - sum(choice.size for choice in choices.values())
    filled = dict(choices)
    for name in sorted(choices, key=lambda key: -choices[key].size):
        choice = choices[name]
        if left <= SLACK * budget:
            break
        if name in fixed or choice.redundancy > 1:
            continue
        shape = discovery.linear_weight(model.get_submodule(name)).shape
        settings = config.for_linear(name) or config
        for redundancy in FILL:
            size = stored_bytes(shape, at_rate(settings, choice.bits, redundancy), name)
            if choice.size < size <= choice.size + left:
                filled[name] = replace(choice, redundancy=redundancy, size=size)
                left -= size - choice.size
                break
    return filled


def sensitivity_of(
    weight: Tensor, found: OutputGradients | None, config: FrameQuantConfig, name: str
) -> float:
    """Loss of unit errors, in nats per token and unit of the code's relative error; 0 if nothing was found."""
    if found is None:
        return 0.0
    settings = config.for_linear(name) or config
    out_features, in_features = weight.shape
    frame_in, frame_out = frame_specs(settings, in_features, out_features, name, name)
    variance = float(weight.double().square().mean()) / (frame_in.num_coefficients / in_features)
    if found.input_sum is None:  # nothing but sizes: as if neither side had feedback
        return 0.5 * variance * found.input_square / max(found.inputs, 1) * found.mean_square
    hessian = found.hessian()
    columns = feedback_loss(
        feedback_factor(_rotated(hessian, frame_in), settings.damping, name).upper, settings.tile_cols
    )
    if found.gram_sum is None:  # no gradients: the error relative to the layer's output
        wide = weight.double()
        return 0.5 * variance * columns * out_features / max(float(((wide @ hessian) * wide).sum()), 1e-300)
    rows = found.mean_square
    if settings.output_feedback:
        row_upper = feedback_factor(_rotated(found.gram(), frame_out), settings.output_damping, name).upper
        rows = feedback_loss(row_upper, settings.output_block)
    return 0.5 * variance * columns * rows


def _rotated(matrix: Tensor, frame: FrameSpec) -> Tensor:
    operator = build_frame(frame)
    return operator.analysis(operator.analysis(matrix).T)
