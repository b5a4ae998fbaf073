"""Learn from one run of a block which linears share an input and which write to the residual stream.

Every tensor operation of the block is observed (``TorchDispatchMode``). A tensor is followed through views and
casts that keep the order of tokens and features; an addition of two followed tensors is a *sum of terms*. If the
output of a linear is a term of a sum beside tensors that are no linear's output, the linear writes to a stream,
and the other terms are what the deviation of the stream is measured on. A norm, scale or permutation between
the linear and the addition breaks the chain, and the correction is off for that linear: the report says so.

Must not import layers or quantizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from framequant.model.replay import Call

_VIEWS = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::alias",
    "aten::_to_copy",
    "aten::clone",
    "aten::detach",
}
_ADDITIONS = {"aten::add", "aten::add_"}


@dataclass(frozen=True)
class StreamTerm:
    """A tensor that a residual sum contains, named by where a hook can get it.

    Attributes:
        kind: "argument" (the block's hidden states), "input" or "output" of a module.
        module: the module's name inside the block; empty for the block itself.
    """

    kind: str
    module: str


@dataclass
class Group:
    """Linears that read the same tensor.

    Attributes:
        linears: names inside the block, in order of execution; the first stands for the group.
        calls: how often the group's tensor is read in one forward pass.
        streams: for each linear that writes to a residual stream, the other terms of the sum.
        family: for an expert's linear, what its fellow experts' linears have in common with it; else empty.
        rows: tokens that the traced run had in this tensor.
    """

    linears: list[str]
    calls: int = 1
    streams: dict[str, tuple[StreamTerm, ...]] = field(default_factory=dict)
    family: str = ""
    rows: int = 0

    @property
    def name(self) -> str:
        """The first linear's name."""
        return self.linears[0]


class _Provenance(TorchDispatchMode):
    """Follow tensors through views and additions; tensors are kept alive so that their ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: dict[int, int] = {}
        self.sums: dict[int, tuple[int, ...]] = {}
        self.alive: list[Tensor] = []

    def root(self, tensor: Tensor) -> int:
        """Identity of the tensor that ``tensor`` is a view or copy of."""
        self.alive.append(tensor)
        return self.roots.get(id(tensor), id(tensor))

    def terms(self, tensor: Tensor) -> tuple[int, ...]:
        """Roots of the terms that ``tensor`` is the sum of; itself if it is no sum."""
        root = self.root(tensor)
        return self.sums.get(root, (root,))

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        name = func._schema.name
        if name in _VIEWS and _same_layout(args[0], out):
            self.alive.append(out)
            self.roots[id(out)] = self.root(args[0])
        elif name in _ADDITIONS and isinstance(args[1], Tensor) and not (kwargs or {}):
            left, right = args[0], args[1]
            if _same_layout(left, right):
                terms = self.terms(left) + self.terms(right)
                self.alive.append(out)
                self.roots.pop(id(out), None)
                self.sums[id(out)] = terms
        return out


def _same_layout(left: Any, right: Tensor) -> bool:
    """Whether two tensors hold the same tokens and features in the same order, up to leading dimensions."""
    if not isinstance(left, Tensor) or left.ndim == 0 or right.ndim == 0:
        return False
    return left.numel() == right.numel() and left.shape[-1] == right.shape[-1]


@dataclass
class _Record:
    inputs: dict[str, list[int]] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    boundaries: dict[int, StreamTerm] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    ready: dict[str, set[int]] = field(default_factory=dict)


def trace_block(block: nn.Module, call: Call, names: Sequence[str]) -> list[Group]:
    """Group the linears of a block and find its residual streams.

    Args:
        block: in evaluation mode.
        call: arguments to run it with.
        names: linears inside the block to group.

    Returns:
        Groups in order of execution. Linears that the run does not call appear in none of them.
    """
    provenance, record = _Provenance(), _Record()
    provenance.alive.append(call.hidden)
    record.boundaries[id(call.hidden)] = StreamTerm("argument", "")
    with _hooks(block, names, provenance, record), provenance, torch.no_grad():
        call.run(block)
    groups: dict[int, Group] = {}
    for name, roots in record.inputs.items():
        group = groups.setdefault(roots[0], Group([], len(roots), rows=record.rows[roots[0]]))
        group.linears.append(name)
    for group in groups.values():
        for name in group.linears:
            terms = _stream_terms(name, provenance, record)
            if terms:
                group.streams[name] = terms
    return list(groups.values())


def _stream_terms(name: str, provenance: _Provenance, record: _Record) -> tuple[StreamTerm, ...]:
    """The other terms of the smallest sum that holds the linear's output and a tensor that is no linear's."""
    own = {root for root, linear in record.outputs.items() if linear == name}
    candidates = [terms for terms in provenance.sums.values() if own & set(terms)]
    for terms in sorted(candidates, key=len):
        others = [root for root in terms if root not in own]
        bases = [root for root in others if root not in record.outputs]
        earlier = [root for root in others if root in record.outputs and root in record.ready[name]]
        if bases and all(root in record.boundaries and root in record.ready[name] for root in bases):
            outputs = [StreamTerm("output", record.outputs[root]) for root in earlier]
            return (*(record.boundaries[root] for root in bases), *outputs)
    return ()


@contextmanager
def _hooks(
    block: nn.Module, names: Sequence[str], provenance: _Provenance, record: _Record
) -> Iterator[None]:
    selected = set(names)

    def before(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            return
        root = provenance.root(tensors[0])
        record.boundaries.setdefault(root, StreamTerm("input", name))
        if name in selected:
            record.inputs.setdefault(name, []).append(root)
            record.rows[root] = tensors[0].numel() // max(tensors[0].shape[-1], 1)
            record.ready[name] = set(record.boundaries) | set(record.outputs)

    def after(module: nn.Module, args: Any, out: Any, name: str) -> None:
        if isinstance(out, Tensor):
            root = provenance.root(out)
            if isinstance(module, nn.Linear) or name in selected:
                record.outputs.setdefault(root, name)
            record.boundaries.setdefault(root, StreamTerm("output", name))

    handles = []
    for name, module in block.named_modules():
        if name:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, name=name: before(m, a, k, name), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: after(m, a, o, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
