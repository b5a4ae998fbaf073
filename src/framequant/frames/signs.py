"""Random signs and seeds that are the same bits on every machine.

A frame is stored as a few integers, so whoever loads it must draw the very same signs again: torch's
generators give other streams on CUDA than on the CPU and promise nothing between releases. The generator
here is SplitMix64, used as a counter: draw ``i`` depends on ``(seed, i)`` alone, by exact arithmetic modulo
2^64. Imports no other module of ours but ``errors``.

References:
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from framequant.errors import FrameError

SEED_LIMIT = 1 << 64
"""Seeds are unsigned 64-bit integers: ``0 <= seed < SEED_LIMIT``."""

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def splitmix64(count: int, seed: int) -> NDArray[np.uint64]:
    """Return the first ``count`` outputs of SplitMix64 started at ``seed``.

    Args:
        count: how many words, at least 0.
        seed: unsigned 64-bit start.

    Returns:
        ``(count,)`` unsigned words; word ``i`` depends on ``seed`` and ``i`` only.

    Raises:
        FrameError: if ``seed`` is not an unsigned 64-bit integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise FrameError(f"seed must be an integer in [0, 2^64), not {seed!r}.")
    # All operands are arrays: numpy wraps those silently, and warns about scalars.
    word = np.full(count, seed, dtype=np.uint64) + np.arange(1, count + 1, dtype=np.uint64) * _INCREMENT
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLIERS[0]
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLIERS[1]
    return word ^ (word >> np.uint64(31))


def random_signs(dim: int, seed: int) -> Float[Tensor, " dim"]:
    """Draw ``dim`` signs, each -1.0 where the top bit of its SplitMix64 word is set, else +1.0.

    Args:
        dim: how many signs.
        seed: unsigned 64-bit seed; see ``derive_seed``.

    Returns:
        A new float64 tensor on the CPU.

    Raises:
        FrameError: if ``seed`` is not an unsigned 64-bit integer.

    Examples:
        >>> random_signs(6, seed=0).tolist()
        [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    """
    negative = splitmix64(dim, seed) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * negative.astype(np.float64))


def derive_seed(*parts: int | str) -> int:
    """Derive a 64-bit seed from a global seed and the names of what it is for.

    The parts are encoded with their type and length before hashing, so that ``("ab", "c")`` and
    ``("a", "bc")``, or ``1`` and ``"1"``, give unrelated seeds.

    Args:
        parts: for example ``(global_seed, "model.layers.3", "frame_in")``.

    Returns:
        The first eight bytes of the SHA-256 of the encoding, big-endian.

    Raises:
        FrameError: if a part is neither an integer nor a string.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise FrameError(f"a seed is derived from integers and strings, not {part!r}.")
        text = str(part).encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest()[:8], "big")
