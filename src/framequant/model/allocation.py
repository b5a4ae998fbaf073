"""One number for the bit budget: choose each linear's rate by what its errors would cost the model.

With H the second moment of a linear's inputs, G that of its output gradients (``gradients.py``), d_j the squared
diagonal of the factor through which LDLQ feeds errors forward and σ² the variance of the coefficients, coding
at b bits leaves about ``½ σ² D(b) Σ_j d_j(H) · Σ_i d_i(G)`` nats per token: D(b) is the code's error on a unit
Gaussian, and the sum over G is its trace without feedback between rows. ``quantizers/budget.py`` shares the
bytes out.

Must not import layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from framequant.codes import trellis_storage
from framequant.codes.trellis import TrellisSpec, gaussian_error, rate_pattern
from framequant.config import Allocation, FrameQuantConfig
from framequant.frames import FrameSpec, build_frame
from framequant.model import discovery
from framequant.model.gradients import OutputGradients
from framequant.quantizers.budget import Option, share_out
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.two_sided import feedback_loss
from framequant.quantizers.weight import frame_specs

#: Rates that are tried: the code's multiples of 1/8 bit.
RATES = tuple(step / 8 for step in range(8, 65))
#: Bytes of a linear's entry in ``config.json``: its name, scheme and two seeds, about.
ENTRY_BYTES = 60


def allocate_bits(
    model: nn.Module,
    names: Sequence[str],
    gradients: Mapping[str, OutputGradients],
    config: FrameQuantConfig,
) -> dict[str, Option]:
    """Choose the rate of each linear.

    Args:
        model: the float model.
        names: linears to quantize.
        gradients: with inputs, by name; a linear that was not reached gets the mean rate.
        config: its ``bits`` is the budget: bits on disk per weight, over all these linears.

    Returns:
        The chosen option of each linear.

    Raises:
        ConfigError: the budget cannot be met.
    """
    options: dict[str, list[Option]] = {}
    weights = 0
    for name in names:
        weight = discovery.linear_weight(model.get_submodule(name))
        weights += weight.numel()
        settings = config.for_linear(name) or config
        found = gradients.get(name)
        sensitivity = 0.0 if found is None else _sensitivity(weight, found, settings, name)
        options[name] = _options(weight, sensitivity, settings, name)
    return share_out(options, int(config.bits * weights / 8))


def _options(weight: Tensor, sensitivity: float, settings: FrameQuantConfig, name: str) -> list[Option]:
    """What each rate costs and loses."""
    out_features, in_features = weight.shape
    plain = replace(settings, allocation=Allocation.UNIFORM, bits=RATES[0])
    frame_in, frame_out = frame_specs(plain, in_features, out_features, name, name)
    rows, cols = frame_out.num_coefficients, frame_in.num_coefficients
    result = []
    for rate in RATES:
        spec = TrellisSpec(plain.state_bits, rate_pattern(rate), plain.tile_rows, plain.tile_cols)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in trellis_storage.layout(spec, rows, cols).values()]
        size = sum(sizes) + ENTRY_BYTES + len(name)
        result.append(Option(rate, settings.redundancy, size, sensitivity * gaussian_error(rate)))
    return result


def _sensitivity(weight: Tensor, found: OutputGradients, settings: FrameQuantConfig, name: str) -> float:
    """Loss of unit errors, in nats per token and unit of the code's relative error."""
    out_features, in_features = weight.shape
    frame_in, frame_out = frame_specs(
        replace(settings, allocation=Allocation.UNIFORM, bits=RATES[0]), in_features, out_features, name, name
    )
    upper = feedback_factor(_rotated(found.hessian(), frame_in), settings.damping, name).upper
    gram = found.gram()
    rows = float(gram.diagonal().sum())
    if settings.output_feedback:
        row_upper = feedback_factor(_rotated(gram, frame_out), settings.output_damping, name).upper
        rows = feedback_loss(row_upper, settings.output_block)
    variance = float(weight.double().square().mean()) / (frame_in.num_coefficients / in_features)
    return 0.5 * variance * feedback_loss(upper, settings.tile_cols) * rows


def _rotated(matrix: Tensor, frame: FrameSpec) -> Tensor:
    operator = build_frame(frame)
    return operator.analysis(operator.analysis(matrix).T)
