"""Checks of what a checkpoint claims, made before anything of the claimed size is built.

``config.json`` holds numbers that a library turns into modules, tables and tensors long before a file is compared with
them. Here they are held against the headers of the files, whose size is real: no more layers than there are tensors,
no class more than the widest tensor has rows, no tensor of another shape. Whatever a checkpoint says, memory stays a
small multiple of its size on disk plus ``SPARE_BYTES``.

Must not import checkpoint or integrations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framequant.errors import CheckpointError

#: Shape and safetensors dtype of every tensor by key.
Header = dict[str, tuple[tuple[int, ...], str]]

#: Bytes that a model may hold beside what its checkpoint holds: rotary tables, masks, heads that are not loaded.
SPARE_BYTES = 1 << 30
#: Larger integers are no size of a model: positions, vocabularies and widths are below.
MAX_INTEGER = 1 << 24

_MODULES = re.compile(r"layers?$|depths?$|^n_layer|num_blocks$|experts$")
_ROWS = re.compile(r"num_labels$|num_classes$")
_NUMBERS = re.compile(r"theta|base|scale|factor|seed|eps")
_SIZES = re.compile(r"num_|heads|size|dim|layers|depth|length|groups|width")
_ATTENTION = re.compile(r"attn_implementation|experts_implementation")
_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_config(config: Mapping[str, Any], header: Header) -> None:
    """Check the numbers of a config against the files, and that it names no code.

    Args:
        config: parsed ``config.json``; its ``quantization_config`` is checked elsewhere.
        header: of all files.

    Raises:
        CheckpointError: a count is larger than the files can hold, or a value names code to fetch; the key is named.
    """
    tensors = len(header)
    widest = max((size for shape, _ in header.values() for size in shape), default=0)
    for path, key, value in _values(config):
        where = f"config.json: {path} = {str(value)[:40]}"
        if _ATTENTION.search(key) and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{where} names code of another repository; a checkpoint runs none.")
        if isinstance(value, bool) or not isinstance(value, int) or _NUMBERS.search(key):
            continue
        if _MODULES.search(key) and value > max(tensors, widest if "expert" in key else 0):
            raise CheckpointError(f"{where}, but the checkpoint has only {tensors} tensors.")
        if _ROWS.search(key) and value > max(widest, 2):
            raise CheckpointError(f"{where}, but no tensor of the checkpoint has so many rows.")
        if value < 0 and _SIZES.search(key):
            raise CheckpointError(f"{where}: a size is never negative.")
        if abs(value) > MAX_INTEGER:
            raise CheckpointError(f"{where}: no number of a model is larger than {MAX_INTEGER}.")


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, innermost key and value of everything in a config that is no container."""
    pending: list[tuple[str, str, Any]] = [
        (str(key), str(key), value) for key, value in config.items() if key != "quantization_config"
    ]
    while pending:
        path, key, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(f"{path}.{inner}", str(inner), part) for inner, part in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}[{number}]", key, part) for number, part in enumerate(value)]
        else:
            yield path, key, value


def check_skeleton(model: nn.Module, header: Header, linears: Iterable[str]) -> None:
    """Check the tensors of an empty model against the files before memory is asked for.

    Args:
        model: the skeleton, most often on the meta device.
        header: of all files.
        linears: names of the quantized linears, whose tensors are checked against their specs elsewhere.

    Raises:
        CheckpointError: a tensor has another shape or kind of dtype, or what the files do not hold is too large.
    """
    owners = set(linears)
    stored = sum(math.prod(shape) for shape, _ in header.values())
    missing: list[tuple[int, str]] = []
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, tensor in tensors.items():
        if key.rpartition(".")[0] in owners and not key.endswith(".bias"):
            continue
        if key not in header:
            missing.append((tensor.numel() * tensor.element_size(), key))
            continue
        shape, dtype = header[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{key}: the model has shape {tuple(tensor.shape)}, the checkpoint {shape}."
            )
        if tensor.is_floating_point() != (dtype in _FLOATS):
            raise CheckpointError(f"{key}: the model holds {tensor.dtype}, the checkpoint {dtype}.")
    total = sum(size for size, _ in missing)
    if total > SPARE_BYTES + 8 * stored:
        raise CheckpointError(
            f"the model that config.json describes holds {total} bytes that the checkpoint does not, most of them in "
            f"{max(missing)[1]}; one of its sizes is wrong."
        )


def check_finite(key: str, tensor: Tensor) -> None:
    """Check that scales and the like are finite.

    Raises:
        CheckpointError: one is not; the key is named.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{key} holds NaN or infinity; the file is damaged.")
