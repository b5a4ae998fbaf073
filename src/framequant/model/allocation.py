"""One number for the bit budget: choose each linear's rate by what its errors would cost the model.

With H the second moment of a linear's inputs, G that of its output gradients (``gradients.py``), d_j the squared
diagonal of the factor through which LDLQ feeds errors forward and σ² the variance of the coefficients, coding
at b bits leaves about ``½ σ² D(b) Σ_j d_j(H) · Σ_i d_i(G)`` nats per token: D(b) is the code's error on a unit
Gaussian, and the sum over G is its trace without feedback between rows. ``quantizers/budget.py`` shares the
bytes out.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from framequant.codes.trellis import gaussian_error
from framequant.config import FrameQuantConfig
from framequant.frames import FrameSpec, build_frame
from framequant.model import discovery
from framequant.model.gradients import OutputGradients
from framequant.quantizers.budget import Option, share_out
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.weight import frame_specs
from framequant.spec import LinearSpec
from framequant.storage import layout

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
    result = []
    for rate in RATES:
        size = stored_bytes(weight.shape, replace(settings, allocation="uniform", bits=rate), name)
        result.append(Option(rate, settings.redundancy, size, sensitivity * gaussian_error(rate)))
    return result


def stored_bytes(shape: Sequence[int], config: FrameQuantConfig, name: str) -> int:
    """Bytes on disk of a linear under some settings."""
    out_features, in_features = shape
    frame_in, frame_out = frame_specs(config, in_features, out_features, name, name)
    spec = LinearSpec(in_features, out_features, frame_in, frame_out, config.code_spec())
    sizes = [torch.Size(size).numel() * dtype.itemsize for size, dtype in layout(spec).values()]
    return sum(sizes) + ENTRY_BYTES + len(name)


def _sensitivity(weight: Tensor, found: OutputGradients, settings: FrameQuantConfig, name: str) -> float:
    out_features, in_features = weight.shape
    frame_in, frame_out = frame_specs(settings, in_features, out_features, name, name)
    columns = _feedback_sum(found.hessian(), frame_in, settings.damping, settings.tile_cols, name)
    gram = found.gram()
    rows = float(gram.diagonal().sum())
    if settings.output_feedback:
        rows = _feedback_sum(gram, frame_out, settings.output_damping, settings.output_block, name)
    variance = float(weight.double().square().mean()) / (frame_in.num_coefficients / in_features)
    return 0.5 * variance * columns * rows


def _feedback_sum(matrix: Tensor, frame: FrameSpec, damping: float, block: int, name: str) -> float:
    """Σ of the traces of the diagonal blocks of the block LDL factorisation of T M Tᵀ."""
    operator = build_frame(frame)
    rotated = operator.analysis(operator.analysis(matrix).T)
    upper = feedback_factor(rotated, damping, name).upper
    total = 0.0
    for first in range(0, len(upper), block):
        part = upper[first : first + block, first : first + block]
        eye = torch.eye(len(part), dtype=part.dtype, device=part.device)
        total += float(torch.linalg.solve_triangular(part, eye, upper=True).square().sum())
    return total
