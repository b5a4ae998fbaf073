"""Gradients of the float model's outputs, block by block: forwards once, keeping every block's outputs, then backwards.

A block is read twice. On the way back it is run again on its kept input, the gradient of its output is passed through
it, and what arrives at its input goes to the block before: the same operations in the same order as one backward
pass through the whole model, so the same bits. Second moments of a block's output gradients go to a file each; the
sensitivities that a bit budget is shared out by are worked out while the block's weights are there.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from framequant import checkpoint
from framequant.config import FrameQuantConfig
from framequant.model.activations import Activations, map_tensors
from framequant.model.allocation import sensitivity_of
from framequant.model.capture import token_mask
from framequant.model.discovery import linear_weight
from framequant.model.experts import families
from framequant.model.gradients import (
    NO_ROOM,
    GradientPass,
    OutputGradients,
    fast_pass,
    pieces_of,
    watched,
)
from framequant.model.mixture import pooled_gradients, tokens_seen
from framequant.model.ranks import Ranks
from framequant.model.replay import Replay, call_model, first_tensor, with_hidden
from framequant.model.sampled_loss import sampled_loss, skip_labels
from framequant.streaming import durable


@dataclass
class Gathered:
    """What a pass found.

    Attributes:
        sums: by linear; ``gram_sum`` is in the files, ``squares`` are this rank's.
        sensitivities: by linear, see ``allocation.sensitivity_of``.
        note: why something is missing, or empty.
    """

    sums: dict[str, OutputGradients] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)
    note: str = ""


class GradientFiles:
    """The results of a pass on disk: a file for each block, and a mark that the pass was finished.

    Args:
        directory: of this rank.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def is_complete(self) -> bool:
        """Whether a pass was finished here."""
        return (self.directory / "done.json").is_file()

    def begin(self) -> None:
        """Throw away what an unfinished pass left."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)

    def keep(self, block: str, sums: dict[str, OutputGradients]) -> None:
        """Write the second moments of a block's linears, and let go of them."""
        grams = {name: one.gram_sum for name, one in sums.items() if one.gram_sum is not None}
        if grams:
            first: dict[int, str] = {}  # experts that no token reached share one matrix
            owners = {name: first.setdefault(id(gram), name) for name, gram in grams.items()}
            held = {name: grams[name].detach().to("cpu").contiguous() for name in first.values()}
            save_file(held, str(self.directory / f"{block}.safetensors"), metadata=owners)
        for one in sums.values():
            one.gram_sum = one.input_sum = None

    def grams(self, block: str) -> dict[str, Tensor]:
        """The second moments of a block's linears, mapped from the file; sums over tokens."""
        path = self.directory / f"{block}.safetensors"
        if not path.is_file():
            return {}
        with checkpoint.open_tensors(path) as file:
            return {name: file.get_tensor(owner) for name, owner in file.metadata().items()}

    def finish(self, found: Gathered) -> None:
        """Write what is small, and the mark last."""
        squares = {
            f"{number}/{name}": part.detach().to("cpu")
            for name, one in found.sums.items()
            for number, part in one.squares.items()
        }
        save_file(squares, str(self.directory / "squares.safetensors"))
        small = {
            "counts": {name: [one.count, one.inputs, one.input_square] for name, one in found.sums.items()},
            "sensitivities": found.sensitivities,
            "note": found.note,
        }
        for path in self.directory.iterdir():
            durable.flush(path)
        durable.write_text(self.directory / "done.json", json.dumps(small))

    def read(self, device: torch.device) -> Gathered:
        """What a finished pass kept, the second moments left in their files."""
        small = json.loads((self.directory / "done.json").read_text(encoding="utf-8"))
        sums = {
            name: OutputGradients(count=count, inputs=inputs, input_square=square)
            for name, (count, inputs, square) in small["counts"].items()
        }
        with checkpoint.open_tensors(self.directory / "squares.safetensors") as file:
            for key in sorted(file.keys(), key=lambda key: int(key.partition("/")[0])):
                number, _, name = key.partition("/")
                sums[name].squares[int(number)] = file.get_tensor(key).to(device)
        return Gathered(sums, small["sensitivities"], small["note"])


@dataclass
class StreamedPass:
    """One pass through a model whose blocks come and go.

    Attributes:
        model: whose parts outside the blocks are there, the head included.
        replay: its blocks in order; one chain.
        batches: this rank's.
        every_batch: all ranks'; labels are drawn for all, so that they do not depend on who runs them.
        config: of the run.
        ranks: who shares the work.
        enter, leave: bring a block, and let it go.
        store: a place for activations by name.
        files: for the results.
    """

    model: nn.Module
    replay: Replay
    batches: Sequence[Any]
    every_batch: Sequence[Any]
    config: FrameQuantConfig
    ranks: Ranks
    enter: Callable[[str], None]
    leave: Callable[[str], None]
    store: Callable[[str], Activations]
    files: GradientFiles

    def run(self, names: Sequence[str], inputs: bool, grams: bool) -> Gathered:
        """Run forwards and backwards.

        Args:
            names: linears to watch.
            inputs: also sum x xᵀ of what they read, for sensitivities.
            grams: sum whole matrices, see ``gradients.output_gradients``.
        """
        self.files.begin()
        note = "" if grams else NO_ROOM
        self.pieces = [(i, piece) for i, whole in enumerate(self.batches) for piece in pieces_of(whole)]
        with fast_pass(self.model):
            outputs = self._forwards()
            found = Gathered(note=note)
            gradients = self._at_the_end(names, outputs[-1], found, inputs, grams)
            for index in range(len(self.replay.names) - 1, -1, -1):
                before = outputs[index - 1] if index else None
                self._backwards(index, names, before, gradients, found, inputs, grams)
                outputs.pop()
        self.files.finish(found)
        return found

    def _forwards(self) -> list[Activations]:
        outputs: list[Activations] = []
        for index, name in enumerate(self.replay.names):
            self.enter(name)
            kept = self.store(f"gradients-{index}")
            with torch.no_grad():
                for number, (_, piece) in enumerate(self.pieces):
                    previous = outputs[-1].get(number) if outputs else None
                    call = self.replay.call(index, piece, previous)
                    kept.put(number, call.run(self.replay.blocks[index]))
            outputs.append(kept)
            self.leave(name)
        return outputs

    def _at_the_end(
        self, names: Sequence[str], outputs: Activations, found: Gathered, inputs: bool, grams: bool
    ) -> Activations:
        """Draw labels on the model's outputs; return the gradients of the last block's outputs."""
        prefixes = tuple(f"{name}." for name in self.replay.names)
        outside = [name for name in names if not name.startswith(prefixes)]
        gradients, state = self.store("gradients-of-outputs"), GradientPass(inputs, grams)
        generator = torch.Generator(device="cpu").manual_seed(self.config.seed)
        numbers = iter(range(len(self.pieces)))
        with watched(self.model, outside, state), torch.enable_grad():
            for mine, whole in self._all_batches():
                for piece in pieces_of(whole):
                    if mine is None:
                        skip_labels(piece, token_mask(piece), generator)
                        continue
                    number = next(numbers)
                    state.number, state.mask = mine, token_mask(piece)
                    state.read.clear()
                    leaf, stored = _leaf(outputs.get(number))
                    with self.replay.stubs(stored):
                        output = call_model(self.model, piece)
                    sampled_loss(self.model, output, state.mask, generator).backward()
                    gradients.put(number, leaf.grad)
        self._conclude("outside", outside, state, found, keep=False)
        return gradients

    def _all_batches(self) -> Iterator[tuple[int | None, Any]]:
        """Every rank's batches in order; with the number among ours, or None for another rank's."""
        for number, batch in enumerate(self.every_batch):
            mine = number % self.ranks.size == self.ranks.rank
            yield (
                (number // self.ranks.size, self.batches[number // self.ranks.size])
                if mine
                else (None, batch)
            )

    def _backwards(
        self,
        index: int,
        names: Sequence[str],
        before: Activations | None,
        gradients: Activations,
        found: Gathered,
        inputs: bool,
        grams: bool,
    ) -> None:
        name, block = self.replay.names[index], self.replay.blocks[index]
        self.enter(name)
        inside = [linear for linear in names if linear.startswith(f"{name}.")]
        state = GradientPass(inputs, grams)
        with watched(self.model, inside, state), torch.enable_grad():
            for number, (state.number, piece) in enumerate(self.pieces):
                state.mask = token_mask(piece)
                state.read.clear()
                leaf, stored = (None, None) if before is None else _leaf(before.get(number))
                output = first_tensor([*_flat(self.replay.call(index, piece, stored).run(block))])
                if output.requires_grad:
                    output.backward(gradients.get(number))
                if leaf is not None:
                    gradients.put(number, leaf.grad)
        self._conclude(name, inside, state, found, keep=True)
        self.leave(name)

    def _conclude(
        self, block: str, names: Sequence[str], state: GradientPass, found: Gathered, keep: bool
    ) -> None:
        conclude(self.model, names, state, found, self.config, self.ranks, block if keep else None)
        if keep:
            self.files.keep(block, {name: found.sums[name] for name in names if name in found.sums})


def conclude(
    model: nn.Module,
    names: Sequence[str],
    state: GradientPass,
    found: Gathered,
    config: FrameQuantConfig,
    ranks: Ranks,
    block: str | None = None,
) -> None:
    """Sum what was watched over the ranks, and work the sensitivities out of it.

    Args:
        model: the weights of ``names`` are there.
        names: linears that were watched.
        state: the sums of this rank.
        found: gets the results.
        config: of the run.
        ranks: who shares the work.
        block: that the linears are in; its experts that no token reached get what their fellows have.
    """
    seen = ranks.total_counts(tokens_seen(state.totals))
    everywhere = _summed(model, names, state.totals, ranks)
    found.sums |= {name: state.totals[name] for name in everywhere}
    if block is not None:
        inside = {name: family for name, family in families(model, [block]).items() if name in names}
        for name, pooled in pooled_gradients(everywhere, seen, inside).items():
            everywhere[name], found.sums[name] = pooled, replace(pooled, squares={})  # no tokens of its own
    if state.inputs:
        for name, one in everywhere.items():
            weight = linear_weight(model.get_submodule(name))
            found.sensitivities[name] = sensitivity_of(weight, one, config, name)
    for one in found.sums.values():
        one.input_sum = None


def _summed(
    model: nn.Module, names: Sequence[str], totals: dict[str, OutputGradients], ranks: Ranks
) -> dict[str, OutputGradients]:
    """Sum over the ranks, matrices in place; tokens of an expert may all be on other ranks.

    Returns:
        For each linear that a rank has reached its sums over all, with the mean of the squares for each token.
    """
    if ranks.size == 1:
        return {name: totals[name] for name in names if name in totals}
    parts = _parts(totals, ranks)
    summed: dict[str, Tensor] = {}
    everywhere = {}
    for name in names:
        if name not in parts:
            continue
        has_gram, reader = parts[name]
        one = totals.setdefault(name, OutputGradients())
        rows, columns = (weight := linear_weight(model.get_submodule(name))).shape
        if has_gram:
            one.gram_sum = ranks.add_(_or_zeros(one.gram_sum, rows, weight.device))
        if reader is not None:
            if reader not in summed:
                summed[reader] = ranks.add_(_or_zeros(one.input_sum, columns, weight.device))
            one.input_sum = summed[reader]
        values = torch.cat([*one.squares.values()]).double() if one.squares else torch.zeros(0)
        count, inputs, one.input_square, total, size = ranks.sum(
            one.count, one.inputs, one.input_square, float(values.sum()), values.numel()
        )
        one.count, one.inputs = int(count), int(inputs)
        mean = torch.full((int(size),), total / max(size, 1), dtype=torch.float64)
        everywhere[name] = replace(one, squares={0: mean} if size else {})
    return everywhere


def _parts(totals: dict[str, OutputGradients], ranks: Ranks) -> dict[str, tuple[bool, str | None]]:
    """For each linear that a rank has reached: whether gradients were summed, and who read its input first."""
    first: dict[int, str] = {}
    mine = {
        name: (
            one.gram_sum is not None,
            None if one.input_sum is None else first.setdefault(id(one.input_sum), name),
        )
        for name, one in totals.items()
    }
    merged: dict[str, tuple[bool, str | None]] = {}
    for parts in ranks.gather(mine):
        for name, (gram, reader) in parts.items():
            known = merged.get(name, (False, None))
            merged[name] = known[0] or gram, known[1] or reader
    return merged


def _or_zeros(total: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, size, device=device) if total is None else total


def clear(directory: Path) -> None:
    """Delete the files of a scratch directory; mappings that are still there keep theirs."""
    for path in directory.iterdir():
        path.unlink()


def _leaf(stored: Any) -> tuple[Tensor, Any]:
    """A stored output whose hidden states gather gradients, and these hidden states."""
    hidden = first_tensor([*_flat(stored)]).detach().requires_grad_(True)
    return hidden, with_hidden(stored, hidden)


def _flat(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, add)
    return found
