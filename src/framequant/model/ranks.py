"""The processes that share a walk, through ``torch.distributed``: sums over all, results of one for all.

``Ranks`` alone is one process, for which everything is the identity. ``DistributedRanks`` speaks gloo on CPUs and
NCCL on GPUs; every method is a collective: all ranks call it, in the same order. Calibration batches are dealt out
in turn, so sums over batches have another order than in one process, and with it other last bits.

Must not import layers.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from framequant.errors import CalibrationError, FrameQuantError
from framequant.quantizers.hessian import Moments, accumulation_dtype

T = TypeVar("T")

#: How long the survivors of a failed collective wait to hear from each other, in seconds.
ROLL_CALL_SECONDS = 5.0
#: How long a collective waits for a rank that is late: one rank may write a large shard meanwhile.
TIMEOUT = timedelta(minutes=30)


class RankLostError(FrameQuantError):
    """Another process of a distributed run has died or cannot be reached; the message names it."""


class Ranks:
    """One process alone."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def deal(self, batches: Sequence[T]) -> list[T]:
        """This rank's share of the calibration batches: every ``size``-th."""
        return list(batches)[self.rank :: self.size]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All rows, of which the ranks hold so many each, one after the other."""
        return rows

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the ranks."""
        return values

    def add_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in order of the ranks; between our own processes only."""
        return [value]

    def share(self, value: Any, owner: int) -> Any:
        """The owner's value, tensors and all, on every rank; others give None."""
        return value

    def barrier(self) -> None:
        """Wait for all."""

    def total_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Sums of numbers by name over the ranks; a name that a rank lacks counts as zero there."""
        total: Counter[str] = Counter()
        for some in self.gather(dict(counts)):
            total.update(some)
        return dict(total)


def reduce_moments(moments: Moments, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Moments:
    """Sum second moments over the ranks, in place; what a rank has not seen counts as zero."""
    if ranks.size == 1:
        return moments
    kinds = ranks.gather(
        (
            moments.count,
            moments.hessian_sum is not None,
            moments.drift_sum is not None,
            any(t is not None and t.dtype == torch.float64 for t in (moments.hessian_sum, moments.drift_sum)),
            {name: tuple(total.shape) for name, total in moments.residual_sum.items()},
        )
    )
    moments.count = sum(count for count, *_ in kinds)
    square, wide = (moments.features, moments.features), accumulation_dtype(dtype)
    if any(double for *_, double, _ in kinds):
        wide = torch.float64

    def total(value: Tensor | None, shape: Sequence[int]) -> Tensor:
        found = torch.zeros(*shape, dtype=wide, device=device) if value is None else value.to(wide)
        return ranks.add_(found.contiguous())

    if any(seen for _, seen, *_ in kinds):
        moments.hessian_sum = total(moments.hessian_sum, square)
    if any(seen for _, _, seen, *_ in kinds):
        moments.drift_sum = total(moments.drift_sum, square)
    shapes = {name: shape for *_, residuals in kinds for name, shape in residuals.items()}
    for name in sorted(shapes):
        moments.residual_sum[name] = total(moments.residual_sum.get(name), shapes[name])
    return moments


class DistributedRanks(Ranks):
    """The processes that ``torchrun`` started.

    Args:
        device: where this rank computes; its kind chooses the backend.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist, self._device = dist, device
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._store = dist.distributed_c10d._get_default_store()
        self._store.set(f"framequant/host/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._calls = 0

    def _collective(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (RuntimeError, ConnectionError) as error:
            raise RankLostError(self._roll_call(error)) from error

    def _roll_call(self, error: BaseException) -> str:
        """Ask who is still there, and name the others."""
        missing = []
        try:
            self._store.set(f"framequant/alive/{self.rank}", "1")
            time.sleep(ROLL_CALL_SECONDS)
            for rank in range(self.size):
                if not self._store.check([f"framequant/alive/{rank}"]):
                    where = self._store.get(f"framequant/host/{rank}").decode()
                    missing.append(f"rank {rank} ({where})")
        except (RuntimeError, ConnectionError):
            missing.append("the rank that holds the rendezvous")
        reason = str(error).strip().splitlines()[0]
        who = ", ".join(missing) or "a rank"
        return (
            f"{who} died or cannot be reached, so rank {self.rank} stops. Finished blocks are kept: run the same "
            f"command to go on. ({reason})"
        )

    def add_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        self._collective(lambda: self._dist.all_reduce(tensor))
        return tensor

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the ranks."""
        return tuple(self.add_(torch.tensor(values, dtype=torch.float64)).tolist())

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All rows, of which the ranks hold so many each, one after the other."""
        whole = rows.new_empty(sum(counts), *rows.shape[1:])
        parts = list(whole.split(list(counts)))
        parts[self.rank].copy_(rows)
        for owner, part in enumerate(parts):
            self._send(part, owner)
        return whole

    def _send(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor with contiguous rows by the owner's."""
        if tensor.numel():
            self._collective(lambda: self._dist.broadcast(tensor.view(torch.uint8), src=owner))

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in order of the ranks."""
        values: list[Any] = [None] * self.size
        self._collective(lambda: self._dist.all_gather_object(values, value))
        return values

    def share(self, value: Any, owner: int) -> Any:
        """The owner's value, tensors and all, on every rank; tensors arrive on this rank's device."""
        from framequant.model.activations import map_tensors

        held: list[Tensor] = []

        def shape_of(tensor: Tensor) -> Tensor:
            held.append(tensor.detach().to(self._device).contiguous())
            return torch.empty_like(held[-1], device="meta")

        box = [map_tensors(value, shape_of) if self.rank == owner else None]
        self._collective(lambda: self._dist.broadcast_object_list(box, src=owner))
        sent = iter(held)

        def filled(shape: Tensor) -> Tensor:
            place = next(sent) if self.rank == owner else torch.empty_like(shape, device=self._device)
            self._send(place.flatten(), owner)
            return place

        return map_tensors(box[0], filled)

    def barrier(self) -> None:
        """Wait for all."""
        self.add_(torch.zeros(1))


def require_batches(batches: Sequence[Any], ranks: Ranks) -> None:
    """Check that every rank gets a batch.

    Raises:
        CalibrationError: there are fewer batches than ranks.
    """
    if len(batches) < ranks.size:
        raise CalibrationError(
            f"{len(batches)} calibration batches cannot be dealt out to {ranks.size} ranks; give more samples or start "
            "fewer processes."
        )


def split_evenly(weights: Mapping[str, int], count: int) -> list[list[str]]:
    """Deal names out so that the sums of their weights are about equal: the largest first, to whom has least."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(weights, key=lambda key: (-weights[key], key)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += weights[name]
    return shares
