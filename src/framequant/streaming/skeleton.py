"""A transformers model without weights, and the safetensors files that hold them.

Parameters are on the meta device; buffers that no file holds (rotary frequencies, masks) are real. Every key of the
model's state is matched with a key of the files; keys that transformers would convert or fuse on loading have no
counterpart, and such a model is refused: it is quantized in memory.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framequant import checkpoint
from framequant.errors import CheckpointError, ModelSourceError

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

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by key, file by file; each is a view of the mapped file.

        Raises:
            ModelSourceError: a file is damaged.
        """
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.homes[key], []).append(key)
        try:
            for path, some in by_file.items():
                with checkpoint.open_tensors(path) as file:
                    for key in some:
                        yield key, file.get_tensor(key)
        except CheckpointError as error:
            raise ModelSourceError(
                f"{error} Fetch this file of the float model again and run the same command: finished blocks are kept."
            ) from error

    def fingerprint(self) -> str:
        """SHA-256 over all shapes, dtypes and the first bytes of every tensor: milliseconds, whatever the size."""
        digest = hashlib.sha256(json.dumps(sorted(self.header.items())).encode())
        for key in sorted(self.homes):
            path = self.homes[key]
            with checkpoint.open_tensors(path) as file:
                part = file.get_slice(key)
                shape = part.get_shape()
                width = max(SAMPLE_BYTES // 4, 1)
                sample = (
                    part[:1, :width] if len(shape) > 1 else part[:width] if shape else file.get_tensor(key)
                )
                digest.update(sample.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Skeleton:
    """A model on the meta device and where its weights are.

    Attributes:
        model: in evaluation mode.
        files: its weights.
        keys: key in the files of every key of the model's state.
        dtypes: dtype in which each of them is computed and saved.
        aliases: keys of tied tensors, each with the first key that has the tensor.
        name: as the user gave it.
    """

    model: nn.Module
    files: WeightFiles
    keys: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model in the dtype that it is computed in."""
        state = self.model.state_dict()
        return sum(
            state[key].numel() * dtype.itemsize for key, dtype in self.dtypes.items() if key in self.keys
        )

    def read(self, names: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Tensors by their key in the model's state, in their saved dtype, on a device, which casts them."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.keys[name], []).append(name)
        for key, tensor in self.files.read(wanted):
            placed = tensor.to(device)
            for name in wanted[key]:
                yield name, placed.to(self.dtypes[name]) if placed.is_floating_point() else placed


def build_skeleton(directory: Path, dtype: torch.dtype, name: str | None = None) -> Skeleton:
    """Make the model that a transformers directory describes, without its weights.

    Args:
        directory: with ``config.json`` and safetensors.
        dtype: to compute in and to save the rest in.
        name: as the user gave it; the directory if not given.

    Raises:
        ModelSourceError: no safetensors, an unknown class, or tensors that the files hold under other names.
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
    skeleton.keys = _matched(model, state, aliases, files)
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
) -> dict[str, str]:
    """The key in the files of every key of a model's state."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = {**_renamed(model, files), **{key: key for key in files.header}}
    found: dict[str, str] = {}
    for key, tensor in state.items():
        for candidate in (key, prefix + key, key.removeprefix(prefix)):
            original = renamed.get(candidate)
            if original is not None and files.header[original][0] == tuple(tensor.shape):
                found[key] = original
                break
    for key, original in aliases.items():  # files hold a tied tensor under one of its names
        both = found.get(original) or found.get(key)
        if both is not None:
            found[key] = found[original] = both
    missing = sorted(set(state) - set(found))
    if missing:
        raise ModelSourceError(
            f"{files.directory} holds no tensors for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}: they are missing, or fused on loading. Quantize it in memory: --no-stream."
        )
    return found


def _renamed(model: nn.Module, files: WeightFiles) -> dict[str, str]:
    """Keys of the files by the names that transformers gives them on loading, where it only renames."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        changes = [c for c in get_model_conversion_mapping(model) if not getattr(c, "operations", None)]
        names = {}
        for key in files.header:
            name = key
            for change in changes:
                name = change.rename_source_key(name)[0]
            names[name] = key
    except (ImportError, TypeError, AttributeError):
        return {}  # another version of transformers: names are taken as they are
    return names
