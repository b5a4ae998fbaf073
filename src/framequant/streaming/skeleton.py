"""A transformers model without weights, and the safetensors files that hold them.

Parameters are on the meta device; buffers that no file holds (rotary frequencies, masks) are real. Every key of the
model's state, and of its fused experts taken apart, is known as pieces of tensors in the files
(``streaming/conversion.py``). A model some of whose tensors are not is refused: it is quantized in memory.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framequant import checkpoint
from framequant.errors import CheckpointError, ModelSourceError
from framequant.model.experts import find_fused
from framequant.streaming import pieces
from framequant.streaming.conversion import convert
from framequant.streaming.pieces import Piece, Stored

#: Bytes read from the beginning of each tensor for the fingerprint.
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a float model.

    Attributes:
        directory: where they lie.
        header: shape and dtype of every tensor.
        homes: the file of every tensor.
    """

    directory: Path
    header: checkpoint.Header
    homes: dict[str, Path]

    @classmethod
    def open(cls, directory: Path) -> WeightFiles:
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

    def read(self, wanted: Iterable[Piece], place: torch.device | str) -> Iterator[tuple[Piece, Tensor]]:
        """Tensors on a device, in the order of the files; on a CPU those stored whole are views of the mapped file.

        Raises:
            ModelSourceError: a file is damaged.
        """
        by_files: dict[tuple[Path, ...], list[Piece]] = {}
        for piece in wanted:
            by_files.setdefault(tuple(sorted({self.homes[key] for key in pieces.keys(piece)})), []).append(
                piece
            )
        try:
            for paths in sorted(by_files):
                with ExitStack() as stack:
                    files = {path: stack.enter_context(checkpoint.open_tensors(path)) for path in paths}
                    for piece in by_files[paths]:
                        yield (
                            piece,
                            pieces.read(piece, lambda part, files=files: self._part(files, part).to(place)),
                        )
        except CheckpointError as error:
            raise ModelSourceError(
                f"{error} Fetch this file of the float model again and run the same command: finished blocks are kept."
            ) from error

    def _part(self, files: Mapping[Path, Any], part: Stored) -> Tensor:
        file = files[self.homes[part.key]]
        return file.get_tensor(part.key) if part.is_whole else file.get_slice(part.key)[part.index]

    def fingerprint(self) -> str:
        """SHA-256 over all shapes, dtypes and the first bytes of every tensor: milliseconds, whatever the size."""
        digest = hashlib.sha256(json.dumps(sorted(self.header.items())).encode())
        for key in sorted(self.homes):
            path = self.homes[key]
            with checkpoint.open_tensors(path) as file:
                part = file.get_slice(key)
                shape = part.get_shape()
                width = max(SAMPLE_BYTES // 4, 1)
                if len(shape) == 3:  # a stack: something of every matrix
                    sample = part[:, :1, :width]
                elif shape:
                    sample = part[:1, :width] if len(shape) > 1 else part[:width]
                else:
                    sample = file.get_tensor(key)
                digest.update(sample.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Skeleton:
    """A model on the meta device and where its weights are.

    Attributes:
        model: in evaluation mode.
        files: its weights.
        pieces: what every key of the model's state is made of, with its experts fused and with them taken apart.
        dtypes: dtype in which each of them is computed and saved.
        aliases: keys of tied tensors, each with the first key that has the tensor.
        name: as the user gave it.
    """

    model: nn.Module
    files: WeightFiles
    pieces: dict[str, Piece] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model in the dtype that it is computed in."""
        state = self.model.state_dict()
        return sum(state[key].numel() * self.dtypes[key].itemsize for key in state if key in self.pieces)

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Tensors by their key in the model's state, in their saved dtype, on a device, which casts them."""
        wanted: dict[Piece, list[str]] = {}
        for name in names:
            wanted.setdefault(self.pieces[name], []).append(name)
        for piece, placed in self.files.read(wanted, device):
            for name in wanted[piece]:
                yield name, placed.to(self.dtypes[name]) if placed.is_floating_point() else placed


def build_skeleton(directory: Path, dtype: torch.dtype, name: str | None = None) -> Skeleton:
    """Make the model that a transformers directory describes, without its weights.

    Args:
        directory: with ``config.json`` and safetensors.
        dtype: to compute in and to save the rest in.
        name: as the user gave it; the directory if not given.

    Raises:
        ModelSourceError: no safetensors, an unknown class, tensors that are missing, of another shape, or made in a way
            that is not understood.
    """
    files = WeightFiles.open(directory)
    model = _empty_model(directory, dtype)
    state = dict(model.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    aliases = {}
    for key, tensor in state.items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    skeleton = Skeleton(model, files, aliases=aliases, name=name or str(directory))
    skeleton.dtypes = {key: tensor.dtype for key, tensor in state.items()}
    skeleton.pieces = _matched(model, state, aliases, files)
    _add_experts(skeleton)
    return skeleton


def _empty_model(directory: Path, dtype: torch.dtype) -> nn.Module:
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ModelSourceError(f"{directory}: transformers cannot read its config.json: {error}") from error
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        raise ModelSourceError(
            f"{directory}/config.json: architectures {names!r} names no class of transformers."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelSourceError(f"{directory} is already quantized; give the float model.")
    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    model.tie_weights()
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _matched(
    model: nn.Module, state: dict[str, Any], aliases: dict[str, str], files: WeightFiles
) -> dict[str, Piece]:
    """What every key of a model's state is made of."""
    made = convert(model, state, files.header)
    found = {key: made.pieces[key] for key in state if key in made.pieces}
    for key, original in aliases.items():  # files hold a tied tensor under one of its names
        both = found.get(original) or found.get(key)
        if both is not None:
            found[key] = found[original] = both
    missing = sorted(set(state) - set(found))
    if missing:
        unknown = sorted({how for key in missing if (how := made.unknown.get(key))})
        raise ModelSourceError(
            f"{files.directory} holds no tensors for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}: they are missing, or made on loading"
            f"{' by ' + '; '.join(unknown) if unknown else ''} in a way that is not known here. Quantize it in "
            "memory: --no-stream."
        )
    for key, piece in found.items():
        if piece.shape != tuple(state[key].shape):
            raise ModelSourceError(
                f"{files.directory}: {next(pieces.keys(piece))} is there for a {key} of shape {piece.shape}, and the "
                f"{type(model).__name__} of config.json has {tuple(state[key].shape)}. Fetch the float model again."
            )
    return found


def _add_experts(skeleton: Skeleton) -> None:
    """Add the linears that fused experts are taken apart into, under the names that ``UnfusedExperts`` gives them."""
    for path, layout in find_fused(skeleton.model).items():
        for name, transposed in layout.items():
            whole = skeleton.pieces[f"{path}.{name}"]
            for number in range(whole.shape[0]):
                one = pieces.select(whole, 0, number)
                key = f"{path}.{number}.{name}.weight"
                skeleton.pieces[key] = pieces.transpose(one, 0, 1) if transposed else one
                skeleton.dtypes[key] = skeleton.dtypes[f"{path}.{name}"]
