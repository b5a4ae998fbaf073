"""The file format: sharded safetensors beside a ``config.json`` that says what the bytes mean.

A checkpoint is a directory::

    config.json                    the model's own config plus "quantization_config"
    model.safetensors              or model-00001-of-0000N.safetensors and model.safetensors.index.json
    framequant_checksums.json      CRC-32 of every tensor and of every key of config.json
    framequant_report.json         what the run did
    README.md                      model card

``quantization_config`` holds the settings, the *schemes* (``LinearSpec`` without seeds, each written once) and
for every quantized linear the number of its scheme and its two sign seeds. No pickle, no code. The directory
is written under a temporary name and renamed when complete, so a half-written checkpoint never has the final
name. Reading trusts nothing: every key, shape, dtype and number is checked before memory is asked for.

Must not import integrations or transformers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from framequant import integrity, storage
from framequant.config import FrameQuantConfig
from framequant.errors import CheckpointError, FrameQuantError
from framequant.layers import FrameLinear
from framequant.model.discovery import is_linear, linear_weight
from framequant.model.experts import is_expert, unfuse_
from framequant.model.report import config_entry
from framequant.spec import LinearSpec
from framequant.untrusted import Header, check_finite, check_skeleton

FORMAT_VERSION = 1
QUANT_METHOD = "framequant"
CONFIG_NAME = "config.json"
REPORT_NAME = "framequant_report.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 1024**3
#: A config larger than this is refused unread; 70B-shaped models need about 60 kB.
MAX_CONFIG_BYTES = 64 * 1024**2

_SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class QuantizationEntry:
    """The parsed ``quantization_config``.

    Attributes:
        config: settings of the run.
        linears: spec of every quantized linear by module name.
        aliases: keys of tied tensors that are not stored, with the key that is.
    """

    config: FrameQuantConfig
    linears: dict[str, LinearSpec]
    aliases: dict[str, str]


def guard(linears: Mapping[str, LinearSpec]) -> dict[str, Tensor]:
    """An empty tensor under the float weight's name of the linear that is first in the alphabet, experts last.

    transformers without framequant skips a ``quant_method`` that it does not know and fills the missing weights
    with random numbers; a weight of the wrong shape is an error there. Readers of ours pass it over. Weights named
    as an expert's are renamed by transformers before it looks at them.
    """
    names = sorted(linears, key=lambda name: (is_expert(name), name))
    return {f"{name}.weight": torch.empty(0, dtype=torch.uint8) for name in names[:1]}


def is_guard(part: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a quantized linear is the one that ``guard`` makes."""
    return part == "weight" and shape == (0,)


def quantization_dict(
    config: FrameQuantConfig, linears: Mapping[str, LinearSpec], aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON form of ``quantization_config``; ``parse_quantization`` inverts it."""
    schemes: list[LinearSpec] = []
    numbers: dict[LinearSpec, int] = {}
    entries: dict[str, list[int]] = {}
    for name, spec in linears.items():
        scheme = spec.scheme()
        if scheme not in numbers:
            numbers[scheme] = len(schemes)
            schemes.append(scheme)
        entries.update(config_entry(name, spec, numbers[scheme]))
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "schemes": [scheme.to_dict() for scheme in schemes],
        "linears": entries,
        **({"aliases": dict(aliases)} if aliases else {}),
    }


def parse_quantization(data: Any) -> QuantizationEntry:
    """Read ``quantization_config``.

    Raises:
        CheckpointError: it is not ours, of another format version, or a field is wrong; the key is named.
    """
    if not isinstance(data, Mapping) or data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"quantization_config: quant_method is not {QUANT_METHOD!r}.")
    version = data.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "Upgrade framequant: pip install -U framequant." if newer else "Quantize the model again."
        raise CheckpointError(
            f"quantization_config.format_version is {version!r}; this framequant reads {FORMAT_VERSION}. {advice}"
        )
    for key, kind in (("config", Mapping), ("schemes", list), ("linears", Mapping)):
        if not isinstance(data.get(key), kind):
            raise CheckpointError(f"quantization_config.{key} is missing or of the wrong type.")
    schemes = [
        LinearSpec.from_dict(scheme, f"quantization_config.schemes[{number}]")
        for number, scheme in enumerate(data["schemes"])
    ]
    linears = {name: _parse_linear(name, entry, schemes) for name, entry in data["linears"].items()}
    try:
        config = FrameQuantConfig.from_dict(data["config"])
    except (FrameQuantError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"quantization_config.config: {error}") from error
    aliases = data.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(value, str) for value in aliases.values()):
        raise CheckpointError("quantization_config.aliases is of the wrong type.")
    return QuantizationEntry(config, linears, aliases)


def _parse_linear(name: str, entry: Any, schemes: list[LinearSpec]) -> LinearSpec:
    where = f"quantization_config.linears[{name!r}]"
    if not isinstance(entry, list) or len(entry) != 3 or not all(type(value) is int for value in entry):
        raise CheckpointError(f"{where}: expected [scheme, seed, seed], found {entry!r}.")
    number, seed_in, seed_out = entry
    if not 0 <= number < len(schemes):
        raise CheckpointError(f"{where}: scheme {number} does not exist; there are {len(schemes)}.")
    try:
        return schemes[number].with_seeds(seed_in, seed_out)
    except FrameQuantError as error:
        raise CheckpointError(f"{where}: {error}") from error


# --- Writing ----------------------------------------------------------------------------------------------


def prepare_output(directory: str | Path, overwrite: bool) -> Path:
    """Check that a checkpoint can be written to a directory, before the work is done.

    Raises:
        CheckpointError: it is a file; it is not empty and ``overwrite`` is false, or what it holds is no model; or
            its parent cannot be written.
    """
    path = Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a directory to write the checkpoint to.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{path} is not empty. Choose another directory, or --overwrite (overwrite=True)."
            )
        if not (path / CONFIG_NAME).is_file():
            raise CheckpointError(f"{path} holds no model, so it is not replaced; choose another directory.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {path.parent}: {error.strerror}.") from error
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path.parent} is not writable; choose another output directory.")
    return path


@contextmanager
def atomic_directory(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside the final one that takes its name when the block ends well.

    Yields:
        The directory to write into.

    Raises:
        CheckpointError: see ``prepare_output``; or the disk is full. Nothing is left under either name then.
    """
    final = prepare_output(directory, overwrite)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    try:
        partial.chmod(0o755)
        yield partial
        swap(partial, final)
    except OSError as error:
        raise CheckpointError(
            f"writing {final} failed: {error.strerror or error}. Nothing was left there; free some space or choose "
            "another directory."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def swap(partial: Path, final: Path) -> None:
    """Give a complete directory its final name; what had the name is deleted only when that has worked."""
    if not final.exists():
        partial.rename(final)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
    final.rename(retired / "old")
    try:
        partial.rename(final)
    except OSError:
        (retired / "old").rename(final)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a model with tied tensors once.

    Returns:
        Tensors by name; and the names that are left out, each with the name that holds its tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor
    return tensors, aliases


def write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as safetensors, shard by shard; only one shard is on the host at a time."""
    shards = _plan_shards(tensors, max_shard_bytes)
    metadata = {"format": "pt"}  # one key only: safetensors writes several in random order
    names = [WEIGHTS_NAME]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    for filename, keys in zip(names, shards, strict=True):
        shard = {key: tensors[key].detach().to("cpu").contiguous() for key in keys}
        try:
            save_file(shard, str(directory / filename), metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        weight_map.update(dict.fromkeys(keys, filename))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_index(directory, weight_map, total)


def write_index(directory: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write the index of a sharded checkpoint: the file of every key, and the bytes of all tensors."""
    write_json({"metadata": {"total_size": total}, "weight_map": dict(weight_map)}, directory / INDEX_NAME)


def _plan_shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        amount = tensor.numel() * tensor.element_size()
        if shards[-1] and size + amount > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += amount
    return shards


def write_json(data: Any, path: Path) -> None:
    """Write JSON for people: indented, lists of numbers on one line, no NaN."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


# --- Reading ----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: missing, too large, or not JSON.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes; this is no config file.")
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=integrity.refuse_duplicates,
            parse_constant=integrity.refuse_constant,
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {path.parent} is no framequant checkpoint.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory holds a framequant checkpoint."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        return False
    config = read_json(path)
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: none, or the index names files that do not exist or lie outside the directory.
    """
    if (directory / WEIGHTS_NAME).is_file():
        return [directory / WEIGHTS_NAME]
    if not (directory / INDEX_NAME).is_file():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    index = read_json(directory / INDEX_NAME)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{directory / INDEX_NAME}: weight_map is missing or of the wrong type.")
    files = []
    for filename in sorted(set(weight_map.values())):
        if Path(filename).name != filename or not filename.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME} names {filename!r}, which is no file of this directory.")
        if not (directory / filename).is_file():
            raise CheckpointError(f"{directory / filename} is missing; the download or copy is incomplete.")
        files.append(directory / filename)
    return files


def read_header(files: list[Path]) -> Header:
    """Read the headers of safetensors files; no tensor is loaded.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, or a key is in two files.
    """
    header: Header = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no safetensors file; other formats can hold code and are not read."
            )
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if key in header:
                    raise CheckpointError(f"{key} is in two files of the checkpoint.")
                part = file.get_slice(key)
                header[key] = (tuple(part.get_shape()), part.get_dtype())
    return header


#: Bytes of an element of each safetensors dtype that float models come in.
_ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_ELEMENT_BYTES.update({"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8})


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor from its entry in a ``Header``."""
    return math.prod(shape) * _ELEMENT_BYTES[dtype]


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, memory-mapped.

    Raises:
        CheckpointError: it is truncated or damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error


def check_index(directory: Path, files: list[Path]) -> None:
    """Check that the index of a sharded checkpoint says where its tensors are.

    Raises:
        CheckpointError: a key is not in the file that the index names, or not in the index; it is named.
    """
    if len(files) == 1 and files[0].name == WEIGHTS_NAME:
        return
    weight_map = read_json(directory / INDEX_NAME)["weight_map"]
    found: dict[str, str] = {}
    for path in files:
        found |= dict.fromkeys(read_header([path]), path.name)
    for key in sorted({*weight_map, *found}):
        if weight_map.get(key) != found.get(key):
            raise CheckpointError(
                f"{INDEX_NAME}: {key} is in {found.get(key)}, the index says {weight_map.get(key)}."
            )


def write_checksums(directory: Path) -> None:
    """Write ``framequant_checksums.json`` of the files of a complete checkpoint.

    Raises:
        CheckpointError: the directory holds no complete checkpoint.
    """
    config = read_json(directory / CONFIG_NAME)
    write_json(integrity.checksums(config, weight_files(directory)), directory / integrity.CHECKSUMS_NAME)


def verify(directory: Path, files: list[Path] | None = None) -> None:
    """Check a checkpoint against its checksums, if it has any.

    Args:
        directory: of the checkpoint.
        files: its weights; None to check the config only.

    Raises:
        CheckpointError: a tensor or a key of the config is not what was written; it is named.
    """
    path = directory / integrity.CHECKSUMS_NAME
    if not path.is_file():
        return
    stored = read_json(path)
    if files is None:
        config = read_json(directory / CONFIG_NAME)
        integrity.verify_config(stored, config if isinstance(config, dict) else {})
    else:
        integrity.verify_tensors(stored, files)


def check_header(entry: QuantizationEntry, header: Header) -> None:
    """Check that the files hold exactly the tensors that the quantized linears need.

    Raises:
        CheckpointError: a tensor is missing, unknown, reshaped or of another dtype; the key is named.
    """
    by_linear: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {name: {} for name in entry.linears}
    for key, value in header.items():
        owner, _, part = key.rpartition(".")
        if owner in by_linear and part != "bias" and not is_guard(part, value[0]):
            by_linear[owner][part] = value
    for name, spec in entry.linears.items():
        expected = storage.layout(spec)
        found = by_linear[name]
        for part in sorted(set(expected) | set(found)):
            if part not in found:
                raise CheckpointError(
                    f"{name}.{part} is missing from the checkpoint; it was renamed or cut off."
                )
            if part not in expected:
                raise CheckpointError(
                    f"{name}.{part} is in the checkpoint, but the linear's scheme has no such tensor."
                )
            shape, dtype = expected[part]
            if found[part] != (shape, _SAFETENSORS_DTYPES[dtype]):
                raise CheckpointError(
                    f"{name}.{part}: expected {_SAFETENSORS_DTYPES[dtype]} of shape {shape}, "
                    f"found {found[part][1]} of shape {found[part][0]}."
                )


def install_linears(model: nn.Module, entry: QuantizationEntry) -> None:
    """Replace the linears of a float skeleton by empty ``FrameLinear`` on the meta device.

    Raises:
        CheckpointError: the model has no such linear, or one of another shape.
    """
    unfuse_(model, entry.linears)
    modules = dict(model.named_modules())
    for name, spec in entry.linears.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            raise CheckpointError(
                f"{name} is quantized in the checkpoint, but {type(model).__name__} has no such linear."
            )
        weight, shape = linear_weight(module), (spec.out_features, spec.in_features)
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{name}: the checkpoint has {shape}, the model {tuple(weight.shape)}.")
        has_bias = getattr(module, "bias", None) is not None
        if storage.holds_bias(spec) and not has_bias:
            raise CheckpointError(f"{name}: the checkpoint has a bias, the model's linear has none.")
        has_bias = has_bias and not storage.holds_bias(spec)
        model.set_submodule(name, FrameLinear(spec, bias=has_bias, dtype=weight.dtype, device="meta"))


def load_tensors(
    model: nn.Module, files: list[Path], aliases: Mapping[str, str], device: str | torch.device = "cpu"
) -> None:
    """Fill a model with the tensors of a checkpoint, all of them and no others.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape; it is named.
    """
    state: dict[str, Tensor] = {}
    for path in files:
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                state[key] = file.get_tensor(key)
    check_aliases(aliases, state)
    state |= {alias: state[key] for alias, key in aliases.items()}
    expected = model.state_dict()
    for key in sorted(set(expected) | set(state)):
        if key not in state:
            raise CheckpointError(f"{key} is missing from the checkpoint.")
        if key not in expected:
            raise CheckpointError(f"{key} is in the checkpoint, but the model has no such tensor.")
        if expected[key].shape != state[key].shape:
            raise CheckpointError(
                f"{key}: the model has shape {tuple(expected[key].shape)}, the checkpoint {tuple(state[key].shape)}."
            )
    model.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, strict=True, assign=True)
    check_scales(model)


def check_aliases(aliases: Mapping[str, str], keys: Container[str]) -> None:
    """Check that aliases stand for tensors of the files, and for none that is there itself.

    Raises:
        CheckpointError: they do not; the key is named.
    """
    for alias, key in aliases.items():
        if key not in keys:
            raise CheckpointError(f"quantization_config.aliases: {alias} stands for {key}, which is missing.")
        if alias in keys:
            raise CheckpointError(f"quantization_config.aliases: {alias} is in the checkpoint itself.")


def check_scales(model: nn.Module) -> None:
    """Check that the scales and zero points of a loaded model are finite.

    Raises:
        CheckpointError: one is not; the key is named.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrameLinear):
            for part, tensor in module.tensors.items():
                if not tensor.is_meta:
                    check_finite(f"{name}.{part}", tensor)


def load_into(
    skeleton: nn.Module, directory: Path, entry: QuantizationEntry, device: str | torch.device
) -> nn.Module:
    """Install the quantized linears in a float skeleton and load the tensors; evaluation mode.

    Raises:
        CheckpointError: config, shapes and tensors do not fit each other; the key is named.
    """
    files = weight_files(directory)
    header = read_header(files)
    check_header(entry, header)
    check_aliases(entry.aliases, header)
    check_index(directory, files)
    install_linears(skeleton, entry)
    aliased = {alias: header[key] for alias, key in entry.aliases.items()}
    check_skeleton(skeleton, header | aliased, entry.linears)
    load_tensors(skeleton, files, entry.aliases, device)
    return skeleton.to(device).eval()
