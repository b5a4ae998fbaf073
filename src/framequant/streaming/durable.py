"""Files that are there, whole, after a power cut: written under another name, flushed to the disk, renamed.

Imports nothing of ours.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(temporary: Path, path: Path) -> None:
    """Give a written file its name, in place of what had it: whatever happens, the name means one of both, whole.

    Raises:
        OSError: the disk is full or not writable.
    """
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file durably, in place of the one before; raises as ``rename`` does."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    rename(temporary, path)
