"""Where a float model's tensors are: safetensors files, or one GGUF file, read tensor by tensor.

A GGUF tensor is dequantized when it is read, and put into transformers' order of rows by transformers' own code; so
its names and shapes here are those of a safetensors file that ``save_pretrained`` would have written of it.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framequant import checkpoint
from framequant.errors import CheckpointError, ModelSourceError
from framequant.streaming import pieces
from framequant.streaming.pieces import Piece, Stored

#: Bytes read from the beginning of each tensor for the fingerprint.
SAMPLE_BYTES = 4096

Fetch = Callable[[Stored], Tensor]


@dataclass(frozen=True)
class WeightFiles(ABC):
    """The files of a float model.

    Attributes:
        path: the directory, or the file.
        header: shape and dtype of every tensor.
        homes: the file of every tensor.
    """

    path: Path
    header: checkpoint.Header
    homes: dict[str, Path]

    @abstractmethod
    def opened(self, files: Iterable[Path]) -> Any:
        """A context manager of a function that reads parts of tensors in these files, mapped where possible."""

    @abstractmethod
    def samples(self) -> Iterator[bytes]:
        """The first bytes of every tensor, in order of the keys."""

    def read(self, wanted: Iterable[Piece], place: torch.device | str) -> Iterator[tuple[Piece, Tensor]]:
        """Tensors on a device, in the order of the files; those that are stored whole may be views of the mapped file.

        Raises:
            ModelSourceError: a file is damaged.
        """
        by_files: dict[tuple[Path, ...], list[Piece]] = {}
        for piece in wanted:
            homes = {self.homes[key] for key in pieces.keys(piece)}
            by_files.setdefault(tuple(sorted(homes)), []).append(piece)
        try:
            for files in sorted(by_files):
                with self.opened(files) as fetch:
                    for piece in by_files[files]:
                        yield piece, pieces.read(piece, lambda part, fetch=fetch: fetch(part).to(place))
        except CheckpointError as error:
            raise ModelSourceError(
                f"{error} Fetch this file of the float model again and run the same command: finished blocks are kept."
            ) from error

    def fingerprint(self) -> str:
        """SHA-256 over all shapes, dtypes and the first bytes of every tensor: milliseconds, whatever the size."""
        digest = hashlib.sha256(json.dumps(sorted(self.header.items())).encode())
        for sample in self.samples():
            digest.update(sample)
        return digest.hexdigest()


class SafetensorsFiles(WeightFiles):
    """Safetensors files of a directory."""

    @classmethod
    def open(cls, directory: Path) -> SafetensorsFiles:
        """Read the headers.

        Raises:
            ModelSourceError: no safetensors here, or one is damaged.
        """
        try:
            files = checkpoint.weight_files(directory)
            header = checkpoint.read_header(files)
            homes = {}
            for path in files:
                with checkpoint.open_tensors(path) as file:
                    homes.update(dict.fromkeys(file.keys(), path))
        except CheckpointError as error:
            raise ModelSourceError(f"{directory} cannot be streamed: {error}") from error
        return cls(directory, header, homes)

    @contextmanager
    def opened(self, files: Iterable[Path]) -> Iterator[Fetch]:
        """See ``WeightFiles``; of a tensor in a file no more is read than the part."""
        with ExitStack() as stack:
            found = {path: stack.enter_context(checkpoint.open_tensors(path)) for path in files}

            def fetch(part: Stored) -> Tensor:
                file = found[self.homes[part.key]]
                if part.is_whole:
                    return file.get_tensor(part.key)  # type: ignore[no-any-return]
                return file.get_slice(part.key)[part.index]  # type: ignore[no-any-return]

            yield fetch

    def samples(self) -> Iterator[bytes]:
        """See ``WeightFiles``; of a stack something of every matrix."""
        width = SAMPLE_BYTES // 4
        for key in sorted(self.homes):
            with checkpoint.open_tensors(self.homes[key]) as file:
                part = file.get_slice(key)
                dimensions = len(part.get_shape())
                if dimensions == 3:
                    sample = part[:, :1, :width]
                elif dimensions:
                    sample = part[:1, :width] if dimensions > 1 else part[:width]
                else:
                    sample = file.get_tensor(key)
                yield sample.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class GgufFiles(WeightFiles):
    """One GGUF file; keys are transformers'.

    Attributes:
        tensors: of the file that a tensor is made of, by the name that transformers gives it; a stack of experts'
            joined matrices (gate and up) is made of several.
        names: transformers' name for every name in the file.
        processor: transformers' code that undoes what llama.cpp does to this architecture's tensors.
    """

    tensors: dict[str, list[Any]]
    names: dict[str, str]
    processor: Any

    @classmethod
    def open(cls, path: Path, model: nn.Module) -> GgufFiles:
        """Read the header; tensors stay in the file.

        Args:
            path: the file.
            model: that it holds, without its weights.

        Raises:
            ModelSourceError: transformers reads this architecture in another way.
        """
        import gguf
        from transformers import modeling_gguf_pytorch_utils as legacy

        reader = gguf.GGUFReader(str(path))
        kind = str(legacy.read_field(reader, "general.architecture")[0])
        if kind in _converted_architectures():
            raise ModelSourceError(
                f"{path}: GGUF files of the architecture {kind} are not streamed. Stream the model's safetensors, or "
                "quantize this file in memory: --no-stream."
            )
        make = legacy.TENSOR_PROCESSORS.get(kind, legacy.TensorProcessor)
        processor = make(config=legacy.load_gguf_checkpoint(str(path))["config"])
        names = legacy.get_gguf_hf_weights_map(model, processor)
        files = cls(path, {}, {}, {}, names, processor)
        for tensor in reader.tensors:
            files._add(tensor)
        return files

    def _add(self, tensor: Any) -> None:
        """Note what a tensor of the file is, from zeros that take no memory; of a stack, from one matrix."""
        shape = tuple(int(size) for size in reversed(tensor.shape))
        stacked = len(shape) > 2
        blank = np.broadcast_to(np.float32(0), (1, *shape[1:]) if stacked else shape)
        found = self._convert([tensor], [blank])
        if found is None:
            return
        key, made = found
        if stacked and (made.ndim != len(shape) or len(made) != 1):
            raise ModelSourceError(
                f"{self.path}: {tensor.name} is no stack of experts' matrices, and is not streamed. Stream the model's "
                "safetensors, or quantize this file in memory: --no-stream."
            )
        self.tensors[key] = [*self.tensors.get(key, []), tensor] if stacked else [tensor]
        self.header[key] = ((shape[0], *made.shape[1:]) if stacked else tuple(made.shape)), "F32"
        self.homes[key] = self.path

    def _convert(self, tensors: Sequence[Any], values: Sequence[np.ndarray]) -> tuple[str, np.ndarray] | None:
        """Tensors' values under transformers' name and in its order, or None for those that it does not use."""
        more: dict[str, Any] = {"tensors": {}}
        for tensor, value in zip(tensors, values, strict=True):
            found = self.processor.process(
                weights=value, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters=more
            )
            if found.name is not None:
                return (self.names[found.name], found.weights) if found.name in self.names else None
        return next(((key, np.asarray(value)) for key, value in more["tensors"].items()), None)

    @contextmanager
    def opened(self, files: Iterable[Path]) -> Iterator[Fetch]:
        """See ``WeightFiles``; a matrix is dequantized whole, and kept until another is read."""
        import gguf

        last: dict[tuple[str, Any], Tensor] = {}

        def fetch(part: Stored) -> Tensor:
            stacked = len(part.whole) > 2
            first, *rest = part.index
            entries = first if isinstance(first, slice) else slice(first, first + 1)
            which = part.key, (entries.start, entries.stop) if stacked else None
            if which not in last:
                last.clear()
                some = self.tensors[part.key]
                data = [tensor.data[entries] if stacked else tensor.data for tensor in some]
                values = [gguf.dequantize(d, t.tensor_type) for d, t in zip(data, some, strict=True)]
                found = self._convert(some, values)
                assert found is not None
                last[which] = torch.from_numpy(np.copy(found[1]))
            if not stacked:
                return last[which][part.index]
            return last[which][(slice(None) if isinstance(first, slice) else 0, *rest)]

        yield fetch

    def samples(self) -> Iterator[bytes]:
        """See ``WeightFiles``; as the file holds them."""
        for key in sorted(self.tensors):
            for tensor in self.tensors[key]:
                yield tensor.data.reshape(-1)[: SAMPLE_BYTES // 4].tobytes()


def _converted_architectures() -> Iterable[str]:
    """GGUF architectures that transformers loads by weight conversions of their own."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return ()
    return tuple(GGUF_ARCHS)
