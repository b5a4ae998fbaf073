"""Whether the Hugging Face hub can be reached, asked once and quickly; and the way there for a model.

The hub's own client retries an unreachable host for half a minute per file. A look at the host first turns
this into an immediate answer; files in the local cache are still found.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from framequant.errors import ModelSourceError

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


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    source: str | None = None,
    tokenizer: Any = None,
    model_args: dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model quantized with framequant",
    create_pr: bool = False,
) -> str:
    """Upload a quantized model with its report and its model card to the Hugging Face hub.

    Args:
        model: quantized by ``quantize_``, of any library.
        repo_id: ``OWNER/NAME``; made if it does not exist.
        source: name of the float model, for the card.
        tokenizer: saved beside the model: a tokenizer, an image processor.
        model_args: arguments that rebuild a timm model, where timm does not know them itself.
        private: whether a repository that is made is private; the account's default if not given.
        token: of the account; the one that ``hf auth login`` stored if not given.
        commit_message: of the commit.
        create_pr: propose the files in a pull request instead of committing them.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the model is not quantized.
        ModelSourceError: the hub cannot be reached or refuses; the message has its answer.
    """
    import tempfile
    from pathlib import Path

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from framequant.pretrained import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / repo_id.rpartition("/")[2]
        save_pretrained(
            model, directory, source=source, tokenizer=tokenizer, model_args=model_args, name=repo_id
        )
        if not reachable():
            raise ModelSourceError(
                f"{repo_id}: the Hugging Face hub cannot be reached, so nothing was uploaded."
            )
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=directory,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ModelSourceError(f"{repo_id}: the Hugging Face hub refuses the upload: {error}") from error
    return str(getattr(commit, "pr_url", None) or getattr(commit, "commit_url", commit))
