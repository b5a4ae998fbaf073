"""Where a model's blocks are while the walk works on them: the seam for models larger than the machine.

The walk says when it enters a block, and when it is done with it. ``Residence`` is a model that is in memory all
the time, quantized by one process: every method does nothing. ``streaming/residence.py`` reads a block's weights
when it is entered, and writes and frees them when it is left.

Must not import layers or quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from framequant.model.activations import Activations
from framequant.model.gradients import OutputGradients, gradients_or_inputs
from framequant.model.ranks import Ranks
from framequant.model.report import LinearReport, QuantizationReport


@dataclass
class BlockRecord:
    """What quantizing one block added to the report.

    Attributes:
        linears: entries of its linears.
        skipped: its linears that stayed float, with the reason.
        warnings: remarks.
        few: of experts' linears that saw few tokens, these tokens and their family.
    """

    linears: list[LinearReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    few: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add_to(self, report: QuantizationReport) -> None:
        """Add the record to a report."""
        report.linears.extend(self.linears)
        report.skipped.update(self.skipped)
        report.warnings.extend(self.warnings)


class Ledger:
    """Tells what was added to a report since the ledger was opened."""

    def __init__(self, report: QuantizationReport) -> None:
        self._report = report
        self._linears, self._warnings = len(report.linears), len(report.warnings)
        self._skipped = set(report.skipped)

    def record(self) -> BlockRecord:
        """What was added."""
        report = self._report
        skipped = {name: why for name, why in report.skipped.items() if name not in self._skipped}
        return BlockRecord(report.linears[self._linears :], skipped, report.warnings[self._warnings :])


class Residence:
    """A model that is in memory all the time.

    Attributes:
        ranks: the processes that share the work.
        device: where blocks are computed; None for where the model is.
        float_cache_bytes: of a float block's activations that may be kept; None for what suits the device.
    """

    ranks: Ranks = Ranks()
    device: torch.device | None = None
    float_cache_bytes: int | None = None

    def order(self, model: nn.Module, chains: Mapping[str, Sequence[str]], batch: Any) -> list[str] | None:
        """Block names in the order in which they run; None where running the model shows it."""
        return None

    def is_done(self, name: str) -> bool:
        """Whether an earlier run quantized a block already."""
        return False

    def enter(self, name: str) -> None:
        """Bring a block's float weights."""

    def restore(self, name: str) -> BlockRecord:
        """Install what an earlier run made of a block; ``enter`` came before."""
        raise NotImplementedError

    def leave(self, name: str, record: BlockRecord | None) -> None:
        """Keep a block's results, and let its tensors go; no record if an earlier run kept them."""

    def bring_outside(self, name: str) -> None:
        """Bring the weight of a linear outside the blocks."""

    def store(self, name: str) -> Activations:
        """A store for the outputs of one block after another."""
        return Activations(name=name)

    def gradients(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        names: Sequence[str],
        seed: int,
        inputs: bool,
    ) -> tuple[dict[str, OutputGradients], str]:
        """Gradients of the float model's outputs; see ``gradients_or_inputs``."""
        return gradients_or_inputs(model, batches, names, seed, inputs)

    def sensitivities(self) -> dict[str, float] | None:
        """Sensitivities of linears, where ``gradients`` has computed them on its way."""
        return None
