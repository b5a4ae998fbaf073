"""An OpenAI-compatible server for a checkpoint: ``transformers serve`` with our format registered.

The server, its endpoints (``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health``) and its
streaming are transformers' own; this module checks what would otherwise fail late, and starts it. For many users
at once take vLLM (``integrations/vllm.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framequant.errors import ConfigError, ModelSourceError

INSTALL = "pip install 'framequant[serve]'"


def serve_class() -> Any:
    """The class behind ``transformers serve``.

    Raises:
        ConfigError: transformers is of another version, or what serving needs is not installed; the message has the
            command.
    """
    from framequant.integrations.transformers import check_version

    check_version()
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error}). Run: {INSTALL}") from error
    if not is_serve_available():
        raise ConfigError(f"serving needs more packages. Run: {INSTALL}")
    return Serve


def check_directory(directory: str | Path) -> Path:
    """The directory of a checkpoint that can answer: a language model with its tokenizer.

    Raises:
        ModelSourceError: no checkpoint of ours lies there, it is no language model, or its tokenizer is missing.
    """
    from framequant.checkpoint import is_checkpoint, read_json

    path = Path(directory).expanduser().resolve()
    if not is_checkpoint(path):
        raise ModelSourceError(
            f"{directory} is no framequant checkpoint; make one with: framequant quantize."
        )
    names = read_json(path / "config.json").get("architectures") or [""]
    if not str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelSourceError(
            f"{directory} is {names[0] or 'a timm model'}, no language model; it cannot chat."
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelSourceError(f"{directory} has no tokenizer; save it with save_pretrained(…, tokenizer=…).")
    return path


def serve(
    directory: str | Path,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    *,
    background: bool = False,
) -> Any:
    """Serve a checkpoint until interrupted.

    Args:
        directory: the checkpoint; also the model's name for clients.
        host: address to listen on.
        port: to listen on.
        device: "auto", "cpu" or "cuda".
        dtype: of what is not quantized.
        background: return at once; the server runs in a thread.

    Returns:
        transformers' server, with ``kill_server()``; only with ``background`` before it has ended.

    Raises:
        ConfigError: packages are missing.
        ModelSourceError: the directory cannot be served.
    """
    path = check_directory(directory)
    server = serve_class()
    with _listing_only(path):
        return server(
            force_model=str(path), host=host, port=port, device=device, dtype=dtype, non_blocking=background
        )


@contextlib.contextmanager
def _listing_only(path: Path) -> Iterator[None]:
    """Servers made in this context list the one model that they serve.

    transformers lists what lies in the hub's cache instead: other models, which it then refuses, or an error where
    there is no cache. Clients that ask which models there are get no further.
    """
    from transformers.cli.serving import model_manager

    original = model_manager.ModelManager
    entry = {
        "id": str(path),
        "object": "model",
        "created": int(path.stat().st_mtime),
        "owned_by": "framequant",
    }

    class OneModel(original):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [entry]

    model_manager.ModelManager = OneModel
    try:
        yield
    finally:
        model_manager.ModelManager = original
