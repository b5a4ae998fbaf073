"""Run a model up to one of its blocks without running the blocks before it.

Blocks receive more than their predecessor's output: rotary embeddings, masks that differ from layer to layer,
a downsampled copy between two stages. Instead of guessing these, the model itself is run, with every earlier
block replaced by a stub: the block just before returns its stored output, those before that pass their input
through, and the block of interest records what it is called with and ends the run. So each block sees exactly
what the model would give it, for the price of the embeddings.

Must not import layers or quantizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import DiscoveryError


class EndOfRunError(Exception):
    """Raised inside a forward pass to end it early; never leaves this package."""


@dataclass
class Call:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states: the first floating tensor among the arguments."""
        return first_tensor([*self.args, *self.kwargs.values()])

    def run(self, block: nn.Module) -> Any:
        """Call a block with these arguments."""
        return block(*self.args, **self.kwargs)


def first_tensor(values: Sequence[Any]) -> Tensor:
    """The first floating-point tensor of a sequence.

    Raises:
        DiscoveryError: there is none.
    """
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise DiscoveryError("a block was called without hidden states; this model's blocks cannot be walked.")


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with its hidden states replaced; outputs are a tensor or a tuple that starts with it."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)((hidden, *output[1:]))


def as_call(batch: Any) -> Call:
    """The call that a batch stands for: a mapping of keyword arguments, a tuple of arguments, or one tensor."""
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    return Call(tuple(batch) if isinstance(batch, tuple | list) else (batch,), {})


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch; see ``as_call``."""
    return as_call(batch).run(model)


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Cast a model to a dtype for a while; afterwards every tensor that is still there has its own dtype again.

    Args:
        model: the model, cast in place.
        dtype: a dtype that holds the model's own values exactly; None to leave the model as it is.
    """
    if dtype is None:
        yield
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtypes = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}
    nn.Module.to(model, dtype=dtype)
    try:
        yield
    finally:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in dtypes:
                tensor.data = tensor.data.to(dtypes[name])


@contextmanager
def short_products(device: torch.device, short: bool = True) -> Iterator[None]:
    """Let a GPU round the factors of float32 products to TF32 (ten bits) for a while, several times as fast.

    A Hessian of rounded inputs is still one, and what is rounded so is off by less than a thousandth.
    """
    before = torch.get_float32_matmul_precision()
    if short and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def forwards_replaced(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of modules for a while; hooks and ``__call__`` stay as they are."""
    saved = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in saved.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value cache; everything as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {
        id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if hasattr(c, "use_cache")
    }
    caching = [config for config in configs.values() if config.use_cache]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


class Replay:
    """The blocks of a model in the order in which they run, and what each is called with.

    Args:
        model: in evaluation mode.
        chains: block names by chain, from ``find_blocks``.
        batch: an example batch, run once to learn the order.
        order: the blocks as they are called, where that is known already.

    Raises:
        DiscoveryError: a block is never called or called more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        chains: Mapping[str, Sequence[str]],
        batch: Any,
        order: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        calls = called_blocks(model, chains, batch) if order is None else list(order)
        self.names = require_once(calls)
        self.blocks = [model.get_submodule(name) for name in self.names]
        ends = {names[-1] for names in chains.values()}
        self.chain_ends = [index for index, name in enumerate(self.names) if name in ends]

    def on(self, twin: nn.Module) -> Replay:
        """The same blocks of a copy of the model."""
        other = copy.copy(self)
        other.model, other.blocks = twin, [twin.get_submodule(name) for name in self.names]
        return other

    def call(self, index: int, batch: Any, previous: Any, ends: Mapping[int, Any] | None = None) -> Call:
        """What block ``index`` is called with.

        Args:
            index: position in ``names``.
            batch: the model's input.
            previous: the stored output of block ``index - 1`` on this batch; ignored for the first block.
            ends: stored outputs of earlier ``chain_ends`` on this batch: what a decoder reads of its encoder.
        """
        caught: list[Call] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append(Call(args, kwargs))
            raise EndOfRunError

        with (
            self.stubs(previous, ends, index),
            forwards_replaced({self.blocks[index]: catch}),
            suppress(EndOfRunError),
        ):
            call_model(self.model, batch)
        return caught[0]

    def run_through(self, batch: Any) -> dict[int, Any]:
        """Run all blocks on a batch; what the last of them and the ``chain_ends`` return, by position."""
        last, found = len(self.names) - 1, {}

        def keep(index: int, output: Any) -> None:
            found[index] = output
            if index == last:
                raise EndOfRunError

        hooks = [
            self.blocks[index].register_forward_hook(lambda *call, index=index: keep(index, call[-1]))
            for index in {*self.chain_ends, last}
        ]
        try:
            with suppress(EndOfRunError):
                call_model(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def stubs(
        self, previous: Any, ends: Mapping[int, Any] | None = None, index: int | None = None
    ) -> Iterator[None]:
        """Let the blocks before position ``index`` (all of them if not given) give stored outputs for a while.

        Args:
            previous: what the last of them gives.
            ends: what earlier ``chain_ends`` give; the others pass their hidden states through.
            index: a position in ``names``.
        """
        last = (len(self.names) if index is None else index) - 1

        def pass_through(*args: Any, **kwargs: Any) -> Any:
            return with_hidden(previous, Call(args, kwargs).hidden)

        replacements: dict[nn.Module, Callable[..., Any]] = {}
        for earlier in range(last):
            stored = (ends or {}).get(earlier)
            replacements[self.blocks[earlier]] = pass_through if stored is None else _returning(stored)
        if last >= 0:
            replacements[self.blocks[last]] = _returning(previous)
        with forwards_replaced(replacements):
            yield


def called_blocks(model: nn.Module, chains: Mapping[str, Sequence[str]], batch: Any) -> list[str]:
    """Run a model and name its blocks as often, and in the order, in which they are called."""
    calls: list[str] = []
    names = [name for chain in chains.values() for name in chain]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name in names
    ]
    try:
        call_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def require_once(calls: Sequence[str]) -> list[str]:
    """Check that every block that is called is called once.

    Raises:
        DiscoveryError: a block is called more than once, or none is called.
    """
    repeated = sorted({name for name in calls if calls.count(name) > 1})
    if repeated:
        raise DiscoveryError(
            f"block {repeated[0]} runs more than once per forward pass; shared blocks are not walked."
        )
    if not calls:
        raise DiscoveryError("no block of the model was called on the calibration data.")
    return list(calls)


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
