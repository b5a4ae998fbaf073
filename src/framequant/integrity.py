"""Checksums of a checkpoint: what shapes and types cannot tell, a flipped bit of a code or another number of heads.

``framequant_checksums.json`` lies beside the weights and holds a CRC-32 for every tensor (of its dtype, shape and
bytes, as they are in the file) and for every key of ``config.json`` (of its canonical JSON). It finds damage, not
forgery: whoever can write the checkpoint can write the checksums. Checkpoints without the file load unchecked.

Safetensors files are read here as bytes, through a memory map, so that verifying a checkpoint makes no tensors.

Must not import torch or models.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from framequant.errors import CheckpointError

CHECKSUMS_NAME = "framequant_checksums.json"
CHECKSUMS_VERSION = 1
#: Set to 0 to load without verifying.
VERIFY_VARIABLE = "FRAMEQUANT_VERIFY"
#: safetensors refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
_ADVICE = f"Fetch it again; if you changed it on purpose, delete {CHECKSUMS_NAME} (or verify=False)."


_settled: ContextVar[bool] = ContextVar("settled", default=False)


def is_wanted(verify: bool | None = None) -> bool:
    """Whether to verify: as asked, else as ``FRAMEQUANT_VERIFY`` says, else yes; no inside ``settled``."""
    if verify is not None:
        return verify
    return not _settled.get() and os.environ.get(VERIFY_VARIABLE, "1") != "0"


@contextmanager
def settled() -> Iterator[None]:
    """What is loaded inside has been verified, or is not to be."""
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a key that stands in it twice; for ``json.loads``.

    Raises:
        ValueError: a key is there twice; it is named.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def refuse_constant(name: str) -> Any:
    """Refuse NaN and infinities, which are no JSON; for ``json.loads``.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is no JSON number")


def config_checksums(config: dict[str, Any]) -> dict[str, str]:
    """CRC-32 of every top-level value of a config, and of every linear's entry, by key."""
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    entry = config.get("quantization_config")
    if isinstance(entry, dict):
        found |= {f"quantization_config.{key}": value for key, value in entry.items()}
    return {key: _crc(_canonical(value)) for key, value in found.items()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _crc(data: Any, start: int = 0) -> str:
    return f"{zlib.crc32(data, start):08x}"


def tensor_checksums(path: Path) -> dict[str, str]:
    """CRC-32 of every tensor of a safetensors file.

    Args:
        path: of the file.

    Returns:
        Eight hexadecimal digits by key.

    Raises:
        CheckpointError: the file is truncated or its header damaged.

    Cost:
        One pass over the file; no tensor is made.
    """
    return dict(_walk_tensors(path))


def _walk_tensors(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            length = int.from_bytes(data[:8], "little")
            if length > min(MAX_HEADER_BYTES, len(data) - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(data[8 : 8 + length], object_pairs_hook=refuse_duplicates)
            with memoryview(data) as view:
                for key, entry in header.items():
                    if key == "__metadata__":
                        continue
                    first, last = (8 + length + int(offset) for offset in entry["data_offsets"])
                    if not 8 + length <= first <= last <= len(view):
                        raise ValueError(f"{key} lies outside the file")
                    kind = zlib.crc32(f"{entry['dtype']}{list(entry['shape'])}".encode())
                    with view[first:last] as part:
                        yield key, _crc(part, kind)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error


def checksums(config: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """The content of ``framequant_checksums.json``."""
    tensors: dict[str, str] = {}
    for path in files:
        tensors |= tensor_checksums(path)
    return {
        "version": CHECKSUMS_VERSION,
        "algorithm": "crc32",
        "config": config_checksums(config),
        "tensors": dict(sorted(tensors.items())),
    }


def verify_config(stored: Any, config: dict[str, Any]) -> None:
    """Compare a config with the checksums.

    Args:
        stored: parsed ``framequant_checksums.json``.
        config: parsed ``config.json``.

    Raises:
        CheckpointError: a key changed, is missing or new; it is named. Or the checksums are damaged.
    """
    _compare(_section(stored, "config"), config_checksums(config), "config.json: ")


def verify_tensors(stored: Any, files: list[Path]) -> None:
    """Compare the tensors of a checkpoint with the checksums; errors as for ``verify_config``."""
    expected = _section(stored, "tensors")
    found: dict[str, str] = {}
    for path in files:
        found |= tensor_checksums(path)
    _compare(expected, found, "")


def _section(stored: Any, name: str) -> dict[str, str]:
    if not isinstance(stored, dict) or stored.get("algorithm") != "crc32":
        raise CheckpointError(f"{CHECKSUMS_NAME} is damaged: no crc32 checksums. {_ADVICE}")
    if stored.get("version") != CHECKSUMS_VERSION:
        raise CheckpointError(
            f"{CHECKSUMS_NAME}: version {stored.get('version')!r}; this framequant reads {CHECKSUMS_VERSION}."
        )
    section = stored.get(name)
    if not isinstance(section, dict) or not all(isinstance(value, str) for value in section.values()):
        raise CheckpointError(f"{CHECKSUMS_NAME}: {name} is missing or of the wrong type. {_ADVICE}")
    return section


def _compare(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    for key in sorted({*expected, *found}):
        if key not in found:
            raise CheckpointError(f"{where}{key} is missing; the checksums name it. {_ADVICE}")
        if key not in expected:
            raise CheckpointError(f"{where}{key} is there, but the checksums do not name it. {_ADVICE}")
        if expected[key] != found[key]:
            raise CheckpointError(f"{where}{key} is not what was written: its checksum differs. {_ADVICE}")
