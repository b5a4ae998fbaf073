"""Trellis encoding: the least-squares path through a bit-shift trellis, with free ends or closed to a ring.

``search`` is one Viterbi pass with a choice of backend, given as an argument: ``"torch"`` (the oracle, any
device), ``"cpu"`` (numba, compiled on first use and cached on disk), ``"triton"`` (one program per sequence
on a GPU). ``encode_tiles`` closes each tile to a ring: a free pass over a window around the seam proposes the
bits that both ends share, then one pass with these bits fixed codes the tile. Importing this module loads
neither numba nor triton.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from framequant.codes.trellis import TrellisSpec
from framequant.codes.trellis_codebook import Codebook
from framequant.errors import ConfigError, NumericalError, nearest
from framequant.kernels import viterbi_reference

BACKENDS = ("auto", "torch", "cpu", "triton")
SEAM_CONTEXT = (
    16  # the pass that proposes the shared bits sees this many times L bits on each side of the seam
)


def choose_backend(backend: str, device: torch.device) -> str:
    """Turn ``"auto"`` into a backend for ``device``; without numba or triton fall back to torch and warn.

    Raises:
        ConfigError: for an unknown name, or one that cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown Viterbi backend {backend!r}.{nearest(backend, BACKENDS)}")
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
        missing = {"cpu": "numba", "triton": "triton"}.get(backend)
        if missing and importlib.util.find_spec(missing) is None:
            warnings.warn(
                f"{missing} is not installed: trellis encoding falls back to plain torch, many times slower",
                stacklevel=3,
            )
            backend = "torch"
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"the Viterbi backend 'cpu' needs tensors on the CPU, not on {device}")
    return backend


def search(
    values: Float[Tensor, "batch weights"],
    codebook: Float[Tensor, "states ..."],
    rates: tuple[int, ...],
    *,
    overlap: Int[Tensor, " batch"] | None = None,
    weights: Float[Tensor, "batch weights"] | None = None,
    backend: str = "auto",
) -> Int[Tensor, "batch steps"]:
    """Find the states ``s_t`` that minimise ``sum_t w_t (x_t - codebook[s_t])**2``.

    ``s_t = ((s_{t-1} << k_t) | b_t) mod 2**L``, with ``k_t = rates[t % len(rates)]`` and
    ``L = log2(len(codebook))``. Where a state has two values, step t has elements 2t and 2t + 1.

    Args:
        values: float32; the number of steps is a multiple of ``len(rates)``.
        codebook: values of each state, (states,) or (states, 1 or 2), float32, or float16 where that is exact, on the
            same device.
        rates: new bits of each step, 1..8 and at most L.
        overlap: the ``L - k_0`` bits of ``s_0`` above its new ones, which also end ``s_{T-1}``, so the path
            is a ring. Without it both ends are free.
        weights: importance of each element, positive; ones if absent.
        backend: ``"auto"``, ``"torch"``, ``"cpu"`` or ``"triton"``.

    Returns:
        int32 states. Backends may differ where costs tie within float32.

    Raises:
        ConfigError: for an unknown backend or shapes that do not fit.

    Cost: ``2**L`` branches a step; scratch of at most ``T * 2**(L - min k)`` bytes a sequence.
    """
    state_bits, codebook = len(codebook).bit_length() - 1, codebook.reshape(len(codebook), -1)
    each = codebook.shape[1]
    if (
        len(codebook) != 1 << state_bits
        or each > 2
        or values.shape[1] % (len(rates) * each)
        or not all(1 <= k <= min(8, state_bits) for k in rates)
    ):
        raise ConfigError(
            f"{len(codebook)} states of {each} values, {values.shape[1]} values and rates {rates} do not make a "
            "trellis: states a power of two, steps a multiple of the period, rates 1 to 8, one or two values"
        )
    backend = choose_backend(backend, values.device)
    values = values.to(torch.float32)
    weights = torch.ones_like(values) if weights is None else weights.to(torch.float32)
    if overlap is None:
        overlap = torch.full((len(values),), -1, device=values.device)
    overlap = overlap.to(torch.int64)
    if backend == "triton":
        from framequant.kernels import viterbi_triton

        if viterbi_triton.supports(state_bits, rates):
            return viterbi_triton.search(values, weights, codebook, rates, overlap, state_bits)
        backend = "torch"
    if backend == "cpu":
        return _search_cpu(values, weights, codebook, rates, overlap, state_bits)
    return viterbi_reference.search(values, weights, codebook, rates, overlap, state_bits)


def _search_cpu(
    values: Tensor,
    weights: Tensor,
    codebook: Tensor,
    rates: tuple[int, ...],
    overlap: Tensor,
    state_bits: int,
) -> Tensor:
    from framequant.kernels import viterbi_cpu

    arrays = (
        tensor.detach().contiguous().numpy() for tensor in (values, weights, codebook.to(torch.float32))
    )
    ends = overlap.contiguous().numpy()
    rates_array = torch.tensor(rates, dtype=torch.int64).numpy()
    return torch.from_numpy(
        viterbi_cpu.search(*arrays, rates_array, ends, state_bits, torch.get_num_threads())
    )


def encode_tiles(
    values: Float[Tensor, "tiles weights"],
    spec: TrellisSpec,
    backend: str = "auto",
    weights: Float[Tensor, "tiles weights"] | None = None,
    refine: int = 0,
    check: bool = True,
) -> Int[Tensor, "tiles steps"]:
    """Encode tiles as rings of states, least squares (the seam by a heuristic, the rest exactly).

    Args:
        values: ``(B, spec.weights)``, about unit variance, in the order of ``tiles_from_matrix``.
        spec: the trellis; ``T = spec.steps``.
        backend: see ``search``.
        weights: importance of each element, not negative, any scale.
        refine: further passes; each moves the seam by half a tile, where the path found so far fixes the
            shared bits. It cannot make a tile worse; one brings 0.02 % at L = 12, 2 bits, tiles of 256.
        check: whether to look for NaN and infinity, which on a GPU waits for it.

    Returns:
        ``(B, T)`` int32 states, a tail-biting path each.

    Raises:
        ConfigError: shapes that do not fit the spec, negative weights, an unknown backend.
        NumericalError: values or weights that are not finite.

    References:
        The two-pass idea for tail-biting trellises: Tseng, Sun, Hou, De Sa, 2024, arXiv 2406.11235. Here the
        first pass covers only a window around the seam.
    """
    if values.ndim != 2 or values.shape[1] != spec.weights:
        raise ConfigError(
            f"tiles of shape {tuple(values.shape)} do not fit a trellis of {spec.weights} weights"
        )
    if weights is not None:
        if weights.shape != values.shape:
            raise ConfigError(
                f"weights {tuple(weights.shape)} must have the shape of values {tuple(values.shape)}"
            )
        if bool((weights < 0).any()):
            raise ConfigError("importance weights must not be negative")
        weights = weights / weights.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    for name, tensor in (("values", values), ("weights", weights)):
        if check and tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"trellis encoding got {name} that are not finite")
    levels = _levels(spec.book, values.device)
    targets = values.to(torch.float32) / spec.book.scale
    overlap = _propose_overlap(targets, weights, levels, spec, backend)
    states = search(targets, levels, spec.rates, overlap=overlap, weights=weights, backend=backend)
    half = spec.steps // (2 * len(spec.rates)) * len(spec.rates)
    for _ in range(refine):
        targets = targets.roll(-half * spec.per_state, 1)
        weights = None if weights is None else weights.roll(-half * spec.per_state, 1)
        states = states.roll(-half, 1)
        overlap = states[:, 0] >> spec.rates[0]
        states = search(targets, levels, spec.rates, overlap=overlap, weights=weights, backend=backend)
    return states.roll(half * refine, 1)


@lru_cache(maxsize=16)
def _levels(book: Codebook, device: torch.device) -> Tensor:
    """Return the codebook's levels, (states, weights), integers up to 510: float16, exact, and half the traffic."""
    return book.levels(torch.arange(1 << book.state_bits, device=device)).to(torch.float16)


def _propose_overlap(
    targets: Tensor, weights: Tensor | None, levels: Tensor, spec: TrellisSpec, backend: str
) -> Tensor:
    """Return the bits before step 0 on the best free path through the steps around the seam."""
    period = len(spec.rates)
    side = -(-SEAM_CONTEXT * spec.state_bits // sum(spec.rates)) * period
    side = min(side, spec.steps // (2 * period) * period) or spec.steps
    reach = side * spec.per_state

    def around(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, -reach:], tensor[:, :reach]], dim=1)

    window = None if weights is None else around(weights)
    states = search(around(targets), levels, spec.rates, weights=window, backend=backend)
    return states[:, side] >> spec.rates[0]
