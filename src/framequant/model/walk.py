"""The algorithm of the paper, over a whole model: block by block on the activations of quantized predecessors.

For each block: trace it, capture what its linears read, quantize them group by group, replace them, and pass on
the outputs of the *quantized* block. Where targets from the float model are wanted, a float copy of the block
runs beside it on the float model's own activations, so two streams are carried from block to block.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from framequant.config import Allocation, FrameQuantConfig, preset
from framequant.errors import DiscoveryError, NumericalError
from framequant.layers import FrameLinear
from framequant.memory import return_freed_memory
from framequant.model import discovery, experts, mixture
from framequant.model.allocation import allocate_bits, at_rate, check_budget
from framequant.model.calibration import as_batches, leading, to_device
from framequant.model.capture import Seen, add_moments, observe, token_mask
from framequant.model.data_free import quantize_data_free
from framequant.model.gradients import OutputGradients
from framequant.model.group_sharing import quantize_shared
from framequant.model.ranks import reduce_moments, require_batches
from framequant.model.remarks import run_warnings
from framequant.model.replay import Call, Replay, as_call, computed_in, inference_mode, short_products
from framequant.model.report import QuantizationReport, environment, linear_report
from framequant.model.residence import Ledger, Residence
from framequant.model.rows import count_rows
from framequant.model.streams import FloatBlock, Stream
from framequant.model.trace import Group, trace_block
from framequant.model.train_ahead import AheadTrainer
from framequant.quantizers.activations import SAMPLE_TOKENS, thinned, with_activation
from framequant.quantizers.budget import Option
from framequant.quantizers.hessian import NOT_FINITE, Moments, all_finite

#: Calibration samples that rounding sees where the blocks to come are trained; more of them train only. Second moments
#: of a million tokens are known well enough, and training gains from every sample that it has not seen yet.
ROUNDING_SAMPLES = 1024


@dataclass(frozen=True)
class Progress:
    """Where a walk stands.

    Attributes:
        done: weights quantized so far.
        total: weights to quantize.
        message: what is being done.
    """

    done: int
    total: int
    message: str


ProgressCallback = Callable[[Progress], None]


def quantize_(
    model: nn.Module,
    calibration: Any = None,
    config: FrameQuantConfig | None = None,
    progress: ProgressCallback | None = None,
) -> QuantizationReport:
    """Quantize a model in place.

    Every selected linear is replaced by a ``FrameLinear``. The model keeps its device, dtype and mode.

    Args:
        model: any module with repeated blocks (transformers, timm, your own), with its weights loaded.
        calibration: batches to run it on, see ``framequant.model.calibration.as_batches``; not used by codes that need
            none (``config.is_data_free``).
        config: settings; the preset ``framequant`` by default.
        progress: called after every group of linears.

    Returns:
        The report; it is also kept on the model for ``save_pretrained``.

    Raises:
        CalibrationError: no calibration data, or of the wrong kind.
        ConfigError: a pattern matches nothing.
        DiscoveryError: the model has no repeated blocks, or they cannot be walked.
        NumericalError: NaN or infinity in weights or activations; the linear is named.
    """
    config = config or preset("framequant")
    if config.is_data_free:
        report = None if progress is None else lambda *values: progress(Progress(*values))
        return quantize_data_free(model, config, report)
    batches = as_batches(calibration, next(model.parameters()).device.type)
    dtype = None if config.walk_dtype is None else getattr(torch, config.walk_dtype)
    with inference_mode(model), computed_in(model, dtype):
        return _Walk(model, batches, config, progress).run()


class _Walk:
    """One walk: what it works on, and the report in the making."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        config: FrameQuantConfig,
        progress: ProgressCallback | None,
        home: Residence | None = None,
    ) -> None:
        reference = next(model.parameters())
        self.model, self.config, self.progress, self.home = model, config, progress, home or Residence()
        self.device, self.dtype = self.home.device or reference.device, reference.dtype
        if batches:
            require_batches(batches, self.home.ranks)
        mine = self.home.ranks.deal(batches)
        self.batches = [to_device(batch, self.device, self.dtype) for batch in mine]
        self.rounding_batches = self.batches
        if config.train_ahead:
            self.rounding_batches = leading(self.batches, config.rounding_samples or ROUNDING_SAMPLES)
        self.masks = [token_mask(batch) for batch in self.rounding_batches]
        self.report = QuantizationReport(
            config.to_dict(),
            environment=environment(str(self.device), str(self.dtype).removeprefix("torch.")),
        )
        self.done = 0
        self.few: dict[str, tuple[int, str]] = {}
        self.samples: dict[str, list[Tensor]] = {}

    def run(self) -> QuantizationReport:
        start = time.perf_counter()
        try:
            with short_products(self.device, self.config.walk_dtype is None):
                self._walk()
        finally:
            release_decoded(self.model)
        self._finish(time.perf_counter() - start)
        return self.report

    def _walk(self) -> None:
        chains = self._begin()
        order = self.home.order(self.model, chains, self.batches[0])
        replay = Replay(self.model, chains, self.batches[0], order)
        quantized = Stream(replay, self.batches, lambda name: self.home.store(f"quantized-{name}"))
        floating = Stream(replay, self.batches, lambda name: self.home.store(f"float-{name}"))
        last = self._last_to_run(replay)
        ahead = self._trainer(replay)
        for index, name in enumerate(replay.names):
            self._pass_block(index, name, replay, quantized, floating, ahead, onward=index < last)
        self._quantize_outside(replay, quantized)

    def _last_to_run(self, replay: Replay) -> int:
        """Position of the last block that is still to be quantized; those before it are run for what it reads."""
        if self._outside(replay):
            return len(replay.names)
        return max((i for i, name in enumerate(replay.names) if not self.home.is_done(name)), default=-1)

    def _trainer(self, replay: Replay) -> AheadTrainer | None:
        steps, rate = self.config.train_ahead, self.config.train_rate
        if not steps:
            return None
        samples, rounding = (sum(map(count_rows, part)) for part in (self.batches, self.rounding_batches))
        self.report.trained_ahead = {
            "steps": steps,
            "rate": rate,
            "samples": samples,
            "rounding_samples": rounding,
            "losses": [],
            "seconds": 0.0,
        }
        return AheadTrainer(self.model, replay, self.batches, steps, rate, self.config.seed)

    def _pass_block(
        self,
        index: int,
        name: str,
        replay: Replay,
        quantized: Stream,
        floating: Stream,
        ahead: AheadTrainer | None,
        onward: bool,
    ) -> None:
        """Quantize a block, or take what an earlier run made of it, and pass on the outputs if they are needed."""
        block, done = replay.blocks[index], self.home.is_done(name)
        carry = self.config.carries_float_stream and (onward or not done)
        original = None
        if onward or not done:
            self.home.enter(name)
            calls = quantized.calls(index)
            rounding_calls = calls[: len(self.rounding_batches)]
            own_stream = carry and index and ahead is None  # what was trained is right for what comes in
            float_calls = floating.calls(index) if own_stream else rounding_calls
            twin = copy.deepcopy(block) if carry else None
            original = None if twin is None else FloatBlock(twin, float_calls, self.home.float_cache_bytes)
        record = None
        if done:
            self._restore_block(name)
        else:
            ledger = Ledger(self.report)
            self._quantize_block(name, block, original, rounding_calls)
            record = ledger.record()
            record.few = {linear: few for linear, few in self.few.items() if linear.startswith(f"{name}.")}
        return_freed_memory()
        if onward:
            quantized.advance(index, (call.run(block) for call in calls))
            if ahead is not None and index + 1 < len(replay.names):
                start = time.perf_counter()
                self.report.trained_ahead["losses"].append(ahead.train(index, quantized))
                self.report.trained_ahead["seconds"] += time.perf_counter() - start
            elif original is not None:
                floating.advance(index, original.outputs())
        release_decoded(block)
        self.home.leave(name, record)

    def _restore_block(self, name: str) -> None:
        record = self.home.restore(name)
        record.add_to(self.report)
        self.few |= record.few
        self.done += sum(entry.num_weights for entry in record.linears)
        for layer in quantized_linears(self.model.get_submodule(name)).values():
            layer.hold_dense(self.dtype)
        if self.progress:
            self.progress(Progress(self.done, self.total, f"{name} (done before)"))

    def _begin(self) -> dict[str, list[str]]:
        """Find blocks and linears, and what needs the whole float model; return the blocks by chain."""
        fused = experts.unfuse_(self.model)
        chains = discovery.find_blocks(self.model)
        blocks = [name for names in chains.values() for name in names]
        self.selected = discovery.select_linears(self.model, blocks, self.config)
        self.routers = set() if self.config.include else experts.routers(self.model, blocks)
        self.selected = [name for name in self.selected if name not in self.routers]
        self.unselected = experts.put_back_unselected(self.model, fused, self.selected)
        self.families = experts.families(self.model, blocks)
        modules = dict(self.model.named_modules())
        self.total = sum(modules[name].weight.numel() for name in self.selected)
        self._describe_model(chains)
        self._prepare()
        return chains

    def _prepare(self) -> None:
        """What needs the whole float model: gradients, and from them the rate of each linear."""
        self.gradients: dict[str, OutputGradients] = {}
        self.choices: dict[str, Option] = {}
        if not self.config.needs_gradients:
            return
        allocate = self.config.shares_bits
        if allocate:
            check_budget(self.model, self.selected, self.config)
        if self.progress:
            self.progress(Progress(0, self.total, "gradients of the float model"))
        self.gradients, note = self.home.gradients(
            self.model,
            self.rounding_batches,
            self.selected,
            self.config.seed,
            inputs=allocate,
        )
        if note:
            self.report.warnings.append(note)
        seen = self.home.ranks.total_counts(mixture.tokens_seen(self.gradients))
        self.gradients |= mixture.pooled_gradients(self.gradients, seen, self.families)
        if allocate:
            use = mixture.expert_shares(seen, self.families)
            known = self.home.sensitivities()
            shares = allocate_bits(self.model, self.selected, self.gradients, self.config, use, known)
            self.choices, self.report.allocation = shares.choices, shares.to_dict()
        for found in self.gradients.values():
            found.input_sum = None
        return_freed_memory()

    def _config_of(self, name: str) -> FrameQuantConfig:
        """Settings of one linear: those of the run, its overrides, and the rate that was chosen for it."""
        config = self.config.for_linear(name) or self.config
        choice = self.choices.get(name)
        if choice is None or self.config.fixes_code(name):
            return replace(config, allocation=Allocation.UNIFORM)
        return at_rate(config, choice.bits, choice.redundancy)

    def _token_weights(self, prefix: str, stage: list[Group]) -> dict[str, list[Tensor]]:
        """Weights of the tokens of each batch for each group, of mean one over the whole calibration set."""
        power = self.config.token_weights
        weights: dict[str, list[Tensor]] = {}
        for group in stage if power else []:
            if group.family:
                continue  # a token of an expert counts as it is, see ``mixture``
            found = [
                self.gradients[prefix + name] for name in group.linears if prefix + name in self.gradients
            ]
            if found and all(len(one.squares) == len(self.rounding_batches) for one in found):
                powered = [
                    sum(one.squares[i] for one in found) ** power for i in range(len(self.rounding_batches))
                ]
                mean = self._mean(torch.cat(powered))
                if 0 < float(mean) < float("inf"):  # no gradient at all: tokens count alike
                    weights[group.name] = [batch / mean for batch in powered]
        return weights

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the values of all ranks."""
        ranks = self.home.ranks
        if ranks.size == 1:
            return values.mean()
        return torch.cat([part.to(values.device) for part in ranks.gather(values.cpu())]).mean()

    def _outside(self, replay: Replay) -> list[str]:
        """Selected linears outside the blocks."""
        prefixes = tuple(f"{block}." for block in replay.names)
        return [name for name in self.selected if not name.startswith(prefixes)]

    def _quantize_outside(self, replay: Replay, stream: Stream) -> None:
        """Quantize linears outside the blocks (heads) that ``include`` names, on what the blocks give them."""
        for name in self._outside(replay):
            if name in self.block_linears:
                self.report.skipped[name] = "its block was not run on the calibration data"
                continue
            self.home.bring_outside(name)
            module = self.model.get_submodule(name)
            group, moments = Group([name]), Moments(discovery.linear_weight(module).shape[1])
            for number, (batch, mask) in enumerate(zip(self.rounding_batches, self.masks, strict=True)):
                with stream.behind_blocks(number):
                    seen = observe(self.model, as_call(batch), [group])
                self._keep_sample("", [group], seen)
                add_moments({name: moments}, [group], seen, None, mask, use_drift=False, use_residual=False)
            untie(self.model, module)
            self._quantize_group("", self.model, group, self._summed(moments))

    def _summed(self, moments: Moments) -> Moments:
        return reduce_moments(moments, self.home.ranks, self.device, self.dtype)

    def _describe_model(self, chains: dict[str, list[str]]) -> None:
        prefixes = tuple(f"{block}." for names in chains.values() for block in names)
        inside = {n: m for n, m in discovery.linears(self.model).items() if n.startswith(prefixes)}
        self.block_linears = set(inside)
        self.stacked = {
            f"{block}.{name}": count
            for names in chains.values()
            for block in names
            for name, count in discovery.stacked_weights(self.model.get_submodule(block)).items()
        }
        self.report.model = {
            "class": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "blocks": sum(len(names) for names in chains.values()),
            "chains": list(chains),
            "block_linear_weights": sum(module.weight.numel() for module in inside.values())
            + sum(self.stacked.values()),
        }

    def _quantize_block(
        self, name: str, block: nn.Module, original: FloatBlock | None, calls: Sequence[Call]
    ) -> None:
        prefix = f"{name}."
        inner = [full.removeprefix(prefix) for full in self.selected if full.startswith(prefix)]
        traced = trace_block(block, calls[0], inner), calls[0].hidden[..., 0].numel()
        groups, tokens = self.home.ranks.share(traced, 0)  # each rank's tokens go to experts of their own
        families = {
            linear: self.families[prefix + linear] for linear in inner if prefix + linear in self.families
        }
        groups = mixture.with_experts(groups, inner, families, tokens)
        called = {linear for group in groups for linear in group.linears}
        for linear in inner:
            if linear not in called:
                self.report.skipped[prefix + linear] = "its forward was not called on the calibration data"
        if original is not None:
            original.remember([group for group in groups if not group.family])
        pools: dict[str, Moments] = {}
        for stage in mixture.stages(groups, block, self.config.recapture):
            moments = self._capture(prefix, block, original, calls, stage)
            for name, tokens in mixture.top_up(moments, stage, pools).items():
                self.few[prefix + name] = tokens, families[name]
            for group in stage:
                self._quantize_group(prefix, block, group, moments[group.name])

    def _capture(
        self,
        prefix: str,
        block: nn.Module,
        original: FloatBlock | None,
        calls: Sequence[Call],
        stage: list[Group],
    ) -> dict[str, Moments]:
        features = {
            group.name: discovery.linear_weight(block.get_submodule(group.name)).shape[1] for group in stage
        }
        totals = {name: Moments(count) for name, count in features.items()}
        weights = self._token_weights(prefix, stage)
        if all(group.family for group in stage):
            original = None
        for number, (call, mask) in enumerate(zip(calls, self.masks, strict=True)):
            seen = observe(block, call, stage)
            self._keep_sample(prefix, stage, seen)
            add_moments(
                totals,
                stage,
                seen,
                None if original is None else original.seen(number, stage),
                mask,
                use_drift=self.config.float_targets > 0,
                use_residual=self.config.residual_targets > 0,
                token_weights={name: batches[number] for name, batches in weights.items()},
                where=(prefix, number),
            )
        return {name: self._summed(moments) for name, moments in totals.items()}

    def _keep_sample(self, prefix: str, stage: list[Group], seen: Seen) -> None:
        """Hold a few inputs of the linears whose activation steps are fitted on them."""
        for group in stage:
            specs = [self._config_of(prefix + linear).activation_spec() for linear in group.linears]
            if any(spec is not None and spec.stored_steps for spec in specs):
                held = self.samples.setdefault(prefix + group.name, [])
                share = -(-SAMPLE_TOKENS // len(self.rounding_batches))
                held.extend(thinned(inputs, share) for inputs in seen.inputs.get(group.name, []))

    def _quantize_group(self, prefix: str, block: nn.Module, group: Group, moments: Moments) -> None:
        start = time.perf_counter()
        modules = {prefix + linear: block.get_submodule(linear) for linear in group.linears}
        moments.residual_sum = {prefix + linear: total for linear, total in moments.residual_sum.items()}
        _require_finite(moments, prefix + group.name)
        weights = {name: discovery.linear_weight(module) for name, module in modules.items()}
        configs = {name: self._config_of(name) for name in modules}
        if self.config.output_feedback:
            moments.output_gram = {
                name: self.gradients[name].gram(self.device)
                for name in modules
                if name in self.gradients and self.gradients[name].gram_sum is not None
            }
        group_name = group.family or prefix + group.name
        return_freed_memory()  # of the activations: rounding takes the most
        results = quantize_shared(weights, moments, configs, group_name, self.home.ranks)
        held = self.samples.pop(prefix + group.name, [])
        sample = self.home.ranks.share(torch.cat(held) if held else None, 0)
        seconds = (time.perf_counter() - start) / len(modules)
        for name, weight in results.items():
            result = with_activation(weight, configs[name].activation_spec(), sample, name)
            layer = FrameLinear.from_tensors(result.spec, result.tensors, modules[name].bias)
            layer.hold_dense(self.dtype)
            self.model.set_submodule(name, layer)
            corrected = name in moments.residual_sum and configs[name].residual_targets > 0
            self.report.linears.append(linear_report(name, result, moments.count, corrected, seconds))
            self.done += result.spec.num_weights
        if self.progress:
            self.progress(Progress(self.done, self.total, prefix + group.name))

    def _finish(self, seconds: float) -> None:
        report = self.report
        if not report.linears:
            raise DiscoveryError(
                "no selected linear was called on the calibration data, so nothing was quantized."
            )
        chosen = {entry.name for entry in report.linears} | set(report.skipped)
        for name in sorted(self.block_linears - chosen):
            report.skipped[name] = (
                "a router" if name in self.routers else "left in float by include, ignore or overrides"
            )
        mixture.warn_of_fallbacks(report, self.few)
        for name in self.stacked:
            report.skipped[name] = (
                "left in float by include, ignore or overrides"
                if name.rpartition(".")[0] in self.unselected
                else "matrices in one parameter that cannot be taken apart into linears"
            )
        report.warnings += run_warnings(report, self.few, self.config.residual_targets > 0)
        report.seconds = seconds
        self.model.framequant_report = report


def release_decoded(module: nn.Module) -> None:
    """Let the quantized linears of a module drop what they hold for the walk."""
    for layer in quantized_linears(module).values():
        layer.hold_dense(None)


def untie(model: nn.Module, head: nn.Module) -> None:
    """Tell a transformers model that its output embedding is no longer the input embedding, if it was."""
    config = getattr(model, "config", None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is head and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _require_finite(moments: Moments, name: str) -> None:
    for total in (moments.hessian_sum, moments.drift_sum, *moments.residual_sum.values()):
        if total is not None and not all_finite(total):
            raise NumericalError(f"{name}: {NOT_FINITE}")


def quantized_linears(model: nn.Module) -> dict[str, FrameLinear]:
    """All quantized linears of a model by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrameLinear)}
