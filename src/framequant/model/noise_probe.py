"""What a linear's rounding costs the model, measured: noise of rounding's shape is added to its weight.

``allocation.sensitivity_of`` predicts it from second moments, to second order and as if tokens and features did not
depend on each other; for the first blocks of a model that is off by several times. Here the model itself says: the
divergence of its outputs is measured with noise in one linear at a time. Rounding with feedback leaves errors
``E = M_Gᵀ⁻¹ η M_H⁻¹``, η white with the code's error as variance and M the unit triangular factors of H and G
(``quantizers.two_sided``), so η is drawn at random and no search is needed.

Must not import layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from framequant.codes.trellis import gaussian_error
from framequant.config import FrameQuantConfig
from framequant.frames import FrameSpec, build_frame
from framequant.model import discovery
from framequant.model.calibration import as_samples, collate
from framequant.model.capture import token_mask
from framequant.model.gradients import OutputGradients
from framequant.model.replay import call_model
from framequant.model.tune_loss import distance, output_of, probe, samples_at_once, tensors_of
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.weight import frame_specs

#: Tokens, and samples other than token sequences, that a linear is judged on.
PROBE_TOKENS = {"cpu": 2048, "cuda": 12288}
PROBE_SAMPLES = 64


class NoiseProbe:
    """Measures what noise in one linear at a time does to a model's outputs.

    Args:
        model: the float model, in evaluation mode; it is left as it was.
        batches: the calibration batches, on its device; samples are taken evenly spaced.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model = model
        samples = as_samples(list(batches))
        self._kind, outputs = probe(model, samples[0], "auto")
        place = "cpu" if next(model.parameters()).device.type == "cpu" else "cuda"
        first = tensors_of(samples[0])[0]
        tokens = first.shape[1] if first.ndim == 2 and not first.is_floating_point() else 0
        wanted = min(len(samples), max(PROBE_TOKENS[place] // tokens, 1) if tokens else PROBE_SAMPLES)
        chosen = [samples[number * len(samples) // wanted] for number in range(wanted)]
        size = samples_at_once(samples[0], outputs, place, wanted)
        self._batches = [collate(chosen[start : start + size]) for start in range(0, wanted, size)]
        self._targets = [self._output(batch) for batch in self._batches]

    @torch.no_grad()
    def loss(self, weight: Tensor, noise: Float[Tensor, "o n"]) -> float:
        """Mean distance to the float model with ``noise`` added to a weight of it: nats, or relative squared error."""
        before = weight.detach().clone()
        weight.data.add_(noise.to(weight))
        try:
            found = [
                distance(self._output(batch), target, token_mask(batch), self._kind)
                for batch, target in zip(self._batches, self._targets, strict=True)
            ]
        finally:
            weight.data.copy_(before)
        return sum(float(total) for total, _ in found) / max(sum(count for _, count in found), 1)

    @torch.no_grad()
    def _output(self, batch: Any) -> Tensor:
        return output_of(call_model(self._model, batch), self._kind)


def measured_sensitivities(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    gradients: Mapping[str, OutputGradients],
    config: FrameQuantConfig,
) -> dict[str, float]:
    """Loss per unit of the code's relative error, as ``allocation.sensitivity_of`` predicts it, by linear.

    Args:
        model: the float model.
        batches: calibration batches.
        names: linears to quantize; those that no batch reached get none.
        gradients: with inputs, by name.
        config: its ``bits`` say how much noise is put in.

    Cost: a factorisation and a forward pass over ``PROBE_TOKENS`` a linear.
    """
    judge, error = NoiseProbe(model, batches), gaussian_error(min(max(config.bits, 1.0), 8.0))
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    found = {}
    for name in names:
        module, sums = model.get_submodule(name), gradients.get(name)
        if sums is None or sums.input_sum is None:
            continue
        settings = config.for_linear(name) or config
        weight = discovery.linear_weight(module)
        noise = rounding_noise(weight, sums, settings, name, generator) * math.sqrt(error)
        stored = module.weight
        loss = judge.loss(stored, noise if stored.shape == noise.shape else noise.T)
        found[name] = loss / error if math.isfinite(loss) else 0.0
    return found


def rounding_noise(
    weight: Float[Tensor, "o n"],
    sums: OutputGradients,
    config: FrameQuantConfig,
    name: str,
    generator: torch.Generator,
) -> Float[Tensor, "o n"]:
    """Noise of the shape that rounding leaves, for a code whose relative error is one; float32, on weight's device."""
    frame_in, frame_out = frame_specs(config, weight.shape[1], weight.shape[0], name, name)
    shape = frame_out.num_coefficients, frame_in.num_coefficients
    noise = torch.randn(shape, generator=generator).to(weight.device, torch.float64)
    noise *= weight.double().square().mean().sqrt() / math.sqrt(frame_in.redundancy)
    noise = noise @ _unit_inverse(sums.hessian(), frame_in, config.damping, name)
    if config.output_feedback and sums.gram_sum is not None:
        noise = _unit_inverse(sums.gram(), frame_out, config.output_damping, name).T @ noise
    rows = build_frame(frame_in).synthesis(noise)
    return build_frame(frame_out).synthesis(rows.T.contiguous()).T.float()


def _unit_inverse(matrix: Tensor, frame: FrameSpec, damping: float, name: str) -> Float[Tensor, "m m"]:
    """The inverse of the unit triangular factor through which errors are fed forward."""
    operator = build_frame(frame)
    upper = feedback_factor(operator.analysis(operator.analysis(matrix).T), damping, name).upper
    return upper / upper.diagonal()[:, None]
