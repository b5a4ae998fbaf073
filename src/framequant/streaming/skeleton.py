"""A transformers model without weights, and the files that hold them.

Parameters are on the meta device; buffers that no file holds (rotary frequencies, masks) are real. Every key of the
model's state, and of its fused experts taken apart, is known as pieces of tensors in the files
(``streaming/conversion.py``). A model some of whose tensors are not is refused: it is quantized in memory.

Must not import evaluation or the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import ModelSourceError
from framequant.integrations import gguf
from framequant.model.experts import find_fused
from framequant.streaming import pieces
from framequant.streaming.conversion import convert
from framequant.streaming.files import GgufFiles, SafetensorsFiles, WeightFiles
from framequant.streaming.pieces import Piece


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


def build_skeleton(source: Path, dtype: torch.dtype, name: str | None = None) -> Skeleton:
    """Make the model that a transformers directory or a GGUF file describes, without its weights.

    Args:
        source: a directory with ``config.json`` and safetensors, or a GGUF file of a causal language model.
        dtype: to compute in and to save the rest in.
        name: as the user gave it; ``source`` if not given.

    Raises:
        ModelSourceError: no safetensors, an unknown class, tensors that are missing, of another shape, or made in a way
            that is not understood.
    """
    files: WeightFiles
    if source.suffix.lower() == ".gguf":
        with gguf.reading(source) as place:
            model = _model_of_gguf(place, dtype)
            files = GgufFiles.open(source, model)
    else:
        files = SafetensorsFiles.open(source)
        model = _model_of_directory(source, dtype)
    state = dict(model.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    aliases = {}
    for key, tensor in state.items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    skeleton = Skeleton(model, files, aliases=aliases, name=name or str(source))
    skeleton.dtypes = {key: tensor.dtype for key, tensor in state.items()}
    skeleton.pieces = _matched(model, state, aliases, files)
    _add_experts(skeleton)
    return skeleton


def _model_of_directory(directory: Path, dtype: torch.dtype) -> nn.Module:
    import transformers

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
    model = _empty(kind, config, dtype)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def _model_of_gguf(place: dict[str, str], dtype: torch.dtype) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(**place)
    model = _empty(transformers.AutoModelForCausalLM._model_mapping[type(config)], config, dtype)
    gguf.forget_quantization(model)
    return model


def _empty(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a transformers class on the meta device; buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=dtype)
    model.tie_weights()
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
            f"{files.path} holds no tensors for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}: they are missing, or made on loading"
            f"{' by ' + '; '.join(unknown) if unknown else ''} in a way that is not known here. Quantize it in "
            "memory: --no-stream."
        )
    for key, piece in found.items():
        if piece.shape != tuple(state[key].shape):
            raise ModelSourceError(
                f"{files.path}: {next(pieces.keys(piece))} is there for a {key} of shape {piece.shape}, and the "
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
