"""What a streamed run has finished: a directory beside the output, from which an interrupted run goes on.

``OUT.partial`` holds::

    run.json                 fingerprints of settings, model and calibration data
    blocks/00007.json        for each finished block its shard, its SHA-256, its specs and its report
    output/                  the shards; in the end everything of the checkpoint, then renamed to OUT
    gradients-0/, scratch/   second moments of output gradients of a rank; activations that do not fit elsewhere

A file is written under another name, flushed to the disk and renamed; the shard before its record. So whatever
moment a run is killed at, a record that exists tells the truth, and all else is done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from framequant import checkpoint
from framequant.errors import CheckpointError, ConfigError
from framequant.model.report import LinearReport
from framequant.model.residence import BlockRecord
from framequant.streaming import durable

RUN_NAME = "run.json"
JOURNAL_VERSION = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


def partial_path(output: Path) -> Path:
    """Where the journal of a run that writes ``output`` lies."""
    return output.with_name(f"{output.name}.partial")


class Journal:
    """The journal of one run; use as a context manager, which locks it.

    Args:
        output: the final directory.
        identity: what must not change between a run and its continuation, JSON-ready.
        overwrite: whether ``output`` may be replaced.

    Raises:
        CheckpointError: the output is not writable or not empty, or another run works on it.
        ConfigError: the journal belongs to a run of other settings, model or data; the difference is shown.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        self.output = Path(output).expanduser().absolute()
        self.path = partial_path(self.output)
        self.identity, self._overwrite = json.loads(json.dumps(identity)), overwrite
        self._lock: Any = None
        self._writer, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)

    @property
    def shards(self) -> Path:
        """Where the shards are written."""
        return self.path / "output"

    @property
    def was_finished(self) -> bool:
        """Whether the output was renamed already, and only the journal's own files are left."""
        return (
            (self.path / RUN_NAME).is_file()
            and not self.shards.exists()
            and checkpoint.is_checkpoint(self.output)
        )

    def __enter__(self) -> Journal:
        try:
            with self.guarded():
                self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # a block that is being written is kept, whatever ended the run
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        if not (self.path / RUN_NAME).is_file():
            checkpoint.prepare_output(self.output, self._overwrite)
        _clear(self._removed)  # of a run that was killed while it removed its journal
        self.path.mkdir(exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another run is writing {self.output}; wait for it or end it.") from error
        if (self.path / RUN_NAME).is_file():
            self._compare()
        if self.was_finished:
            return
        checkpoint.prepare_output(self.output, self._overwrite)
        for name in ("blocks", "output", "scratch"):
            (self.path / name).mkdir(exist_ok=True)
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink()
        if not (self.path / RUN_NAME).is_file():
            self._write(self.path / RUN_NAME, {"version": JOURNAL_VERSION, **self.identity})

    def _compare(self) -> None:
        before = self._read(self.path / RUN_NAME)
        now = {"version": JOURNAL_VERSION, **self.identity}
        differences = list(_differences("", before, now))
        if differences:
            raise ConfigError(
                f"{self.path} belongs to a run that differs from this one: {'; '.join(differences)}. Run the first "
                f"command again to go on with it, or delete {self.path} to begin anew."
            )

    def record(self, number: int) -> dict[str, Any] | None:
        """What was kept of a block, or None; its shard is checked against its SHA-256."""
        self.settle()
        path = self.path / "blocks" / f"{number:05d}.json"
        if not path.is_file():
            return None
        data: dict[str, Any] = self._read(path)
        shard = self.shards / data["shard"]
        return data if shard.is_file() and sha256(shard) == data["sha256"] else None

    def is_damaged(self, number: int) -> bool:
        """Whether a block was finished once, but its shard is no longer what was written."""
        return (self.path / "blocks" / f"{number:05d}.json").is_file() and self.record(number) is None

    def keep(
        self,
        number: int,
        shard: str,
        tensors: Mapping[str, Tensor],
        record: BlockRecord,
        more: Mapping[str, Any],
    ) -> None:
        """Write the shard of a block and then its record, while the run goes on; the block before it is done first.

        Args:
            number: of the block.
            shard: name of its file.
            tensors: nobody may change them until ``settle``.
            record: what the report says of it.
            more: of the checkpoint's description.

        Raises:
            CheckpointError: the block before could not be written; what was finished before that is kept.
        """
        self.settle()
        held = {key: tensor.detach().to("cpu") for key, tensor in tensors.items()}
        data = {"shard": shard, "keys": sorted(held), **more, **asdict(record)}
        self._writing = self._writer.submit(self._keep, number, held, data)

    def settle(self) -> None:
        """Wait until all that was to be kept is on the disk.

        Raises:
            CheckpointError: the disk is full or not writable; what was finished before is kept.
        """
        self._writing.result()

    def _keep(self, number: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        with self.guarded():
            path = self.shards / data["shard"]
            self.write_shard(path, tensors)
            self._write(self.path / "blocks" / f"{number:05d}.json", {**data, "sha256": sha256(path)})

    def write_shard(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file durably."""
        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(held, str(temporary), metadata={"format": "pt"})
        except SafetensorError as error:
            full = shutil.disk_usage(path.parent).free < sum(
                t.numel() * t.element_size() for t in held.values()
            )
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
        durable.rename(temporary, path)

    def finish(self) -> None:
        """Give the output its final name, all at once, and remove the journal.

        Raises:
            CheckpointError: the output appeared in the meantime, or cannot be renamed.
        """
        with self.guarded():
            for path in self.shards.iterdir():
                if path.is_file():
                    durable.flush(path)
            durable.flush(self.shards)
            checkpoint.swap(self.shards, checkpoint.prepare_output(self.output, self._overwrite))
            durable.flush(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the journal: its fingerprints last, so that a run killed here is still recognised as finished.

        Those and the directory cannot go at once, so they get another name first, which no run takes for a journal.
        """
        for path in self.path.iterdir():
            if path.name not in (RUN_NAME, "lock"):
                shutil.rmtree(path, ignore_errors=True)
        _clear(self._removed)
        os.replace(self.path, self._removed)
        _clear(self._removed)

    @property
    def _removed(self) -> Path:
        return self.path.with_name(f"{self.path.name}.removed")

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn errors of the file system into messages that say what to do."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
            raise CheckpointError(
                f"writing {self.path} failed: {reason}. What was finished is kept there; "
                f"{'free some space' if error.errno in _FULL else 'mend this'} and run the same command to go on."
            ) from error

    def _write(self, path: Path, data: Any) -> None:
        durable.write_text(path, json.dumps(data, indent=1))

    def _read(self, path: Path) -> Any:
        return checkpoint.read_json(path)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def record_of(data: Mapping[str, Any]) -> BlockRecord:
    """The report of a block, from what the journal kept."""
    few = {name: (tokens, family) for name, (tokens, family) in data["few"].items()}
    linears = [LinearReport(**entry) for entry in data["linears"]]
    return BlockRecord(linears, data["skipped"], data["warnings"], few)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(where: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            yield from _differences(f"{where}.{key}".lstrip("."), before.get(key), now.get(key))
    elif before != now:
        yield f"{where} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
