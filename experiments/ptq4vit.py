"""PTQ4ViT (Yuan, Xue, Chen, Wu, Sun 2022, arXiv 2111.12293): steps by a Hessian-guided search, twin steps after GELU.

Weights and activations of a linear are rounded to nearest on uniform grids; all the method does is to choose their
steps. A step is tried at ``SEARCH`` fractions of what reaches the largest entry, up to 1.2 times it, and the one is
kept whose outputs lose least where the loss feels it: with outputs O = A Bᵀ of the float model and gradients g there::

    min over Δ of  E[ (Ô − O)ᵀ diag(g²) (Ô − O) ]

The step of A is searched with B rounded and the other way about, in turn. Query, key and value have weight steps of
their own. After GELU the negative half has a step that just reaches its end, and the positive one is a power of two
times as wide. The labels of the loss are drawn from the float model, since calibration data have none. Attention
products, which are no linear's, stay float here; the paper rounds them too.

Inputs and gradients are those of the float model, on a sample of tokens. Everything above ``Samples`` is a
function of tensors.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import framequant as fq
from framequant import storage
from framequant.codes.activation import ActivationScaling, ActivationSpace, ActivationSpec, round_activations
from framequant.codes.grid import Grid, GridKind, GridSpec, ZeroPoint, encode, levels
from framequant.codes.packing import pack_codes
from framequant.frames import FrameKind, FrameSpec
from framequant.layers import FrameLinear
from framequant.model.calibration import to_device
from framequant.model.discovery import find_blocks, linear_weight, select_linears
from framequant.model.gradients import GradientPass, pieces_of, watched
from framequant.model.replay import call_model
from framequant.model.sampled_loss import sampled_loss
from framequant.spec import LinearSpec

#: The paper's search: a hundred candidates from 0 to 1.2 times the reach, three rounds.
SEARCH = 100
WIDEST = 1.2
ROUNDS = 3
#: Linears that read what GELU returns, and linears of query, key and value in one.
AFTER_GELU = r"mlp\.fc2|(?<!attention\.)output\.dense|fc2"
FUSED_QKV = r"qkv$"


@dataclass(frozen=True)
class Settings:
    """What is searched, and how thoroughly.

    Attributes:
        bits: of a weight.
        activation_bits: of an activation; None for float ones.
        twin: two steps after GELU; otherwise one everywhere.
        hessian: weigh output errors with squared gradients; otherwise all alike.
        tokens: of the calibration data.
        search: candidates for a step.
        rounds: of searching for both steps in turn.
    """

    bits: int
    activation_bits: int | None = None
    twin: bool = True
    hessian: bool = True
    tokens: int = 1024
    search: int = SEARCH
    rounds: int = ROUNDS

    def activation(self, name: str) -> ActivationSpec | None:
        """The activation grid of a linear."""
        if self.activation_bits is None:
            return None
        twin = self.twin and re.search(AFTER_GELU, name)
        scaling = ActivationScaling.TWIN if twin else ActivationScaling.STATIC
        return ActivationSpec(self.activation_bits, scaling, ActivationSpace.INPUT)


# --- The search, on tensors ---------------------------------------------------------------------------------


def round_weight(
    weight: Float[Tensor, "o n"], steps: Float[Tensor, " parts"], bits: int
) -> Float[Tensor, "o n"]:
    """Nearest multiples of a step from −2^(bits−1) to 2^(bits−1) − 1 times it; each part of the rows has its own."""
    step = steps.repeat_interleave(len(weight) // len(steps))[:, None]
    half = 2 ** (bits - 1)
    return (weight / step).round().clamp(-half, half - 1) * step


def output_errors(
    inputs: Float[Tensor, "t n"],
    weight: Float[Tensor, "o n"],
    outputs: Float[Tensor, "t o"],
    importance: Float[Tensor, "t o"],
) -> Float[Tensor, " o"]:
    """Σ over tokens of ``importance · (inputs weightᵀ − outputs)²``, of each output."""
    return ((inputs @ weight.T - outputs).square_().mul_(importance)).sum(0)


def candidates(reach: Tensor, integers: int, count: int) -> Float[Tensor, " count"]:
    """Steps with which so many integers reach up to 1.2 times the largest entry, rising from nothing."""
    fractions = torch.linspace(0, WIDEST, count + 1, dtype=reach.dtype, device=reach.device)[1:]
    return (fractions * reach.clamp(min=1e-12) / integers).bfloat16().to(reach.dtype)


def search_weight(
    weight: Float[Tensor, "o n"],
    inputs: Float[Tensor, "t n"],
    outputs: Float[Tensor, "t o"],
    importance: Float[Tensor, "t o"],
    parts: int,
    settings: Settings,
) -> Float[Tensor, " parts"]:
    """The step of each part of a weight whose outputs lose least.

    Args:
        weight: W of the float model.
        inputs: as they will be read: rounded if activations are.
        outputs: of the float model.
        importance: squared gradients, or ones.
        parts: equal parts of the rows with a step each.
        settings: bits and number of candidates.
    """
    pieces = weight.unflatten(0, (parts, -1))
    tried = torch.stack(
        [candidates(p.abs().max(), 2 ** (settings.bits - 1), settings.search) for p in pieces], 1
    )
    errors = [
        output_errors(inputs, round_weight(weight, steps, settings.bits), outputs, importance)
        .unflatten(0, (parts, -1))
        .sum(1)
        for steps in tried
    ]
    return tried.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def activation_candidates(
    inputs: Float[Tensor, "t n"], spec: ActivationSpec, count: int
) -> list[Float[Tensor, " steps"]]:
    """Steps to try: one, or one of negative entries that reaches their end and powers of two times it."""
    if spec.scaling is ActivationScaling.STATIC:
        return [step.reshape(1) for step in candidates(inputs.abs().max(), spec.largest, count)]
    step = (-inputs.min()).clamp(min=1e-6) / spec.largest
    return [torch.stack([step, step * 2**power]) for power in range(spec.bits + 4)]


def search_activation(
    inputs: Float[Tensor, "t n"],
    weight: Float[Tensor, "o n"],
    outputs: Float[Tensor, "t o"],
    importance: Float[Tensor, "t o"],
    spec: ActivationSpec,
    count: int,
) -> Float[Tensor, " steps"]:
    """The activation step or steps whose outputs lose least, with the weight as it will be."""
    tried = activation_candidates(inputs, spec, count)
    errors = [
        output_errors(round_activations(inputs, spec, steps.float()), weight, outputs, importance).sum()
        for steps in tried
    ]
    return tried[int(torch.stack(errors).argmin())]


def search(
    weight: Float[Tensor, "o n"],
    inputs: Float[Tensor, "t n"],
    importance: Float[Tensor, "t o"],
    parts: int,
    spec: ActivationSpec | None,
    settings: Settings,
) -> tuple[Float[Tensor, " parts"], Float[Tensor, " steps"] | None]:
    """Steps of a linear's weight and of its inputs, searched in turn.

    Returns:
        Weight steps, which bfloat16 holds, and activation steps; None for float activations.
    """
    outputs = inputs @ weight.T
    half = 2 ** (settings.bits - 1)
    steps = torch.stack([part.abs().max() for part in weight.unflatten(0, (parts, -1))]) / half
    if spec is None:
        return search_weight(weight, inputs, outputs, importance, parts, settings), None
    activation = torch.ones(spec.stored_steps)
    for _ in range(settings.rounds):
        rounded = round_weight(weight, steps, settings.bits)
        activation = search_activation(inputs, rounded, outputs, importance, spec, settings.search)
        read = round_activations(inputs, spec, activation.float())
        steps = search_weight(weight, read, outputs, importance, parts, settings)
    return steps, activation


# --- The model ----------------------------------------------------------------------------------------------


@dataclass
class Samples(GradientPass):
    """Inputs and squared output gradients of every linear on evenly spaced tokens, instead of sums over all.

    Attributes:
        share: tokens to keep of each piece of a batch.
        rows: of inputs, by linear.
        squares: of gradients, by linear.
    """

    share: int = 1024
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    squares: dict[str, list[Tensor]] = field(default_factory=dict)

    def _thin(self, tensor: Tensor) -> Tensor:
        flat = self.flat(tensor)
        return flat[:: max(len(flat) // self.share, 1)][: self.share].clone()

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Keep what a linear reads."""
        self.rows.setdefault(name, []).append(self._thin(tensor))

    def add(self, name: str, gradient: Tensor) -> None:
        """Keep the gradient of a linear's output."""
        self.squares.setdefault(name, []).append(self._thin(gradient).square_())


def observe(
    model: nn.Module, data: Sequence[Any], names: Sequence[str], tokens: int, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the float model forwards and backwards.

    Args:
        model: in evaluation mode.
        data: batches of calibration data on its device.
        names: of the linears.
        tokens: to keep in all, about.
        seed: of the labels that are drawn from the model.

    Returns:
        Of each linear that was reached its inputs (t, n) and its squared output gradients (t, o), float32.
    """
    pieces = [piece for batch in data for piece in pieces_of(batch)]
    state = Samples(inputs=True, grams=False, share=max(tokens // max(len(pieces), 1), 1))
    generator = torch.Generator().manual_seed(seed)
    with watched(model, names, state), torch.enable_grad():
        for piece in pieces:
            sampled_loss(model, call_model(model, piece), None, generator).backward()
    return {
        name: (torch.cat(state.rows[name]), torch.cat(state.squares[name]))
        for name in names
        if name in state.squares
    }


def stored(
    weight: Float[Tensor, "o n"],
    steps: Float[Tensor, " parts"],
    bits: int,
    activation: ActivationSpec | None,
    activation_steps: Tensor | None,
) -> tuple[LinearSpec, dict[str, Tensor]]:
    """The linear as a checkpoint holds it: a step for the whole weight, or one per row if its parts have their own."""
    out_features, in_features = weight.shape
    whole = len(steps) == 1
    grid_spec = GridSpec(GridKind.SEARCH, 2**bits, ZeroPoint.INTEGER, per_tensor=whole)
    scales = (steps if whole else steps.repeat_interleave(out_features // len(steps))).float().reshape(-1, 1)
    grid = Grid(grid_spec, levels(grid_spec).to(scales), scales, torch.full_like(scales, 2.0 ** (bits - 1)))
    frames = (FrameSpec(FrameKind.IDENTITY, size) for size in (in_features, out_features))
    zero_points = grid.stored_zero_points()
    assert zero_points is not None
    tensors = {
        "packed_codes": pack_codes(encode(weight.float(), grid), grid_spec.num_levels),
        "scales": grid.stored_scales(),
        "zero_points": zero_points,
    }
    if activation_steps is not None:
        tensors["activation_steps"] = activation_steps.float()
    return LinearSpec(in_features, out_features, *frames, grid_spec, activation), tensors


def quantize_(model: nn.Module, data: Any, settings: Settings, seed: int = 0) -> float:
    """Replace every linear inside the blocks of a vision model.

    Args:
        model: in evaluation mode; changed in place.
        data: images (samples, 3, height, width), or a list of batches, on any device.
        settings: of the search.
        seed: of the labels that are drawn from the model.

    Returns:
        Measured bits per weight.

    Raises:
        CalibrationError: the calibration data reach none of a linear's inputs.
    """
    first = next(model.parameters())
    batches = [
        to_device(batch, first.device, first.dtype)
        for batch in ([data] if isinstance(data, Tensor) else data)
    ]
    blocks = [name for chain in find_blocks(model).values() for name in chain]
    names = select_linears(model, blocks, fq.preset("rtn"))
    seen = observe(model, batches, names, settings.tokens, seed)
    size = weights = 0
    for name in names:
        if name not in seen:
            raise fq.CalibrationError(f"{name}: the calibration data never reach it.")
        module = model.get_submodule(name)
        weight = linear_weight(module).float()
        inputs, importance = seen.pop(name)
        if not settings.hessian:
            importance = torch.ones_like(importance)
        parts = 3 if re.search(FUSED_QKV, name) else 1
        activation = settings.activation(name)
        found = search(weight, inputs, importance, parts, activation, settings)
        spec, tensors = stored(weight, found[0], settings.bits, activation, found[1])
        model.set_submodule(name, FrameLinear.from_tensors(spec, tensors, module.bias))
        size += sum(storage.num_bytes(tensors).values())
        weights += spec.num_weights
    return 8 * size / weights


def row(bench: Any, settings: Settings) -> dict[str, Any]:
    """Quantize a copy of a bench's model with the paper's 32 images, and evaluate it."""
    model = copy.deepcopy(bench.model)
    data = bench.data()[:32]
    start = time.perf_counter()
    bits = quantize_(model, data, settings, bench.seed)
    spent = round(time.perf_counter() - start, 1)
    return {
        "bits_per_weight": round(bits, 4),
        "redundancy": 1.0,
        "quantize_seconds": spent,
        **bench.evaluate(model),
    }
