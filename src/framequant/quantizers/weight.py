"""The one place where the steps of a layer meet: from W and H to the stored integers.

For the linears of one group (they read the same tensor, hence share H, the input frame and its transform)::

    W* = target(W)                   targets.py
    D  = T_out W* T_inᵀ              frames
    H' = T_in H T_inᵀ
    grid, clip                       codes
    D̃  = LDLQ(D, H')                 group_rounding.py: rounding.py, two_sided.py, refine.py
    bytes                            codes.packing

Everything here is float64 and free of hooks, devices and modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.config import Denoise, FrameQuantConfig, Rounding
from framequant.errors import NumericalError
from framequant.frames import FrameKind, FrameOperator, FrameSpec, block_frame, build_frame, choose_frame
from framequant.frames.order import spread_order
from framequant.frames.signs import derive_seed
from framequant.quantizers.coders import make_coder
from framequant.quantizers.denoise import metric_gains, wiener_gains
from framequant.quantizers.group_rounding import ordered_factor, round_group
from framequant.quantizers.hessian import NOT_FINITE, FeedbackFactor, Moments, all_finite
from framequant.quantizers.rounding import proxy_loss
from framequant.quantizers.safety import shrink, shrinkage
from framequant.quantizers.sharing import Shares, even_counts, own_rows, targets_beside_factor
from framequant.quantizers.targets import corrected, correlation
from framequant.spec import LinearSpec
from framequant.storage import decode_rows

#: Sign seeds are stored as decimal numbers in JSON; 32 bits keep them short.
SEED_BITS = 32
#: Matrices of more rows are transformed by pieces of ``PIECE_ROWS``: transforms make several copies.
LARGE = 4096
ALL = slice(None)
PIECE_ROWS = 1024


@dataclass(frozen=True)
class LinearLoss:
    """What the rounding of one linear cost, on the calibration data.

    Attributes:
        proxy: tr(E H Eᵀ) of E = Ŵ - W*, the expected squared output error against the target.
        relative: ``proxy`` over tr(W H Wᵀ).
        target_change: ‖W* - W‖² / ‖W‖², how far the target moved from the weight.
        damping: fraction of the mean diagonal that the factorisation used; 0 for nearest rounding.
        escalations: how often that damping had to be raised.
        reference: tr(W H Wᵀ), the loss of zeros.
        gain: what the scales were multiplied by because rounding did more harm than zeros; see ``safety``.
    """

    proxy: float
    relative: float
    target_change: float
    damping: float
    escalations: int
    reference: float = 0.0
    gain: float = 1.0


@dataclass
class QuantizedWeight:
    """The stored form of one linear's weight, and what it cost."""

    spec: LinearSpec
    tensors: dict[str, Tensor]
    loss: LinearLoss


def frame_specs(
    config: FrameQuantConfig, in_features: int, out_features: int, group: str, name: str
) -> tuple[FrameSpec, FrameSpec]:
    """Choose the input and output frame of a linear.

    Args:
        config: settings of this linear.
        in_features: d_in.
        out_features: d_out.
        group: name of the group whose input the linear reads; its members share the input frame.
        name: of the linear; seeds its output frame.

    Raises:
        FrameError: no frame of the redundancy exists for a dimension.
    """
    if config.frame is FrameKind.IDENTITY:
        return FrameSpec(FrameKind.IDENTITY, in_features), FrameSpec(FrameKind.IDENTITY, out_features)
    mask = (1 << SEED_BITS) - 1
    seed_in = derive_seed(config.seed, group, "in") & mask
    seed_out = derive_seed(config.seed, name, "out") & mask
    frame_in = choose_frame(in_features, config.redundancy, seed_in)
    if config.output_hadamard_block is not None:
        return frame_in, block_frame(out_features, config.output_hadamard_block, seed_out)
    redundancy_out = config.redundancy if config.two_sided else 1.0
    return frame_in, choose_frame(out_features, redundancy_out, seed_out)


def quantize_group(
    weights: Mapping[str, Float[Tensor, "o n"]],
    moments: Moments,
    configs: Mapping[str, FrameQuantConfig],
    group: str,
    share: Shares | None = None,
    consume: bool = False,
) -> dict[str, QuantizedWeight]:
    """Quantize the linears that read one tensor.

    Args:
        weights: W of each linear, (out_features, in_features), by module name.
        moments: second moments of the shared input.
        configs: settings of each linear; linears with equal settings are rounded together.
        group: name of the group, for the seed of its input frame.
        share: processes that do this together, each some of the rows; for scalar codes without ``output_gram``.
        consume: let the sums of ``moments`` go as soon as they are used, where nobody else will ask for them.

    Returns:
        The stored form of each linear.

    Raises:
        NumericalError: NaN or infinity in a weight or in the activations; the linear is named.
        FrameError: no frame of the redundancy exists.
    """
    results: dict[str, QuantizedWeight] = {}
    clusters = _alike(configs)
    for names in clusters:
        members = {name: weights[name] for name in names}
        for name, weight in members.items():
            _require_finite(
                weight, f"{name}: its weight contains NaN or infinity; the model file is damaged."
            )
        results.update(
            _quantize_alike(
                members, moments, configs[names[0]], group, share, consume and names is clusters[-1]
            )
        )
    return {name: results[name] for name in weights}


def _alike(configs: Mapping[str, FrameQuantConfig]) -> list[list[str]]:
    """Names with equal settings, in order of first appearance."""
    clusters: list[tuple[FrameQuantConfig, list[str]]] = []
    for name, config in configs.items():
        for known, names in clusters:
            if known == config:
                names.append(name)
                break
        else:
            clusters.append((config, [name]))
    return [names for _, names in clusters]


@dataclass(frozen=True)
class _Group:
    """Linears with equal settings that read one tensor, and the frames of their coefficients."""

    weights: Mapping[str, Tensor]
    moments: Moments
    config: FrameQuantConfig
    specs: Mapping[str, LinearSpec]
    frame_in: FrameOperator
    frames_out: Mapping[str, FrameOperator]

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], moments: Moments, config: FrameQuantConfig, group: str
    ) -> _Group:
        """Choose the frames."""
        specs = {name: _spec(weight, config, group, name) for name, weight in weights.items()}
        frames_out = {name: build_frame(spec.frame_out) for name, spec in specs.items()}
        frame_in = build_frame(next(iter(specs.values())).frame_in)
        return cls(weights, moments, config, specs, frame_in, frames_out)

    @property
    def first(self) -> str:
        """Name of the first linear, for messages."""
        return next(iter(self.weights))

    @property
    def spread(self) -> Tensor | None:
        """The order in which columns are visited far apart."""
        return spread_order(self.specs[self.first].frame_in)

    def hessian(self) -> Tensor:
        """H, float64, made from its float32 sum whenever it is needed: that takes half the memory."""
        return self.moments.hessian().to(self.weights[self.first].device)

    def coefficient_hessian(self) -> Tensor:
        """H', float64, a new tensor."""
        return _rotated(self.moments, self.frame_in, self.weights[self.first].device)

    def factor(self) -> FeedbackFactor:
        """Of H', for rounding rows that do not interact."""
        return ordered_factor(self.coefficient_hessian, self.config, self.first, self.spread)

    def targets(self, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """The weight to round of each linear, float64; some of its rows where that is asked for."""
        exact = {name: weight[rows.get(name, ALL)].double() for name, weight in self.weights.items()}
        correlations = _correlations(exact, self.moments, self.config, rows)
        return corrected(exact, correlations, self.hessian)

    def coefficients(self, targets: Mapping[str, Tensor]) -> list[Tensor]:
        """D of each linear."""
        return [
            _coefficients(target, self.frame_in, self.frames_out[name]) for name, target in targets.items()
        ]

    def output_grams(self) -> list[Tensor | None]:
        """Second moments of the outputs' gradients in the output frames, where they are known."""
        found = self.moments.output_gram
        return [_rotated_gram(found.get(name), frame) for name, frame in self.frames_out.items()]


def _quantize_alike(
    weights: Mapping[str, Tensor],
    moments: Moments,
    config: FrameQuantConfig,
    group: str,
    share: Shares | None,
    consume: bool,
) -> dict[str, QuantizedWeight]:
    one = _Group.of(weights, moments, config, group)
    if moments.hessian_sum is not None:
        _require_finite(moments.hessian_sum, f"{one.first}: {NOT_FINITE}")
    ready: list[FeedbackFactor] = []  # rounding takes it out: it is the size of H'
    if share is None or config.rounding is Rounding.NEAREST:
        targets = one.targets({})
    else:
        targets, factor = targets_beside_factor(weights, one.targets, one.factor, share)
        ready.append(factor)
        del factor
    if consume:
        moments.drift_sum = None
    for name, target in targets.items():
        _require_finite(target, f"{name}: {NOT_FINITE}")
    matrices = one.coefficients(targets)
    coder = make_coder(matrices, one.specs[one.first].code)
    exact = matrices if config.denoise is not Denoise.NONE else []  # else rounding may let them go
    rounded, used = round_group(
        matrices,
        one.coefficient_hessian,
        one.output_grams(),
        coder,
        config,
        one.first,
        share=share,
        consume=not exact,
        spread=one.spread,
        factor=ready.pop if ready else None,
    )
    return _stored(one, targets, exact, rounded, coder.tensors(), used, share, consume)


def _stored(
    one: _Group,
    targets: Mapping[str, Tensor],
    exact: list[Tensor],
    rounded: Tensor,
    stored: Sequence[dict[str, Tensor]],
    used: FeedbackFactor | None,
    share: Shares | None,
    consume: bool,
) -> dict[str, QuantizedWeight]:
    """What is stored of each linear, and what its rounding cost; ``exact`` is D of each where it is denoised."""
    metric = one.coefficient_hessian() if one.config.denoise is Denoise.GAIN else None
    hessian = one.hessian()
    if consume:
        one.moments.hessian_sum = None
    results = {}
    pieces = rounded.split([spec.coefficient_shape[0] for spec in one.specs.values()])
    for number, (name, piece, tensors) in enumerate(zip(one.weights, pieces, stored, strict=True)):
        if exact:
            piece, tensors = _denoised(exact[number], piece, tensors, metric, one.specs[name])
        frames = one.frame_in, one.frames_out[name]
        restored = _reconstruct(piece, *frames)
        weight, target = one.weights[name].double(), targets[name]
        loss = _loss(weight, target, restored, hessian, used, share)
        results[name] = QuantizedWeight(one.specs[name], tensors, loss)
        _shrink_if_harmful(results[name], weight, target, restored, hessian, used, *frames)
    return results


def _shrink_if_harmful(
    result: QuantizedWeight,
    weight: Tensor,
    target: Tensor,
    restored: Tensor,
    hessian: Tensor,
    factor: FeedbackFactor | None,
    frame_in: FrameOperator,
    frame_out: FrameOperator,
) -> None:
    """Shrink the scales where rounding did more harm than zeros would; see ``safety``."""
    damping = None if factor is None else factor.damping
    gain = shrinkage(target, restored, hessian, result.loss.proxy, result.loss.reference, damping)
    if gain == 1.0:
        return
    result.tensors = shrink(result.tensors, gain)
    rows = result.spec.coefficient_shape[0]
    coefficients = decode_rows(result.spec, result.tensors, 0, rows, torch.float64)
    loss = _loss(weight, target, _reconstruct(coefficients, frame_in, frame_out), hessian, factor)
    result.loss = replace(loss, gain=gain)


def _beside(tensor: Tensor | None, other: Tensor) -> Tensor | None:
    """A tensor, if there is one, on the device of another."""
    return None if tensor is None else tensor.to(other.device)


def _denoised(
    exact: Tensor,
    rounded: Tensor,
    tensors: dict[str, Tensor],
    metric: Tensor | None,
    spec: LinearSpec,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows of D̃ with their gains, as stored, and the tensors that say so."""
    gains = wiener_gains(exact, rounded) if metric is None else metric_gains(exact, rounded, metric)
    scales = tensors["scales"]
    changed = {**tensors, "scales": (scales.double() * gains.to(scales.device)[:, None]).to(scales.dtype)}
    return decode_rows(spec, changed, 0, len(exact), torch.float64), changed


def _correlations(
    weights: Mapping[str, Tensor], moments: Moments, config: FrameQuantConfig, rows: Mapping[str, slice]
) -> dict[str, Tensor | None]:
    drift = moments.drift() if config.float_targets else None
    return {
        name: correlation(
            weight,
            _beside(drift, weight),
            _beside(moments.residual(name, rows.get(name, ALL)), weight),
            config.float_targets,
            config.residual_targets,
        )
        for name, weight in weights.items()
    }


def _spec(weight: Tensor, config: FrameQuantConfig, group: str, name: str) -> LinearSpec:
    out_features, in_features = weight.shape
    frame_in, frame_out = frame_specs(config, in_features, out_features, group, name)
    return LinearSpec(in_features, out_features, frame_in, frame_out, config.code_spec())


def _coefficients(target: Tensor, frame_in: FrameOperator, frame_out: FrameOperator) -> Tensor:
    """D = T_out W* T_inᵀ; a large one by pieces of rows, and then of columns, since the transforms make copies."""
    if len(target) <= LARGE:
        return frame_out.analysis(frame_in.analysis(target).T).T
    size = frame_in.num_coefficients
    half = target.new_empty(len(target), size)
    for first in range(0, len(target), PIECE_ROWS):
        half[first : first + PIECE_ROWS] = frame_in.analysis(target[first : first + PIECE_ROWS])
    whole = (
        half if frame_out.num_coefficients == len(half) else half.new_empty(frame_out.num_coefficients, size)
    )
    for first in range(0, size, PIECE_ROWS):
        columns = slice(first, first + PIECE_ROWS)
        whole[:, columns] = frame_out.analysis(half[:, columns].T).T
    return whole


def _rotated(moments: Moments, frame: FrameOperator, device: torch.device) -> Tensor:
    """T H Tᵀ, float64; a large one by pieces, since the transforms make copies."""
    dim, size = moments.features, frame.num_coefficients
    if dim <= LARGE:
        return frame.analysis(frame.analysis(moments.hessian().to(device)).T).clone()
    # Rows and then columns are transformed where they lie: nothing of its size is made but the result.
    whole = torch.empty(size, size, dtype=torch.float64, device=device)
    moments.write_hessian(whole[:dim, :dim])
    for first in range(0, dim, PIECE_ROWS):
        rows = whole[first : min(first + PIECE_ROWS, dim)]
        rows.copy_(frame.analysis(rows[:, :dim]))
    for first in range(0, size, PIECE_ROWS):
        columns = whole[:, first : first + PIECE_ROWS]
        columns.copy_(frame.analysis(columns[:dim].T).T)
    return whole.T


def _rotated_gram(gram: Tensor | None, frame: FrameOperator) -> Tensor | None:
    """T_out G T_outᵀ, float64."""
    return None if gram is None else frame.analysis(frame.analysis(gram.double()).T)


def _reconstruct(coefficients: Tensor, frame_in: FrameOperator, frame_out: FrameOperator) -> Tensor:
    """Ŵ = T_outᵀ D̃ T_in."""
    return frame_out.synthesis(frame_in.synthesis(coefficients).T).T


def _loss(
    weight: Tensor,
    target: Tensor,
    restored: Tensor,
    hessian: Tensor,
    factor: FeedbackFactor | None,
    share: Shares | None = None,
) -> LinearLoss:
    """What rounding cost; with a share, each process sums over rows of its own."""
    if share is not None:
        own = own_rows(even_counts(len(weight), share.size), share.rank)
        weight, target, restored = weight[own], target[own], restored[own]
    sums = (
        proxy_loss(restored - target, hessian),
        proxy_loss(weight, hessian),
        float((target - weight).square().sum()),
        float(weight.square().sum()),
    )
    proxy, reference, moved, size = sums if share is None else share.sum(*sums)
    return LinearLoss(
        proxy=proxy,
        relative=proxy / reference if reference > 0 else 0.0,
        target_change=moved / max(size, 1e-300),
        damping=factor.damping if factor else 0.0,
        escalations=factor.escalations if factor else 0,
        reference=reference,
    )


def _require_finite(tensor: Tensor, message: str) -> None:
    if not all_finite(tensor):
        raise NumericalError(message)
