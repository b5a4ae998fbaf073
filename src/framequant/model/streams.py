"""The activations that a walk carries from block to block: the quantized chain's, and beside it the float model's.

Must not import layers or quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from framequant.model import discovery
from framequant.model.activations import Activations
from framequant.model.capture import Seen, observe
from framequant.model.replay import Call, Replay
from framequant.model.rows import count_rows, pick
from framequant.model.trace import Group


class Calls(Sequence[Call]):
    """What a block is called with for every batch, worked out anew at each access: only outputs are held."""

    def __init__(self, count: int, make: Callable[[int], Call]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            chosen = range(self._count)[number]
            return Calls(len(chosen), lambda place: self._make(chosen[place]))
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._make(number)


class Stream:
    """One chain of activations: the outputs of the block just done, and of the last block of each chain before."""

    def __init__(
        self, replay: Replay, batches: list[Any], new_store: Callable[[str], Activations] | None = None
    ) -> None:
        self._replay, self._batches = replay, batches
        self._new_store = new_store or (lambda name: Activations(name=name))
        self._outputs = self._new_store("blocks")
        self._ends: dict[int, Activations] = {}

    def call(self, index: int, number: int) -> Call:
        """What block ``index`` is called with on batch ``number``; one past the last block ends in a run to the end."""
        return self._replay.call(
            index, self._batches[number], self._outputs.get(number), self._chain_ends(number)
        )

    def calls(self, index: int) -> Sequence[Call]:
        """What block ``index`` is called with, for every batch."""
        lazy = Calls(len(self._batches), lambda number: self.call(index, number))
        return list(lazy) if self._outputs.resident else lazy

    def advance(self, index: int, outputs: Iterable[Any]) -> None:
        """Hold the outputs of block ``index`` for the next, each as soon as it is there."""
        ends = self._new_store(f"end-{index}") if index in self._replay.chain_ends else None
        for number, output in enumerate(outputs):
            self._outputs.put(number, output)
            if ends is not None:
                ends.put(number, output)
        if ends is not None:
            self._ends[index] = ends

    def run_through(self, batch_of: Callable[[int], Any]) -> None:
        """Run the model through all its blocks at once, in place of ``advance`` from block to block.

        Args:
            batch_of: the model's input for the number of a batch.
        """
        last = len(self._replay.names) - 1
        self._ends = {index: self._new_store(f"end-{index}") for index in self._replay.chain_ends}
        for number in range(len(self._batches)):
            found = self._replay.run_through(batch_of(number))
            self._outputs.put(number, found[last])
            for index, store in self._ends.items():
                store.put(number, found[index])

    @contextmanager
    def behind_blocks(self, number: int) -> Iterator[None]:
        """A model that skips its blocks, of which the last gives its stored output on batch ``number``."""
        with self._replay.stubs(self._outputs.get(number), self._chain_ends(number)):
            yield

    @contextmanager
    def behind_rows(self, rows: Mapping[int, list[int]], count: int) -> Iterator[None]:
        """A model that skips its first ``count`` blocks, on some rows of several batches put together.

        Args:
            rows: positions by number of the batch; batches of one form, see ``rows.pick``.
            count: blocks to skip, of which the last gives its stored outputs.
        """
        sizes = [count_rows(self._batches[number]) for number in rows]

        def stored(store: Activations) -> Any:
            return pick([store.get(number) for number in rows], sizes, list(rows.values()))

        ends = {index: stored(store) for index, store in self._ends.items()}
        with self._replay.stubs(stored(self._outputs), ends, count):
            yield

    def _chain_ends(self, number: int) -> dict[int, Any]:
        return {index: store.get(number) for index, store in self._ends.items()}


#: Bytes of a float block's activations that are kept while its quantized twin is worked on.
FLOAT_CACHE_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}


class FloatBlock:
    """The float model's copy of a block on the float model's own activations.

    Its activations do not change while the linears of its twin are quantized one after another, so one run shows
    all of them; they are kept where they fit, and shown again by further runs where they do not.
    """

    def __init__(self, block: nn.Module, calls: Sequence[Call], cache_bytes: int | None = None) -> None:
        self._block, self._calls, self._cache_bytes = block, calls, cache_bytes
        self._seen: list[Seen] = []

    def remember(self, groups: list[Group]) -> None:
        """Run the block once for all groups, if what they read fits into ``FLOAT_CACHE_BYTES``.

        A block that goes on to write to these tensors in place is run again for every stage instead.
        """
        if not groups:
            return
        hidden = self._calls[0].hidden
        features = sum(
            group.calls * discovery.linear_weight(self._block.get_submodule(group.name)).shape[1]
            + hidden.shape[-1] * sum(len(terms) for terms in group.streams.values())
            for group in groups
        )
        limit = self._cache_bytes
        if limit is None:
            limit = FLOAT_CACHE_BYTES.get(hidden.device.type, FLOAT_CACHE_BYTES["cpu"])
        tokens = limit // (features * hidden.element_size())
        for (
            call
        ) in self._calls:  # each may have to come from elsewhere: no more of them than are needed to know
            tokens -= call.hidden.numel() // call.hidden.shape[-1]
            if tokens < 0:
                return
        seen = [observe(self._block, call, groups, to_the_end=True) for call in self._calls]
        self._seen = [] if any(one.overwritten for one in seen) else seen

    def seen(self, number: int, stage: list[Group]) -> Seen:
        """What the groups of a stage read, and their residual terms, on batch ``number``."""
        return self._seen[number] if self._seen else observe(self._block, self._calls[number], stage)

    def outputs(self) -> Iterator[Any]:
        """The block's outputs on every batch, one after the other."""
        if self._seen:
            return (seen.output for seen in self._seen)
        return (call.run(self._block) for call in self._calls)
