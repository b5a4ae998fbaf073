"""``framequant quantize`` block by block from disk to disk: when the model does not fit, when asked, under torchrun."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from framequant.cli.console import Reporter
from framequant.cli.console import size as in_words
from framequant.cli.inputs import CalibrationSource, calibration_tensor
from framequant.errors import ConfigError, ModelSourceError

if TYPE_CHECKING:
    from framequant.config import FrameQuantConfig
    from framequant.evaluation.mix import Mix
    from framequant.model.ranks import Ranks
    from framequant.streaming.skeleton import Skeleton


#: What differs from a run in memory.
GENERATES_NOTHING = (
    "a streamed model writes no calibration windows itself; in memory, --generated 0 takes the same."
)


@dataclass(frozen=True)
class Streaming:
    """A decision to stream.

    Attributes:
        name: of the model, as the user gave it.
        directory: with its safetensors; or a GGUF file.
        dtype: as ``--dtype`` has it.
        device: that computes; of rank 0 under torchrun.
        max_memory: as ``--max-memory`` has it.
        reason: why, in words.
    """

    name: str
    directory: Path
    dtype: str
    device: str
    max_memory: str | None
    reason: str

    def quantize(
        self,
        config: FrameQuantConfig,
        out: Path,
        calibration: CalibrationSource,
        samples: int | None,
        sequence_length: int | None,
        mix: Mix,
        overwrite: bool,
        as_json: bool,
    ) -> None:
        """Quantize, save and print what was done; every rank of a distributed run calls it."""
        from framequant.cli.quantize import conclude, describe_calibration
        from framequant.integrations.gguf import gguf_tokenizer
        from framequant.integrations.sources import DTYPES, OpenedModel, add_processors
        from framequant.streaming.skeleton import build_skeleton

        device, ranks = join_ranks(self.device)
        reporter = Reporter(as_json or not ranks.is_first)
        reporter.err.print(f"  streaming from {self.directory}: {self.reason}", soft_wrap=True)
        skeleton = build_skeleton(self.directory, DTYPES[self.dtype], self.name)
        opened = OpenedModel(skeleton.model, "transformers", self.name, self.directory)
        if self.directory.suffix.lower() == ".gguf":
            opened.tokenizer = gguf_tokenizer(self.directory)
        else:
            add_processors(opened, str(self.directory), self.directory)
        parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
        with reporter.stage("reading the calibration data"):
            data = calibration_tensor(
                calibration,
                opened,
                samples,
                sequence_length,
                config.seed,
                reporter,
                replace(mix, generated=0, continued=0),
            )
        reporter.err.print(f"  {describe_calibration(data)}")
        if getattr(data, "ndim", 0) == 2:
            reporter.notice(GENERATES_NOTHING)
        try:
            run = self._run(skeleton, data, config, out, device, ranks, overwrite, opened.processor, reporter)
        except KeyboardInterrupt:
            reporter.err.print(f"[bold red]interrupted:[/] finished blocks are kept in {out}.partial; "
                               "run the same command to go on.")  # fmt: skip
            raise typer.Exit(130) from None
        for note in run.notes:
            reporter.notice(note)
        if run.resumed:
            reporter.err.print(f"  {run.resumed} blocks were finished by an earlier run")
        if ranks.is_first:
            conclude(run.report, opened, out, parameters, data, reporter)
        leave_ranks(ranks)

    def _run(
        self,
        skeleton: Skeleton,
        data: Any,
        config: FrameQuantConfig,
        out: Path,
        device: str,
        ranks: Ranks,
        overwrite: bool,
        processor: Any,
        reporter: Reporter,
    ) -> Any:
        from framequant.streaming.run import quantize_streaming

        with reporter.bar("quantizing", "weights") as update:
            return quantize_streaming(
                skeleton,
                out,
                data,
                config,
                device=device,
                max_memory=self.max_memory,
                overwrite=overwrite,
                tokenizer=processor,
                ranks=ranks,
                progress=lambda progress: update(progress.done, progress.total, progress.message),
            )


def choose_streaming(
    name: str,
    wanted: bool | None,
    max_memory: str | None,
    dtype: str,
    device: str,
    config: FrameQuantConfig,
) -> Streaming | None:
    """Whether to stream a model, and from where.

    Args:
        name: of the model.
        wanted: what ``--stream`` or ``--no-stream`` says, or None.
        max_memory: what ``--max-memory`` says, or None.
        dtype: of the run.
        device: of the run.
        config: Sigma-Delta codes are never streamed.

    Raises:
        ConfigError: ``--no-stream`` under torchrun, or ``--stream`` with Sigma-Delta codes.
        ModelSourceError: asked for, and the model has no safetensors of transformers.
    """
    import torch

    from framequant.streaming.plan import fits_in_memory, memory_limits

    many = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is False and many > 1:
        raise ConfigError(f"--no-stream with {many} processes: several processes always stream.")
    limits = memory_limits(max_memory, torch.device(device))  # a wrong size is refused whatever follows
    asked = wanted is True or many > 1
    if wanted is False or (config.is_data_free and not asked):
        return None
    if config.is_data_free:
        raise ConfigError(
            "Sigma-Delta codes take one linear at a time and are not streamed; leave --stream out."
        )
    directory = source_directory(name, asked)
    if directory is None:
        return None
    if asked:
        reason = f"{many} processes" if many > 1 else "--stream"
        return Streaming(name, directory, dtype, device, max_memory, reason)
    if fits_in_memory(_most_bytes(directory, dtype), limits, torch.device(device)):
        return None
    size = float_bytes(directory, dtype)
    if size is None or fits_in_memory(size, limits, torch.device(device)):
        return None
    room = min(limits.host, limits.device)
    reason = f"its {in_words(size)} do not fit into {in_words(room)} with what quantizing takes"
    return Streaming(name, directory, dtype, device, max_memory, reason)


def source_directory(name: str, required: bool) -> Path | None:
    """The directory of a model's safetensors, or its GGUF file, or None where there is neither.

    Raises:
        ModelSourceError: there is none, and it is required.
    """
    from framequant.integrations.packages import PACKAGED_MODELS

    path = PACKAGED_MODELS[name].locate() if name in PACKAGED_MODELS else Path(name).expanduser()
    if not path.exists() and required and not name.startswith("timm/") and path.suffix != ".gguf":
        path = _from_hub(name)
    if _is_transformers_directory(path) or (path.suffix.lower() == ".gguf" and path.is_file()):
        return path
    if not required:
        return None
    raise ModelSourceError(
        f"{name} cannot be streamed: only transformers models in safetensors or GGUF files are. Save it once with "
        "save_pretrained of transformers, or quantize it in memory (--no-stream)."
    )


def _is_transformers_directory(path: Path) -> bool:
    from framequant.integrations.sources import is_framequant_directory

    config = path / "config.json"
    if not config.is_file() or not any(path.glob("*.safetensors")) or is_framequant_directory(path):
        return False
    return '"model_type"' in config.read_text(encoding="utf-8")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:  # whatever the hub's client raises offline, or for names that do not exist
        reason = str(error).strip().splitlines()[0]
        raise ModelSourceError(f"no directory {name!r} here, and the hub answers: {reason}") from error


def float_bytes(path: Path, dtype: str) -> int | None:
    """Bytes that a model's tensors take in a dtype; None where the headers cannot be read."""
    import math

    from framequant.errors import FrameQuantError
    from framequant.integrations.sources import DTYPES
    from framequant.streaming.files import SafetensorsFiles

    size = DTYPES.get(dtype, DTYPES["auto"]).itemsize
    if path.suffix.lower() == ".gguf":
        return _gguf_weights(path) * size
    with suppress(FrameQuantError):
        header = SafetensorsFiles.open(path).header
        return sum(math.prod(shape) for shape, _ in header.values()) * size
    return None


def _most_bytes(path: Path, dtype: str) -> int:
    """More bytes than a GGUF file's tensors take in a dtype, from its size alone: parsing a header takes seconds."""
    from framequant.integrations.sources import DTYPES

    if path.suffix.lower() != ".gguf":
        return 1 << 62
    least_bits = 1.5  # of any code in use
    return int(path.stat().st_size * 8 / least_bits) * DTYPES.get(dtype, DTYPES["auto"]).itemsize


def _gguf_weights(path: Path) -> int:
    """Number of weights in a GGUF file; 0 for one that is damaged, which whoever opens it will say."""
    with suppress(ImportError, ValueError, IndexError, OSError):
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    return 0


def join_ranks(device: str) -> tuple[str, Ranks]:
    """This process's device, and who shares its work: the processes that torchrun started, or it alone."""
    import torch

    from framequant.model.ranks import DistributedRanks, Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, Ranks()
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    return device, DistributedRanks(torch.device(device))


def leave_ranks(ranks: Ranks) -> None:
    """End the process group, once all are done."""
    if ranks.size > 1:
        import torch.distributed as dist

        ranks.barrier()
        dist.destroy_process_group()
