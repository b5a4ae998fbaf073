"""Whether the Hugging Face hub can be reached, asked once and quickly.

The hub's own client retries an unreachable host for half a minute per file. A look at the host first turns
this into an immediate answer; files in the local cache are still found.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import urlsplit

#: Seconds to wait for the hub's address.
TIMEOUT = 5.0


@lru_cache(maxsize=1)
def reachable() -> bool:
    """Whether the hub answers at its address; a configured proxy is taken to reach it."""
    if any(os.environ.get(name) in ("1", "true", "True", "ON", "YES") for name in ("HF_HUB_OFFLINE",)):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "huggingface.co", port), timeout=TIMEOUT).close()
    except OSError:
        return False
    return True


@contextmanager
def cache_only_if_unreachable() -> Iterator[bool]:
    """Within this context the hub's client looks only into its cache when the hub cannot be reached.

    Yields:
        Whether the hub is reachable.
    """
    from huggingface_hub import constants

    online = reachable()
    before = constants.HF_HUB_OFFLINE
    if not online:
        constants.HF_HUB_OFFLINE = True
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before
