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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from framequant.errors import DiscoveryError
from framequant.memory import free_bytes
from framequant.model.capture import token_mask
from framequant.model.discovery import linear_weight
from framequant.model.replay import call_model
from framequant.model.sampled_loss import sampled_loss
from framequant.quantizers.hessian import products_of_halves

#: Tokens, or samples other than token sequences, of one backward pass.
TOKENS_PER_PIECE = 4096
SAMPLES_PER_PIECE = 32
#: Tokens whose second moments are summed without leaving any out, on a CPU.
TOKENS_IN_FULL = 8192
NO_ROOM = (
    "the second moments of all output gradients do not fit into memory: their sizes alone share the bits out, and "
    "errors are not fed from row to row."
)


@dataclass
class OutputGradients:
    """Sums over tokens of one linear's output gradients.

    Attributes:
        gram_sum: Σ g gᵀ, (out_features, out_features), float32.
        input_sum: Σ x xᵀ of the linear's inputs, (in_features, in_features), float32; linears that read one
            tensor share it. None unless asked for.
        input_square: Σ ‖x‖² of the tokens in ``inputs``.
        squares: ‖g‖² of each real token, by number of the batch.
        count: number of tokens in ``gram_sum``.
        inputs: number of tokens in ``input_sum`` and ``input_square``.
    """

    gram_sum: Tensor | None = None
    input_sum: Tensor | None = None
    input_square: float = 0.0
    squares: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0
    inputs: int = 0

    @property
    def mean_square(self) -> float:
        """Mean of ‖g‖², the trace of G; 0 without gradients."""
        if not self.squares:
            return 0.0
        return float(torch.cat(list(self.squares.values())).double().mean())

    def gram(self, device: torch.device | None = None) -> Float[Tensor, "o o"]:
        """Mean of g gᵀ in float64, on a device; where the sum is if none is given."""
        assert self.gram_sum is not None
        return self.gram_sum.to(device or self.gram_sum.device).double() / max(self.count, 1)

    def hessian(self) -> Float[Tensor, "n n"]:
        """Mean of x xᵀ in float64."""
        assert self.input_sum is not None
        return self.input_sum.double() / max(self.inputs, 1)


def _gram(rows: Tensor, held: torch.dtype) -> Tensor:
    """Σ r rᵀ of values of ``held`` in float32, whatever autocast says; in float64 where float32 overflows."""
    exact = held == torch.bfloat16 and rows.device.type == "cpu"
    with torch.autocast(rows.device.type, enabled=False), products_of_halves() if exact else nullcontext():
        gram = rows.T @ rows
        return gram if bool(torch.isfinite(gram.diagonal()).all()) else rows.double().T @ rows.double()


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """A running sum, in place where the dtypes agree."""
    if total is None:
        return more
    return total.add_(more) if total.dtype == more.dtype else total.double() + more.double()


def _thinned(rows: Tensor, taken: int) -> Tensor:
    """The rows to sum: on a CPU, every eighth once ``TOKENS_IN_FULL`` were taken; a mean needs no more."""
    enough = rows.device.type == "cpu" and taken >= TOKENS_IN_FULL
    return rows[::8] if enough else rows


@dataclass
class GradientPass:
    """One pass in progress: the sums, and the mask of the batch that is running.

    Attributes:
        inputs: whether to sum what the linears read, too.
        grams: whether to sum whole matrices, or squared norms only.
        number: of the batch that is running.
        totals: the sums by linear.
        mask: the real tokens of what is running, or None.
        read: who read a tensor first, by the tensor's identity.
    """

    inputs: bool
    grams: bool = True
    number: int = 0
    totals: dict[str, OutputGradients] = field(default_factory=dict)
    mask: Tensor | None = None
    read: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor's real tokens as (tokens, features), float32."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).float()
        if self.mask is not None and self.mask.numel() == flat.shape[0]:
            flat = flat[self.mask.to(flat.device)]
        return flat

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a linear's output."""
        flat = self.flat(gradient)
        total = self.totals.setdefault(name, OutputGradients())
        squares = flat.square().sum(dim=1)
        before = total.squares.get(self.number)
        total.squares[self.number] = squares if before is None else torch.cat([before, squares])
        if not self.grams:
            return
        flat = _thinned(flat, total.count)
        total.count += flat.shape[0]
        total.gram_sum = _plus(total.gram_sum, _gram(flat, gradient.dtype))

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Add what a linear reads; the first reader of a tensor adds it for all."""
        first, _ = self.read.setdefault(id(tensor), (name, tensor))
        total = self.totals.setdefault(name, OutputGradients())
        if first != name:
            source = self.totals[first]
            total.input_sum, total.inputs, total.input_square = (
                source.input_sum,
                source.inputs,
                source.input_square,
            )
            return
        flat = _thinned(self.flat(tensor), total.inputs)
        total.inputs += flat.shape[0]
        total.input_square += float(flat.square().sum())
        if not self.grams:
            return
        total.input_sum = _plus(total.input_sum, _gram(flat, tensor.dtype))


def output_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    seed: int = 0,
    inputs: bool = False,
    grams: bool = True,
) -> dict[str, OutputGradients]:
    """Run the model forwards and backwards on every batch and sum the output gradients of its linears.

    Args:
        model: the float model, in evaluation mode.
        batches: calibration batches on the model's device.
        names: qualified names of the linears.
        seed: of the sampled labels.
        inputs: also sum x xᵀ of what the linears read.
        grams: sum whole matrices; without them only ‖g‖² and ‖x‖², for models whose matrices fit nowhere.

    Returns:
        Sums by name; linears that no batch reached are missing.

    Raises:
        DiscoveryError: the model's output depends on none of the linears.
    """
    state = GradientPass(inputs, grams)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with watched(model, names, state), torch.enable_grad(), fast_pass(model):
        for state.number, batch in (
            (i, piece) for i, whole in enumerate(batches) for piece in pieces_of(whole)
        ):
            state.mask = token_mask(batch)
            state.read.clear()
            loss = sampled_loss(model, call_model(model, batch), state.mask, generator)
            if not loss.requires_grad:
                raise DiscoveryError(
                    f"{type(model).__name__}: its output depends on none of the linears to quantize."
                )
            loss.backward()
    return state.totals


@contextmanager
def fast_pass(model: nn.Module) -> Iterator[None]:
    """Half precision on a GPU: sampled labels are far noisier than bfloat16, and it takes a third of the time."""
    place = next(model.parameters())
    half = place.device.type == "cuda" and place.dtype == torch.float32 and torch.cuda.is_bf16_supported()
    precise = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precise or half
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = precise


def pieces_of(batch: Any) -> list[Any]:
    """A batch cut into smaller ones: a backward pass keeps every activation, and logits are wide."""
    tensors = [
        value
        for value in (batch.values() if isinstance(batch, dict) else [batch])
        if isinstance(value, Tensor)
    ]
    if len(tensors) == 0 or not isinstance(batch, dict | Tensor):
        return [batch]
    count = len(tensors[0])
    tokens = (
        max(tensor.numel() // count for tensor in tensors if tensor.ndim == 2)
        if any(tensor.ndim == 2 for tensor in tensors)
        else TOKENS_PER_PIECE // SAMPLES_PER_PIECE
    )
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


def gradients_or_inputs(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    seed: int,
    inputs: bool,
) -> tuple[dict[str, OutputGradients], str]:
    """``output_gradients``, or the inputs alone where a backward pass is impossible.

    Returns:
        Sums by name, without gradients in the second case, and then a note that says why.
    """
    fits = gram_bytes(model, names, inputs) <= free_bytes(next(model.parameters()).device) // 2
    note = "" if fits else NO_ROOM
    try:
        return output_gradients(model, batches, names, seed, inputs, fits), note
    except (RuntimeError, DiscoveryError) as error:
        reason = str(error).splitlines()[0]
    state = GradientPass(inputs, fits)
    with watched(model, names, state, gradients=False), torch.no_grad():
        for batch in batches if inputs else []:
            state.mask = token_mask(batch)
            state.read.clear()
            call_model(model, batch)
    return state.totals, (
        "no backward pass through the float model, so errors are weighed layer by layer and not fed from row to "
        f"row: {reason}"
    )


def gram_bytes(model: nn.Module, names: Sequence[str], inputs: bool) -> int:
    """Bytes that the second moments of these linears take, those of shared inputs counted each time."""
    total = 0
    for name in names:
        out_features, in_features = linear_weight(model.get_submodule(name)).shape
        total += 4 * (out_features**2 + (in_features**2 if inputs else 0))
    return total


@contextmanager
def watched(
    model: nn.Module, names: Sequence[str], state: GradientPass, gradients: bool = True
) -> Iterator[None]:
    """Freeze the parameters and hook the linears; the first ones reached start the graph."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def after(_module: nn.Module, args: Any, output: Tensor, name: str) -> Tensor:
        if state.inputs:
            state.add_input(name, args[0])
        if not gradients:
            return output
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
