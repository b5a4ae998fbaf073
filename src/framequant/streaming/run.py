"""Quantize a model from disk to disk: the walk, on blocks that come and go.

The codes are those that ``quantize_`` chooses in memory, bit for bit; the shards are other ones, a file for each
block and one for what lies outside the blocks.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import framequant
from framequant import checkpoint
from framequant.config import FrameQuantConfig, preset
from framequant.errors import CheckpointError, ConfigError
from framequant.layers import FrameLinear
from framequant.memory import capped
from framequant.model.activations import map_tensors
from framequant.model.calibration import as_batches, as_samples, collate
from framequant.model.ranks import Ranks
from framequant.model.replay import computed_in, inference_mode
from framequant.model.report import QuantizationReport
from framequant.model.walk import ProgressCallback, _Walk
from framequant.pretrained import read_report, write_description
from framequant.streaming.journal import Journal, partial_path
from framequant.streaming.plan import memory_limits
from framequant.streaming.residence import StreamedResidence
from framequant.streaming.skeleton import Skeleton, build_skeleton


@dataclass
class StreamedRun:
    """What a streamed run used, for benchmarks and messages.

    Attributes:
        report: as ``quantize_`` gives it.
        place: where activations waited between two blocks.
        resumed: blocks that an earlier run had finished.
        notes: remarks for the user.
    """

    report: QuantizationReport
    place: str = ""
    resumed: int = 0
    notes: list[str] = field(default_factory=list)


def quantize_streaming(
    source: str | Path | Skeleton,
    directory: str | Path,
    calibration: Any,
    config: FrameQuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    max_memory: str | int | Mapping[str, str | int] | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    ranks: Ranks | None = None,
    progress: ProgressCallback | None = None,
) -> StreamedRun:
    """Quantize a model that need not fit into memory, block by block, and go on where an earlier run was ended.

    Weights of one block at a time are read, quantized and written. ``DIRECTORY.partial`` holds what is finished; the
    same call continues from it, also after the process was killed, and ends with the same bytes. ``directory``
    appears when all is done.

    Args:
        source: a transformers directory with safetensors, or what ``build_skeleton`` made of one.
        directory: where to write; must not exist or be empty unless ``overwrite``.
        calibration: as for ``quantize_``.
        config: settings; the preset ``framequant`` by default.
        dtype: to compute in, and to save the rest in.
        device: that computes.
        max_memory: of the host, or by "cpu" and "cuda": numbers of bytes or sizes like "8GB". What is free if not
            given. It decides where activations wait between two blocks: on the device, in host memory or on disk.
        overwrite: replace what lies in ``directory``.
        tokenizer: anything with ``save_pretrained``, saved beside the model.
        ranks: the processes that share the work, see ``framequant.model.ranks``; this one alone by default.
        progress: called after every group of linears.

    Returns:
        The report and how the run went.

    Raises:
        CalibrationError: no calibration data, of the wrong kind, or fewer batches than ranks.
        CheckpointError: the output cannot be written; what was finished is kept.
        ConfigError: Sigma-Delta codes or training ahead; or the settings, model or data are not those of the run to
            go on with.
        DiscoveryError: the model has no repeated blocks, or they cannot be walked.
        ModelSourceError: no safetensors, a damaged file, or tensors that transformers fuses on loading.
        NumericalError: NaN or infinity in weights or activations; the linear is named.
        RankLostError: another process died.
    """
    config = config or preset("framequant")
    if config.is_data_free:
        raise ConfigError("Sigma-Delta codes take one linear at a time and are not streamed; use quantize_.")
    if config.train_ahead:
        raise ConfigError(
            f"train_ahead = {config.train_ahead} trains the blocks to come, and a streamed model has one block in "
            "memory. Leave it out, or quantize in memory."
        )
    ranks, place = ranks or Ranks(), torch.device(device)
    skeleton = source if isinstance(source, Skeleton) else build_skeleton(Path(source), dtype)
    batches = enough_batches(as_batches(calibration, place.type), ranks.size)
    identity = identity_of(skeleton, batches, config, place)
    with _journal(Path(directory), identity, overwrite, ranks) as journal:
        if _all(ranks, journal is not None and journal.was_finished):
            return _finished(journal, Path(directory), ranks)
        run = _Run(skeleton, config, place, ranks, journal, Path(directory))
        return run(batches, max_memory, tokenizer, progress)


class _Run:
    """One streamed run, from the skeleton to the renamed directory."""

    def __init__(
        self,
        skeleton: Skeleton,
        config: FrameQuantConfig,
        device: torch.device,
        ranks: Ranks,
        journal: Journal | None,
        directory: Path,
    ) -> None:
        self.skeleton, self.config, self.ranks = skeleton, config, ranks
        self.device, self.journal, self.directory = device, journal, directory
        self.notes: list[str] = []

    def __call__(
        self, batches: list[Any], max_memory: Any, tokenizer: Any, progress: ProgressCallback | None
    ) -> StreamedRun:
        model = self.skeleton.model
        scratch = self._scratch()
        limits = memory_limits(max_memory, self.device)
        home = StreamedResidence(
            self.skeleton,
            self.journal,
            self.config,
            self.device,
            limits,
            self.ranks,
            scratch,
            self.notes.append,
        )
        home.load_outside()
        home.watch(batches)
        dtype = None if self.config.walk_dtype is None else getattr(torch, self.config.walk_dtype)
        with inference_mode(model), computed_in(model, dtype), capped(self.device, limits.cap):
            report = _Walk(model, batches, self.config, progress, home).run()
        self.ranks.barrier()
        home.write_outside()
        if self.journal is not None:
            with self.journal.guarded():
                self._describe(report, tokenizer)
            self.journal.finish()
        self._tidy_up(scratch)
        self.ranks.barrier()
        place = home.plan.placement.place.value if home.plan else ""
        return StreamedRun(report, place, home.resumed, self.notes)

    def _scratch(self) -> Path:
        path = partial_path(self.directory.expanduser().absolute()) / "scratch" / str(self.ranks.rank)
        self.ranks.barrier()
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _tidy_up(self, scratch: Path) -> None:
        """Remove what this rank put beside the output, on a machine where the first rank does not."""
        if self.ranks.is_first:
            return
        partial = scratch.parent.parent
        for path in (scratch, partial / f"gradients-{self.ranks.rank}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (scratch.parent, partial):
            with suppress(OSError):  # the first rank's files are there, or it has removed them already
                path.rmdir()

    def _describe(self, report: QuantizationReport, tokenizer: Any) -> None:
        assert self.journal is not None
        linears = {n: m.spec for n, m in self.skeleton.model.named_modules() if isinstance(m, FrameLinear)}
        config = FrameQuantConfig.from_dict(report.config)
        data = checkpoint.quantization_dict(config, linears)
        write_description(
            self.skeleton.model, self.journal.shards, data, report, tokenizer, self.skeleton.name or None
        )
        checkpoint.write_checksums(self.journal.shards)


@contextmanager
def _journal(
    directory: Path, identity: Mapping[str, Any], overwrite: bool, ranks: Ranks
) -> Iterator[Journal | None]:
    """The journal on the first rank, None on others; an error there is raised on every rank."""
    if not ranks.is_first:
        problem = ranks.share(None, 0)
        if problem is not None:
            raise CheckpointError(f"the first rank refused: {problem}")
        yield None
        return
    journal = Journal(directory, identity, overwrite)
    try:
        journal.__enter__()
    except Exception as error:
        ranks.share(str(error), 0)
        raise
    ranks.share(None, 0)
    try:
        yield journal
    finally:
        journal.__exit__()


def _all(ranks: Ranks, finished: bool) -> bool:
    return bool(ranks.share(finished if ranks.is_first else None, 0))


def _finished(journal: Journal | None, directory: Path, ranks: Ranks) -> StreamedRun:
    """A run that was killed after its output had its name: nothing is left to do but to tidy up."""
    if journal is not None:
        journal.remove()
    ranks.barrier()
    report = read_report(directory.expanduser())
    assert report is not None
    return StreamedRun(report, notes=["an earlier run had finished; only its journal was left to remove."])


def enough_batches(batches: list[Any], count: int) -> list[Any]:
    """At least ``count`` batches, where there are as many samples: the set is cut into smaller ones if need be."""
    if len(batches) >= count:
        return batches
    samples = as_samples(batches)
    size = max(len(samples) // count, 1)
    return [collate(samples[first : first + size]) for first in range(0, len(samples), size)]


def identity_of(
    skeleton: Skeleton, batches: list[Any], config: FrameQuantConfig, device: torch.device
) -> dict[str, Any]:
    """What a run and its continuation must have in common; JSON-ready."""
    return {
        "config": config.to_dict(),
        "model": {
            "class": type(skeleton.model).__name__,
            "settings": hashlib.sha256(str(skeleton.model.config.to_dict()).encode()).hexdigest(),
            "tensors": skeleton.files.fingerprint(),
            "dtype": str(next(iter(skeleton.dtypes.values()))),
        },
        "calibration": {"batches": len(batches), "sha256": data_fingerprint(batches)},
        "device": device.type,
        "versions": {"framequant": framequant.__version__, **_versions("torch", "transformers")},
    }


def _versions(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def data_fingerprint(batches: list[Any]) -> str:
    """SHA-256 over every tensor of the calibration batches, shapes and dtypes included."""
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    for batch in batches:
        map_tensors(batch, add)
    return digest.hexdigest()
