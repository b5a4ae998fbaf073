"""Run blocks on calibration activations and sum the second moments that rounding needs.

The quantized chain's block and the float model's copy of it run on the same batch, each with its own
activations; hooks pick up what the linears of interest read and what their residual stream holds. Hooks are
always removed, and a run ends as soon as it has been where it was sent.

Must not import layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import NumericalError
from framequant.model.replay import Call, EndOfRunError
from framequant.model.trace import Group, StreamTerm
from framequant.quantizers.hessian import Moments


@dataclass
class Seen:
    """What one run of a block showed.

    Attributes:
        inputs: for each group, by its name, the tensor it read, once per call, as (tokens, features).
        terms: the residual terms asked for, as (tokens, features).
        output: what the block returned; None if the run ended early.
        versions: tensors that were picked up, with torch's count of writes to them.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    terms: dict[StreamTerm, Tensor] = field(default_factory=dict)
    output: Any = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def pick_up(self, tensor: Tensor) -> Tensor:
        """A tensor as (tokens, features), a view where possible; its version is noted."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        self.versions.append((flat, flat._version))
        return flat

    @property
    def overwritten(self) -> bool:
        """Whether the block has since written in place to a tensor that was picked up."""
        return any(tensor._version != version for tensor, version in self.versions)


def token_mask(batch: Any) -> Tensor | None:
    """The batch's real tokens as a flat boolean mask, or None when every token is real."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.reshape(-1).bool()


def observe(block: nn.Module, call: Call, groups: Sequence[Group], to_the_end: bool = False) -> Seen:
    """Run a block until every group has read its input; return what was seen.

    Args:
        block: in evaluation mode.
        call: its arguments.
        groups: whose inputs and residual terms to pick up.
        to_the_end: run the whole block, for its output.
    """
    seen = Seen()
    to_the_end = to_the_end or any(group.family for group in groups)  # who is read depends on the tokens
    with _observers(block, call, groups, seen, to_the_end), torch.no_grad(), suppress(EndOfRunError):
        seen.output = call.run(block)
    return seen


@contextmanager
def _observers(
    block: nn.Module, call: Call, groups: Sequence[Group], seen: Seen, to_the_end: bool
) -> Iterator[None]:
    remaining = {group.name: group.calls for group in groups}
    handles = []

    def read(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen.inputs.setdefault(name, []).append(seen.pick_up(inputs))
        remaining[name] -= 1
        if not to_the_end and all(count <= 0 for count in remaining.values()):
            raise EndOfRunError

    for term in {term for group in groups for terms in group.streams.values() for term in terms}:
        if term.kind == "argument":
            seen.terms[term] = seen.pick_up(call.hidden)
        else:
            handles.append(_watch(block.get_submodule(term.module), term, seen))
    for group in groups:
        module = block.get_submodule(group.name)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=group.name: read(m, args, kwargs, name), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, term: StreamTerm, seen: Seen) -> Any:
    if term.kind == "output":
        return module.register_forward_hook(
            lambda _m, _a, out: seen.terms.__setitem__(term, seen.pick_up(out))
        )
    return module.register_forward_pre_hook(
        lambda _m, args: seen.terms.__setitem__(term, seen.pick_up(args[0]))
    )


def add_moments(
    totals: dict[str, Moments],
    groups: Sequence[Group],
    quantized: Seen,
    floating: Seen | None,
    mask: Tensor | None,
    use_drift: bool,
    use_residual: bool,
    token_weights: Mapping[str, Tensor] | None = None,
    where: tuple[str, int] = ("", 0),
) -> None:
    """Add one batch's moments for each group.

    Args:
        totals: moments by group name, updated.
        groups: the groups that were observed.
        quantized: what the quantized chain showed.
        floating: what the float model showed on the same batch, or None.
        mask: real tokens; padding takes no part.
        use_drift: whether to sum the drift between both inputs.
        use_residual: whether to sum the deviation of the residual streams.
        token_weights: by group name, the weight of each real token, of mean one.
        where: prefix of the groups' names and number of the batch, for messages.

    Raises:
        NumericalError: an activation is NaN or infinite; linear and batch are named.
    """
    for group in groups:
        try:
            _add_group(totals, group, quantized, floating, mask, use_drift, use_residual, token_weights)
        except NumericalError as error:
            prefix, number = where
            raise NumericalError(f"{prefix}{group.name}, batch {number}: {error}") from error


def _add_group(
    totals: dict[str, Moments],
    group: Group,
    quantized: Seen,
    floating: Seen | None,
    mask: Tensor | None,
    use_drift: bool,
    use_residual: bool,
    token_weights: Mapping[str, Tensor] | None,
) -> None:
    reads = quantized.inputs.get(group.name, [])
    if group.family:
        for inputs in reads:
            totals[group.name].add(inputs[inputs.any(dim=1)])  # some mixtures send zeros instead of nothing
        return
    float_reads = floating.inputs.get(group.name, []) if floating else []
    paired = len(reads) == len(float_reads) and all(
        a.shape == b.shape for a, b in zip(reads, float_reads, strict=True)
    )
    moments = totals[group.name]
    for index, inputs in enumerate(reads):
        keep = _applicable(mask, inputs)
        other = float_reads[index] if paired and use_drift else None
        root = _root_weights(token_weights, group, inputs, keep)
        moments.add(
            _weighted(_kept(inputs, keep), root),
            None if other is None else _weighted(_kept(other, keep), root),
        )
    if floating is not None and use_residual and len(reads) == 1:
        keep = _applicable(mask, reads[0])
        root = _root_weights(token_weights, group, reads[0], keep)
        _add_residuals(moments, group, quantized, floating, keep, root, reads[0])


def _add_residuals(
    moments: Moments,
    group: Group,
    quantized: Seen,
    floating: Seen,
    keep: Tensor | None,
    root: Tensor | None,
    inputs: Tensor,
) -> None:
    for name, terms in group.streams.items():
        deviation: Tensor | None = None
        for term in terms:
            if term not in quantized.terms or term not in floating.terms:
                return
            difference = floating.terms[term] - quantized.terms[term]
            deviation = difference if deviation is None else deviation + difference
        if deviation is not None and deviation.shape[0] == inputs.shape[0]:
            kept, read = _kept(deviation, keep), _kept(inputs, keep)
            moments.add_residual(name, _weighted(kept, root), _weighted(read, root))


def _root_weights(
    weights: Mapping[str, Tensor] | None, group: Group, inputs: Tensor, keep: Tensor | None
) -> Tensor | None:
    """Square roots of the tokens' weights, if there is one for each token that counts."""
    found = None if weights is None else weights.get(group.name)
    count = inputs.shape[0] if keep is None else int(keep.sum())
    return None if found is None or found.numel() != count else found.sqrt()


def _weighted(tensor: Tensor, root: Tensor | None) -> Tensor:
    return tensor if root is None else tensor * root[:, None].to(tensor)


def _applicable(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    return mask if mask is not None and mask.numel() == inputs.shape[0] else None


def _kept(tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor if keep is None else tensor[keep.to(tensor.device)]
