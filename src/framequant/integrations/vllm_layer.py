"""What a linear layer of vLLM holds and computes: one or more quantized linears, whole or one rank's shard of them.

Plain modules and functions of tensors, without vLLM: ``integrations/vllm.py`` puts them behind vLLM's classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from framequant import storage
from framequant.errors import CheckpointError, ConfigError
from framequant.integrations import tensor_parallel
from framequant.integrations.tensor_parallel import Gather
from framequant.kernels import reference
from framequant.layers import FrameLinear
from framequant.spec import LinearSpec


class Division(StrEnum):
    """How a layer is divided among ranks: not, by its outputs, or by its inputs (outputs are then summed)."""

    WHOLE = "whole"
    OUTPUTS = "outputs"
    INPUTS = "inputs"


@dataclass(frozen=True)
class Partition:
    """This rank's part of a layer.

    Attributes:
        division: of what.
        output_sizes: outputs of each of the layer's linears on this rank.
        rank: 0 … ranks - 1.
        ranks: that the layer is divided among.
    """

    division: Division
    output_sizes: tuple[int, ...]
    rank: int = 0
    ranks: int = 1


def find_partition(
    specs: dict[str, LinearSpec], input_here: int, outputs_here: list[int], rank: int, ranks: int
) -> Partition:
    """Tell from a layer's shapes what this rank has of it.

    Args:
        specs: the layer's linears, whole, by their names in the checkpoint.
        input_here: inputs of the layer on this rank.
        outputs_here: outputs on this rank, of each of the linears.
        rank: of the layer's group, 0 … ranks - 1.
        ranks: number of ranks of the group.

    Raises:
        ConfigError: a code holds its bias, which vLLM keeps itself.
        CheckpointError: the checkpoint's shapes fit no division.
    """
    first = next(iter(specs))
    if any(storage.holds_bias(spec) for spec in specs.values()):
        raise ConfigError(
            f"{first}: its code holds the bias, which vLLM keeps itself; use quantize_bias = false."
        )
    inputs = {spec.in_features for spec in specs.values()}
    outputs = [spec.out_features for spec in specs.values()]
    sizes = tuple(outputs_here)
    fused_on_disk = len(outputs) == 1 and outputs[0] == sum(outputs_here)
    if inputs == {input_here} and (outputs == outputs_here or fused_on_disk):
        return Partition(Division.WHOLE, sizes)
    if inputs == {input_here * ranks} and outputs == outputs_here:
        return Partition(Division.INPUTS, sizes, rank, ranks)
    fits = len(sizes) == len(outputs) and all(
        here <= whole and here * ranks % whole == 0 for here, whole in zip(sizes, outputs, strict=True)
    )
    if inputs == {input_here} and fits and ranks > 1:
        return Partition(Division.OUTPUTS, sizes, rank, ranks)
    shapes = [(spec.in_features, spec.out_features) for spec in specs.values()]
    raise CheckpointError(
        f"{first}: the checkpoint has {shapes}, vLLM {input_here} × {outputs_here} on each of {ranks} ranks."
    )


class FusedParts(nn.Module):
    """The quantized linears that one layer of vLLM stands for; their outputs lie side by side.

    Args:
        specs: the linears, whole, by their names in the checkpoint.
        partition: which part of them this rank has.
        gather: joins the ranks' tensors along the last axis; only called where the layer is divided.

    Raises:
        ConfigError: a linear has too few rows for so many ranks.
    """

    def __init__(self, specs: dict[str, LinearSpec], partition: Partition, gather: Gather) -> None:
        super().__init__()
        self.specs, self.partition, self.gather = specs, partition, gather
        self.names = list(specs)
        self.shards = [
            tensor_parallel.divide(spec, partition.rank, partition.ranks) for spec in specs.values()
        ]
        whole = partition.division is Division.WHOLE
        self.parts = nn.ModuleList(
            FrameLinear(spec if whole else tensor_parallel.shard_spec(spec, shard))
            for spec, shard in zip(specs.values(), self.shards, strict=True)
        )
        self.loaded: list[set[str]] = [set() for _ in self.names]
        # A shard has no output frame; whole linears, without tensors, bring it.
        self._frames = [FrameLinear(spec, device="meta").frames for spec in specs.values()]

    def load(self, number: int, name: str, tensor: Tensor) -> None:
        """Copy this rank's part of a stored tensor of one linear.

        Args:
            number: position of the linear in the layer.
            name: of the stored tensor.
            tensor: as it stands in the checkpoint, whole.

        Raises:
            CheckpointError: the linear has no such tensor, or one of another shape or dtype.
        """
        owner = self.names[number]
        spec = self.specs[owner]
        expected = storage.layout(spec).get(name)
        if expected != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(
                f"{owner}.{name}: {tensor.dtype} {tuple(tensor.shape)} does not fit its scheme."
            )
        own = tensor_parallel.shard_tensor(spec, self.shards[number], name, tensor)
        self.parts[number].tensors[name].copy_(own)
        self.loaded[number].add(name)

    def check_loaded(self) -> None:
        """Check that every stored tensor came.

        Raises:
            CheckpointError: one did not; it is named.
        """
        for name, part, loaded in zip(self.names, self.parts, self.loaded, strict=True):
            missing = sorted(set(part.tensors) - loaded)
            if missing:
                raise CheckpointError(f"{name}.{missing[0]} is missing from the checkpoint.")

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply all linears; those with equal input frames share one transform of the input.

        Args:
            inputs: (…, in) or this rank's slice of it, as the layer is divided.

        Returns:
            (…, out) of all linears, side by side; this rank's slices, or its terms of a sum, as the layer is divided.
        """
        division = self.partition.division
        rows = self._products(self.gather(inputs) if division is Division.INPUTS else inputs)
        if division is Division.INPUTS:
            rows = [
                tensor_parallel.zero_other_rows(shard, own)
                for shard, own in zip(self.shards, rows, strict=True)
            ]
        elif division is Division.OUTPUTS:
            rows = tensor_parallel.gather_rows(self.shards, rows, self.gather)
        outputs = [
            reference.synthesis(frame_out, row)
            for (_, frame_out), row in zip(self._frames, rows, strict=True)
        ]
        if division is Division.OUTPUTS:
            rank, ranks, sizes = self.partition.rank, self.partition.ranks, self.partition.output_sizes
            outputs = [
                tensor_parallel.own_features(output, size, rank, ranks)
                for output, size in zip(outputs, sizes, strict=True)
            ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _products(self, inputs: Tensor) -> list[Tensor]:
        """This rank's rows of ``D̃ T_in x``, for each linear."""
        transformed: dict[Any, Tensor] = {}
        products = []
        for part, (frame_in, _) in zip(self.parts, self._frames, strict=True):
            key = part.spec.frame_in, part.spec.activation  # steps of linears that share an input are equal
            if key not in transformed:
                transformed[key] = reference.coefficients(part.spec, part.tensors, frame_in, inputs)
            products.append(reference.product(transformed[key], part.spec, part.tensors))
        return products
