"""A model whose blocks come from its files when they are worked on, and go to the output when they are done.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framequant import checkpoint, storage
from framequant.config import CodeKind, FrameQuantConfig
from framequant.layers import FrameLinear
from framequant.memory import return_freed_memory
from framequant.model import discovery, experts, mixture
from framequant.model.activations import Activations, Place, tensor_bytes
from framequant.model.calibration import as_samples
from framequant.model.capture import token_mask
from framequant.model.gradients import GradientPass, OutputGradients, gram_bytes, watched
from framequant.model.ranks import Ranks
from framequant.model.replay import (
    Call,
    EndOfRunError,
    Replay,
    call_model,
    forwards_replaced,
    require_once,
    with_hidden,
)
from framequant.model.residence import BlockRecord, Residence
from framequant.model.streams import Stream
from framequant.streaming.gradients import Gathered, GradientFiles, StreamedPass, clear, conclude
from framequant.streaming.journal import Journal, record_of
from framequant.streaming.plan import (
    RESERVE,
    MemoryLimits,
    MemoryPlan,
    block_bytes,
    plan_memory,
    rounding_bytes,
)
from framequant.streaming.skeleton import Skeleton


class StreamedResidence(Residence):
    """Reads blocks from a skeleton's files and keeps their results in a journal.

    Args:
        skeleton: the model.
        journal: of the first rank; None on the others.
        config: of the run.
        device: where blocks are computed.
        limits: of memory.
        ranks: the processes that share the work.
        total_samples: calibration samples of this rank.
        notify: called with remarks for the user.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        journal: Journal | None,
        config: FrameQuantConfig,
        device: torch.device,
        limits: MemoryLimits,
        ranks: Ranks,
        scratch: Path,
        notify: Callable[[str], None],
    ) -> None:
        self._skeleton, self._journal, self._config = skeleton, journal, config
        self.model, self.device, self.ranks = skeleton.model, device, ranks
        self._limits, self._scratch, self._notify = limits, scratch, notify
        self._numbers: dict[str, int] = {}
        self._shards: list[str] = []
        self._done: set[str] = set()
        self._outside_shard = ""
        self._plan: MemoryPlan | None = None
        self._working = (0, 0)
        self._batches: list[Any] = []
        self._every_batch: list[Any] = []
        self._gradient_files = GradientFiles(scratch.parent.parent / f"gradients-{ranks.rank}")
        self._held: dict[str, OutputGradients] = {}
        self._sensitivities: dict[str, float] | None = None
        self.chains = discovery.find_blocks(self.model)
        self._blocks = [name for names in self.chains.values() for name in names]

    # --- Outside the blocks ---------------------------------------------------------------------------

    def outside_keys(self) -> list[str]:
        """Keys of the float model's state that lie in no block."""
        prefixes = tuple(f"{name}." for name in self._blocks)
        return [key for key in self.model.state_dict() if not key.startswith(prefixes)]

    def load_outside(self) -> None:
        """Bring what the model runs before its blocks; an output head of its own stays where it is."""
        head = self.head_name()
        self._install([key for key in self.outside_keys() if head is None or not key.startswith(f"{head}.")])
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta and buffer.device != self.device:
                owner, _, part = name.rpartition(".")
                setattr(self.model.get_submodule(owner), part, buffer.to(self.device))

    def head_name(self) -> str | None:
        """Name of an output head whose weight is not the input embedding's."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        for name, module in self.model.named_modules():
            if module is head and f"{name}.weight" not in self._tied():
                return name
        return None

    def _tied(self) -> set[str]:
        return set(self._skeleton.aliases) | set(self._skeleton.aliases.values())

    def bring_outside(self, name: str) -> None:
        """Bring the weight of a linear outside the blocks, if it is not there."""
        module = self.model.get_submodule(name)
        if any(parameter.is_meta for parameter in module.parameters()):
            self._install([f"{name}.{key}" for key in module.state_dict()])

    def _install(self, keys: Iterable[str]) -> None:
        """Put float tensors in their places, in the dtype that the skeleton has now (``walk_dtype``)."""
        by_first: dict[str, list[str]] = {}
        for key in keys:
            by_first.setdefault(self._skeleton.aliases.get(key, key), []).append(key)
        for key, placed in self._skeleton.read(by_first, self.device):
            shared: nn.Parameter | None = None
            for alias in by_first[key]:
                owner, _, part = alias.rpartition(".")
                module = self.model.get_submodule(owner)
                if part in module._buffers:
                    module._buffers[part] = placed
                    continue
                dtype = module._parameters[part].dtype if placed.is_floating_point() else placed.dtype
                shared = shared if shared is not None else nn.Parameter(placed.to(dtype), requires_grad=False)
                module._parameters[part] = shared

    # --- Blocks ---------------------------------------------------------------------------------------

    def enter(self, name: str) -> None:
        """Bring a block's float weights, and the moments of its output gradients."""
        self._install([f"{name}.{key}" for key in self.model.get_submodule(name).state_dict()])
        self._bring_moments(name)

    def evict(self, name: str) -> None:
        """Let a block's tensors go; buffers that no file holds stay."""
        for module in self.model.get_submodule(name).modules():
            if isinstance(module, FrameLinear):
                module.forget_prepared()
            for part, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[part] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            for part, buffer in module._buffers.items():
                if buffer is not None and part not in module._non_persistent_buffers_set:
                    module._buffers[part] = buffer.to("meta")
        for linear, found in self._held.items():
            if linear.startswith(f"{name}."):
                found.gram_sum = None
        return_freed_memory()

    def order(self, model: nn.Module, chains: Mapping[str, Sequence[str]], batch: Any) -> list[str]:
        """Learn the order of the blocks from one sample, running the first block of each chain only.

        The others pass their hidden states on. Where widths differ along a chain that fails, and every block is run.
        """
        if self._numbers:
            return list(self._numbers)
        sample = as_samples([batch])[0]
        head = self.head_name()
        if len(chains) > 1 and head is not None:
            self.bring_outside(head)
        try:
            calls, size = self._run_through(sample, only_first=True)
        except (RuntimeError, ValueError, TypeError):
            calls, size = self._run_through(sample, only_first=False)
        names = require_once(calls)
        self._number(names)
        self._plan_memory(size * sum(len(as_samples([one])) for one in self._batches))
        return names

    def _run_through(self, sample: Any, only_first: bool) -> tuple[list[str], int]:
        calls: list[str] = []
        sizes = [0]
        outputs: dict[str, Any] = {}

        def run(name: str, chain: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if only_first and chain in outputs:
                return with_hidden(outputs[chain], Call(args, kwargs).hidden)
            self.enter(name)
            outputs[chain] = forward(*args, **kwargs)
            sizes.append(tensor_bytes(outputs[chain]))
            self.evict(name)
            return outputs[chain]

        replaced = {}
        for chain, names in self.chains.items():
            for name in names:
                block = self.model.get_submodule(name)
                replaced[block] = _bound(run, name, chain, block.forward)
        last = self.model.get_submodule(self._blocks[-1])
        with forwards_replaced(replaced), _ended_after(last, len(self.chains) == 1):
            call_model(self.model, sample)
        return calls, max(sizes)

    def watch(self, batches: list[Any]) -> None:
        """Say which batches all ranks will run."""
        self._every_batch, self._batches = batches, self.ranks.deal(batches)

    def _number(self, names: list[str]) -> None:
        count = len(names) + 1
        self._numbers = {name: number for number, name in enumerate(names)}
        self._shards = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        done, damaged = [], []
        if self._journal is not None:
            for name, number in self._numbers.items():
                if self._journal.record(number) is not None:
                    done.append(name)
                elif self._journal.is_damaged(number):
                    damaged.append(name)
        for name in damaged:
            self._notify(f"the shard of {name} is damaged or gone; the block is quantized again.")
        self._done = set(self.ranks.share(done, 0))

    def _plan_memory(self, bytes_of_one_stream: int) -> None:
        streams = 2 if self._config.carries_float_stream else 1
        dtype = next(iter(self._skeleton.dtypes.values()))
        blocks = [self.model.get_submodule(name) for name in self._blocks]
        largest = max(block_bytes(block, dtype) for block in blocks)
        scalar = self._config.code is CodeKind.SCALAR
        working = 3 * largest + max(rounding_bytes(block, scalar) for block in blocks)
        working += self._expert_bytes()
        if self.device.type == "cpu":
            working += sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.is_meta)
        self._working = working, 2 * largest
        self._plan = plan_memory(
            streams * bytes_of_one_stream, *self._working, self._limits, self.device, self._scratch
        )
        self.float_cache_bytes = self._plan.float_cache_bytes

    def _expert_bytes(self) -> int:
        """Bytes that the second moments of a block's experts take beside those of one linear."""
        sizes = [0]
        for name in self._blocks:
            found = experts.families(self.model, [name])
            inside = {linear.removeprefix(f"{name}."): family for linear, family in found.items()}
            sizes.append(mixture.moment_bytes(self.model.get_submodule(name), inside, self.device))
        return max(sizes)

    def store(self, name: str) -> Activations:
        """A store where the plan has room for it."""
        assert self._plan is not None
        return Activations(self._plan.placement, name)

    @property
    def plan(self) -> MemoryPlan | None:
        """Where activations wait; known once the blocks' order is."""
        return self._plan

    @property
    def resumed(self) -> int:
        """Number of blocks that an earlier run had finished."""
        return len(self._done)

    # --- Results --------------------------------------------------------------------------------------

    def is_done(self, name: str) -> bool:
        """Whether the journal holds the block."""
        return name in self._done

    def restore(self, name: str) -> BlockRecord:
        """Install the block's quantized linears from its shard."""
        data, tensors = None, {}
        if self._journal is not None:
            data = self._journal.record(self._numbers[name])
            assert data is not None
            with checkpoint.open_tensors(self._journal.shards / data["shard"]) as file:
                tensors = {key: file.get_tensor(key) for key in data["keys"]}
        data, tensors = self.ranks.share((data, tensors), 0)
        entry = checkpoint.parse_quantization(data["quantization"])
        for linear, spec in entry.linears.items():
            parts = {part: tensors[f"{linear}.{part}"].to(self.device) for part in storage.layout(spec)}
            bias = tensors.get(f"{linear}.bias")
            dtype = next(self.model.parameters()).dtype
            layer = FrameLinear.from_tensors(
                spec, parts, None if bias is None else bias.to(self.device, dtype)
            )
            self.model.set_submodule(linear, layer)
        return record_of(data)

    def leave(self, name: str, record: BlockRecord | None) -> None:
        """Have the block's shard and record written, on the first rank, and let its tensors go."""
        if record is not None and self._journal is not None:
            number = self._numbers[name]
            block = self.model.get_submodule(name)
            tensors = {
                f"{name}.{key}": self.saved(f"{name}.{key}", t) for key, t in block.state_dict().items()
            }
            specs = {
                f"{name}.{key}": module.spec
                for key, module in block.named_modules()
                if isinstance(module, FrameLinear)
            }
            more = {"quantization": checkpoint.quantization_dict(self._config, specs)}
            self._journal.keep(number, self._shards[number], tensors, record, more)
        self.evict(name)

    def saved(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype in which it is saved: float ones have that of the float model."""
        dtype = self._skeleton.dtypes.get(key)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def write_outside(self) -> None:
        """Write what lies outside the blocks (and blocks that were never called) as the last shard, and the index."""
        if self._journal is None:
            return
        weight_map, size = {}, 0
        for number in self._numbers.values():
            data = self._journal.record(number)
            assert data is not None
            weight_map.update(dict.fromkeys(data["keys"], data["shard"]))
        tensors: dict[str, Tensor] = {}
        specs = {n: m.spec for n, m in self.model.named_modules() if isinstance(m, FrameLinear)}
        state = self.model.state_dict()
        wanted = [
            key for key in state if key not in weight_map and self._skeleton.aliases.get(key) not in state
        ]
        for key in wanted:
            if not state[key].is_meta:
                tensors[key] = self.saved(key, state[key])
        tensors |= dict(self._skeleton.read([key for key in wanted if key not in tensors]))
        tensors |= checkpoint.guard(specs)
        with self._journal.guarded():
            self._journal.write_shard(self._journal.shards / self._shards[-1], tensors)
            weight_map.update(dict.fromkeys(tensors, self._shards[-1]))
            header = checkpoint.read_header([self._journal.shards / shard for shard in self._shards])
            size = sum(checkpoint.tensor_bytes(*value) for value in header.values())
            checkpoint.write_index(self._journal.shards, weight_map, size)

    # --- Gradients ------------------------------------------------------------------------------------

    def gradients(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        names: Sequence[str],
        seed: int,
        inputs: bool,
    ) -> tuple[dict[str, OutputGradients], str]:
        """Gradients of the float model's outputs, block by block; see ``streaming/gradients.py``."""
        if all(self.ranks.gather(self._gradient_files.is_complete)):
            found = self._gradient_files.read(self.device)
        else:
            found = self._run_gradients(batches, names, inputs)
        self._held = found.sums
        self._sensitivities = found.sensitivities if inputs else None
        return found.sums, found.note

    def _run_gradients(self, batches: Sequence[Any], names: Sequence[str], inputs: bool) -> Gathered:
        replay = Replay(self.model, self.chains, batches[0], self.order(self.model, self.chains, batches[0]))
        head = self.head_name()
        if head is not None:
            self.bring_outside(head)
        problem = self._no_gradients(replay)
        problem = next(filter(None, self.ranks.gather(problem)), "")
        plan = self._plan
        try:
            if problem:
                return self._inputs_alone(replay, batches, names, inputs, problem)
            assert plan is not None
            self._plan = self._gradient_plan(len(replay.names) + 2, plan)
            streamed = StreamedPass(
                self.model,
                replay,
                batches,
                self._every_batch,
                self._config,
                self.ranks,
                self.enter,
                self.evict,
                self.store,
                self._gradient_files,
            )
            return streamed.run(names, inputs, all(self.ranks.gather(self._grams_fit(names, inputs))))
        finally:
            self._plan = plan
            if head is not None:
                self._send_away(head)
            clear(self._scratch)

    def _gradient_plan(self, stores: int, plan: MemoryPlan) -> MemoryPlan:
        """Where the outputs of all blocks together have room."""
        one = plan.activation_bytes // (2 if self._config.carries_float_stream else 1)
        return plan_memory(stores * one, *self._working, self._limits, self.device, self._scratch)

    def _grams_fit(self, names: Sequence[str], inputs: bool) -> bool:
        """Whether the second moments of the gradients and inputs of a block's experts fit beside the block."""
        inside = experts.families(self.model, self._blocks).keys() & set(names)
        most = max(
            gram_bytes(self.model, [name for name in inside if name.startswith(f"{block}.")], inputs)
            for block in self._blocks
        )
        return not most or most + self._working[1] + RESERVE[self.device.type] <= self._limits.device

    def _no_gradients(self, replay: Replay) -> str:
        """Why no backward pass can be streamed, or nothing."""
        if len(self.chains) > 1:
            return "gradients cannot be streamed through several chains of blocks"
        assert self._plan is not None
        plan = self._gradient_plan(len(replay.names) + 2, self._plan)
        matrices = gram_bytes(self.model, list(discovery.linears(self.model)), inputs=False)
        needed = matrices + (plan.activation_bytes if plan.placement.place is Place.DISK else 0)
        free = shutil.disk_usage(self._scratch).free
        if needed > free * 9 // 10:
            return (
                f"the outputs of all blocks and their second moments take {needed / 1e9:.1f} GB, and the disk of "
                f"{self._scratch.parent.parent} has {free / 1e9:.1f} GB"
            )
        return ""

    def _inputs_alone(
        self, replay: Replay, batches: Sequence[Any], names: Sequence[str], inputs: bool, problem: str
    ) -> Gathered:
        """What the linears read, from one forward pass: the errors are weighed layer by layer."""
        note = (
            "no backward pass through the float model, so errors are weighed layer by layer and not fed from row to "
            f"row: {problem}."
        )
        files, found = self._gradient_files, Gathered(note=note)
        files.begin()
        if inputs:
            stream = Stream(replay, list(batches), lambda name: self.store(f"inputs-{name}"))
            for index, name in enumerate(replay.names):
                self.enter(name)
                inside = [linear for linear in names if linear.startswith(f"{name}.")]
                self._read_inputs(index, inside, replay, stream, found)
                self.evict(name)
        files.finish(found)
        return found

    def _read_inputs(
        self, index: int, inside: list[str], replay: Replay, stream: Stream, found: Gathered
    ) -> None:
        state = GradientPass(inputs=True)

        def outputs() -> Iterator[Any]:
            for state.number, batch in enumerate(self._batches):
                state.mask = token_mask(batch)
                state.read.clear()
                yield stream.call(index, state.number).run(replay.blocks[index])

        with watched(self.model, inside, state, gradients=False), torch.no_grad():
            stream.advance(index, outputs())
        conclude(self.model, inside, state, found, self._config, self.ranks)

    def sensitivities(self) -> dict[str, float] | None:
        """What ``gradients`` computed beside them."""
        return self._sensitivities

    def _bring_moments(self, name: str) -> None:
        """Map the second moments of a block's output gradients from their file; they are read one by one."""
        if self._held:
            for linear, gram in self._gradient_files.grams(name).items():
                self._held[linear].gram_sum = gram

    def _send_away(self, name: str) -> None:
        module = self.model.get_submodule(name)
        for part, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[part] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextmanager
def _ended_after(block: nn.Module, end: bool) -> Iterator[None]:
    """End a run of the model behind a block, if asked to: what comes after it may not be there."""

    def stop(*_: Any) -> None:
        raise EndOfRunError

    handles = [block.register_forward_hook(stop)] if end else []
    try:
        with suppress(EndOfRunError):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _bound(run: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(*first, *args, **kwargs)
