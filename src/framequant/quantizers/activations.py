"""Give a quantized linear its activation grid: steps are fitted on what the linear reads, in the space it rounds in.

Must not import layers or models.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from framequant.codes.activation import ActivationSpace, ActivationSpec, fit_steps
from framequant.errors import CalibrationError
from framequant.frames import build_frame
from framequant.quantizers.weight import QuantizedWeight

#: Tokens of the calibration data that a step is fitted on, at most.
SAMPLE_TOKENS = 2048


def with_activation(
    result: QuantizedWeight,
    activation: ActivationSpec | None,
    sample: Float[Tensor, "tokens n"] | None,
    name: str,
) -> QuantizedWeight:
    """The same codes with an activation grid.

    Args:
        result: the quantized linear.
        activation: the grid; None leaves the linear as it is.
        sample: inputs of the linear; not needed where steps follow from the token.
        name: of the linear, for messages.

    Raises:
        CalibrationError: the grid needs a sample and there is none.
    """
    if activation is None:
        return result
    spec = replace(result.spec, activation=activation)
    if not activation.stored_steps:
        return replace(result, spec=spec)
    if sample is None or not len(sample):
        raise CalibrationError(
            f"{name}: activation_scaling = '{activation.scaling}' fits its step on calibration data, and this linear "
            "read none; use activation_scaling = 'token'."
        )
    values = sample.float()
    if activation.space is ActivationSpace.FRAME:
        values = build_frame(result.spec.frame_in).analysis(values)
    tensors = {**result.tensors, "activation_steps": fit_steps(values, activation)}
    return replace(result, spec=spec, tensors=tensors)


def thinned(inputs: Float[Tensor, "tokens n"], share: int) -> Float[Tensor, "kept n"]:
    """About ``share`` tokens of a batch, evenly spaced; a copy."""
    stride = max(1, len(inputs) // max(share, 1))
    return inputs[::stride][:share].detach().clone()
