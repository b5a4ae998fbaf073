"""Open a GGUF file as a float transformers model.

transformers dequantizes the tensors and undoes the rotary permutation of q and k. It then still regards the
model as quantized and refuses to save it, so every trace of that is removed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from framequant.errors import ModelSourceError


def open_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a GGUF file.

    Args:
        path: the file.
        dtype: of the dense weights.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelSourceError: the file is no GGUF, or of an architecture that transformers cannot read, or the
            packages that read it are missing.
    """
    with reading(path) as source:
        import transformers

        config = transformers.AutoConfig.from_pretrained(**source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        options = {"config": config, "dtype": dtype}
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options)
    forget_quantization(model)
    return model, tokenizer


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer that a GGUF file holds; raises as ``open_gguf`` does."""
    with reading(path) as source:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(**source)


@contextmanager
def reading(path: Path) -> Iterator[dict[str, str]]:
    """What transformers' ``from_pretrained`` needs to find a GGUF file, whose header is parsed once inside.

    Raises:
        ModelSourceError: the file is no GGUF, or of an architecture that transformers cannot read, or the
            packages that read it are missing.
    """
    _check_magic(path)
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelSourceError(
            f"{path.name}: a GGUF file needs the gguf extra. Run: pip install 'framequant[gguf]'"
        ) from error
    try:
        with _read_header_once():
            yield {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        raise ModelSourceError(f"{path}: transformers cannot read this GGUF file: {error}") from error


def forget_quantization(model: Any) -> None:
    """Remove what marks a dequantized model as quantized, so that it saves like any float model."""
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    for key in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(key, None)
    model.config.architectures = [type(model).__name__]


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelSourceError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")


@contextmanager
def _read_header_once() -> Iterator[None]:
    """Share one parsed header and name map among config, tokenizer and weights.

    transformers parses the file anew for each, and builds the map of tensor names once per module: half a
    minute for a small model. Inside this context both are computed once.
    """
    import gguf

    cached = {"GGUFReader": lru_cache(maxsize=1), "get_tensor_name_map": lru_cache(maxsize=4)}
    originals = {name: getattr(gguf, name) for name in cached}
    for name, wrap in cached.items():
        setattr(gguf, name, wrap(originals[name]))
    try:
        with _without_tqdm():
            yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextmanager
def _without_tqdm() -> Iterator[None]:
    """Keep transformers' progress bar for tensors off the terminal: the command line has its own."""
    from transformers import modeling_gguf_pytorch_utils as reading

    original = getattr(reading, "tqdm", None)
    if original is not None:
        reading.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        if original is not None:
            reading.tqdm = original
