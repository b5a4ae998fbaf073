"""How the loss of the float model depends on the outputs of its linears: gradients of a sampled loss.

For a model with logits the loss is the negative log-likelihood of labels drawn from the model's own
distribution, whose gradients have the Fisher information as covariance: an error δ of a linear's output costs
about ``½ δᵀ G δ`` nats of KL divergence, ``G = E[g gᵀ]`` over tokens. A model without logits (an encoder) gets a
random Gaussian cotangent on its output, for which G measures the squared change of the output instead.

Only activations carry gradients; the weights stay frozen, so the pass costs about two forward passes more.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from framequant.errors import DiscoveryError
from framequant.model.capture import token_mask
from framequant.model.replay import call_model, first_tensor


#: Tokens, or samples other than token sequences, of one backward pass.
TOKENS_PER_PIECE = 4096
SAMPLES_PER_PIECE = 32


@dataclass
class OutputGradients:
    """Sums over tokens of one linear's output gradients.

    Attributes:
        gram_sum: Σ g gᵀ, (out_features, out_features), float32.
        input_sum: Σ x xᵀ of the linear's inputs, (in_features, in_features), float32; linears that read one
            tensor share it. None unless asked for.
        squares: ‖g‖² of each real token, by number of the batch.
        count: number of tokens.
    """

    gram_sum: Tensor | None = None
    input_sum: Tensor | None = None
    squares: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0

    def gram(self) -> Float[Tensor, "o o"]:
        """Mean of g gᵀ in float64."""
        assert self.gram_sum is not None
        return self.gram_sum.double() / max(self.count, 1)

    def hessian(self) -> Float[Tensor, "n n"]:
        """Mean of x xᵀ in float64."""
        assert self.input_sum is not None
        return self.input_sum.double() / max(self.count, 1)


@dataclass
class _Pass:
    """One pass in progress: the sums, and the mask of the batch that is running."""

    inputs: bool
    number: int = 0
    totals: dict[str, OutputGradients] = field(default_factory=dict)
    mask: Tensor | None = None
    read: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def flat(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).float()
        if self.mask is not None and self.mask.numel() == flat.shape[0]:
            flat = flat[self.mask.to(flat.device)]
        return flat

    def add(self, name: str, gradient: Tensor) -> None:
        flat = self.flat(gradient)
        total = self.totals.setdefault(name, OutputGradients())
        total.count += flat.shape[0]
        squares = flat.square().sum(dim=1)
        before = total.squares.get(self.number)
        total.squares[self.number] = squares if before is None else torch.cat([before, squares])
        gram = flat.T @ flat
        total.gram_sum = gram if total.gram_sum is None else total.gram_sum.add_(gram)

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Add what a linear reads; the first reader of a tensor adds it for all."""
        first, _ = self.read.setdefault(id(tensor), (name, tensor))
        total = self.totals.setdefault(name, OutputGradients())
        if first != name:
            total.input_sum = self.totals[first].input_sum
            return
        flat = self.flat(tensor)
        gram = flat.T @ flat
        total.input_sum = gram if total.input_sum is None else total.input_sum.add_(gram)


def output_gradients(
    model: nn.Module, batches: Sequence[Any], names: Sequence[str], seed: int = 0, inputs: bool = False
) -> dict[str, OutputGradients]:
    """Run the model forwards and backwards on every batch and sum the output gradients of its linears.

    Args:
        model: the float model, in evaluation mode.
        batches: calibration batches on the model's device.
        names: qualified names of the linears.
        seed: of the sampled labels.
        inputs: also sum x xᵀ of what the linears read.

    Returns:
        Sums by name; linears that no batch reached are missing.

    Raises:
        DiscoveryError: the model's output depends on none of the linears.
    """
    state = _Pass(inputs)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with _watched(model, names, state), torch.enable_grad():
        for state.number, batch in ((i, piece) for i, whole in enumerate(batches) for piece in _pieces(whole)):
            state.mask = token_mask(batch)
            state.read.clear()
            loss = sampled_loss(model, call_model(model, batch), state.mask, generator)
            if not loss.requires_grad:
                raise DiscoveryError(
                    f"{type(model).__name__}: its output depends on none of the linears to quantize."
                )
            loss.backward()
    return state.totals


def _pieces(batch: Any) -> list[Any]:
    """A batch cut into smaller ones: a backward pass keeps every activation, and logits are wide."""
    tensors = [value for value in (batch.values() if isinstance(batch, dict) else [batch]) if isinstance(value, Tensor)]
    if len(tensors) == 0 or not isinstance(batch, dict | Tensor):
        return [batch]
    count = len(tensors[0])
    tokens = max(tensor.numel() // count for tensor in tensors if tensor.ndim == 2) if any(
        tensor.ndim == 2 for tensor in tensors
    ) else TOKENS_PER_PIECE // SAMPLES_PER_PIECE
    size = max(TOKENS_PER_PIECE // max(tokens, 1), 1)
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    return [
        {
            key: value[first : first + size] if isinstance(value, Tensor) and len(value) == count else value
            for key, value in batch.items()
        }
        for first in range(0, count, size)
    ]


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], state: _Pass) -> Iterator[None]:
    """Freeze the parameters and hook the linears; the first ones reached start the graph."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def after(_module: nn.Module, args: Any, output: Tensor, name: str) -> Tensor:
        if state.inputs:
            state.add_input(name, args[0])
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        output.register_hook(lambda gradient: state.add(name, gradient))
        return output

    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: after(m, a, out, name))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def sampled_loss(
    model: nn.Module, output: Any, mask: Tensor | None, generator: torch.Generator
) -> Float[Tensor, ""]:
    """A scalar whose gradients have the Fisher information as covariance; see the module's text."""
    logits = _logits(model, output)
    if logits is not None:
        flat = logits.reshape(-1, logits.shape[-1])
        if mask is not None and mask.numel() == flat.shape[0]:
            flat = flat[mask.to(flat.device)]
        return sum(
            (_label_loss(rows, generator) for rows in flat.split(4096)), start=flat.new_zeros(()).float()
        )
    hidden = first_tensor(list(output.values()) if hasattr(output, "values") else [output])
    cotangent = torch.randn(hidden.shape, generator=generator).to(hidden)
    return (hidden * cotangent).float().sum()


def _label_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    scores = functional.log_softmax(logits.float(), dim=-1)
    with torch.no_grad():
        draws = torch.rand(len(scores), 1, generator=generator).to(scores.device)
        totals = scores.exp().cumsum(dim=-1)
        labels = (totals < draws * totals[:, -1:]).sum(dim=-1).clamp(max=scores.shape[-1] - 1)
    return -scores.gather(1, labels[:, None]).sum()


def _logits(model: nn.Module, output: Any) -> Tensor | None:
    """The logits of an output, or None for a model that ends in features."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor) and getattr(model, "num_classes", 0):
        return output
    return None
