"""Open a model by the name a user gives it: packaged, GGUF, transformers, timm, or one of our checkpoints.

Accepted forms are listed in ``FORMS``. Whatever was opened, the caller gets the model in evaluation mode with
what its data needs beside it: the tokenizer of a text model, the preprocessing of a vision model. Must not
import evaluation or the command line.
"""

from __future__ import annotations

import difflib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framequant.errors import CheckpointError, ModelSourceError
from framequant.integrations import hub
from framequant.integrations.packages import PACKAGED_MODELS
from framequant.integrations.preprocessing import ImageSettings, settings_of_processor, settings_of_timm

FORMS = (
    "a directory of transformers, timm or framequant, a .gguf file, timm/NAME, a name on the Hugging Face "
    f"hub, or {' or '.join(PACKAGED_MODELS)}"
)

DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


@dataclass
class OpenedModel:
    """A model and what its data needs.

    Attributes:
        model: in evaluation mode, on the device asked for.
        kind: "transformers" or "timm".
        name: as the user gave it.
        path: the directory or file it was read from; None for a model from the hub.
        quantized: whether it is a checkpoint of ours.
        tokenizer: of a text model, or None.
        image_processor: of a transformers vision model, or None.
        images: preprocessing of a vision model, or None.
        labels: names of the classes in order, WordNet ids where they are known, or None.
        notes: what the user should know, for example weights that the source lacked.
    """

    model: nn.Module
    kind: str
    name: str
    path: Path | None = None
    quantized: bool = False
    tokenizer: Any = None
    image_processor: Any = None
    images: ImageSettings | None = None
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def processor(self) -> Any:
        """What is saved beside the model: its tokenizer or its image processor, or None."""
        return self.tokenizer if self.tokenizer is not None else self.image_processor

    @property
    def is_vision(self) -> bool:
        """Whether the model reads images."""
        return self.images is not None

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ModelSourceError: there is none.
        """
        if self.tokenizer is None:
            what = "it is a vision model" if self.is_vision else "no tokenizer file lies beside it"
            raise ModelSourceError(f"{self.name} has no tokenizer, so it cannot read text: {what}.")
        return self.tokenizer

    def require_images(self) -> ImageSettings:
        """The image preprocessing.

        Raises:
            ModelSourceError: the model reads no images.
        """
        if self.images is None:
            raise ModelSourceError(f"{self.name} does not read images; give it text.")
        return self.images


def open_model(name: str, dtype: str = "auto", device: str | torch.device = "cpu") -> OpenedModel:
    """Open a model.

    Args:
        name: see ``FORMS``.
        dtype: "auto", "float32", "bfloat16" or "float16"; auto is float32, and for one of our checkpoints the
            dtype that it was saved in.
        device: where the model goes.

    Raises:
        ModelSourceError: nothing is found under this name, or it cannot be read; the message says what to do.
        CheckpointError: a checkpoint of ours is damaged.
    """
    if dtype not in DTYPES:
        raise ModelSourceError(f"dtype {dtype!r} is unknown; choose from: {', '.join(DTYPES)}.")
    opened = _open(name, dtype)
    opened.model = opened.model.to(device).eval()
    return opened


def _open(name: str, dtype: str) -> OpenedModel:
    kind = DTYPES[dtype]
    if name in PACKAGED_MODELS:
        path = PACKAGED_MODELS[name].locate()
        return (
            _open_gguf(name, path, kind) if path.suffix == ".gguf" else _open_transformers(name, path, kind)
        )
    if name.startswith("timm/"):
        return _open_timm(name, name.removeprefix("timm/"), None, kind)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelSourceError(f"no file {name}." + _similar_file(path))
        return _open_gguf(name, path, kind)
    if path.is_dir():
        return _open_directory(name, path, dtype)
    if path.is_file():
        raise ModelSourceError(f"{name} is a file, but not a .gguf file. A model is {FORMS}.")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise ModelSourceError(f"no such directory: {name}.{_similar_file(path)} A model is {FORMS}.")
    return _open_transformers(name, None, kind)


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory.

    Raises:
        ModelSourceError: it is missing or is no JSON mapping.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ModelSourceError(
            f"{path} holds no config.json, so it is no model directory.{_similar_file(path)}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelSourceError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelSourceError(f"{file} holds no mapping.")
    return config


def is_framequant_directory(path: Path) -> bool:
    """Whether a directory claims to be a checkpoint of ours."""
    if not (path / "config.json").is_file():
        return (path / "framequant_report.json").is_file()
    entry = read_config(path).get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == "framequant"


def _open_directory(name: str, path: Path, dtype: str) -> OpenedModel:
    if is_framequant_directory(path):
        return _open_framequant(name, path, dtype)
    config = read_config(path)
    if "architecture" in config and "model_type" not in config:
        return _open_timm(name, f"local-dir:{path.resolve()}", path, DTYPES[dtype])
    return _open_transformers(name, path, DTYPES[dtype])


def _open_framequant(name: str, path: Path, dtype: str) -> OpenedModel:
    from framequant import load

    timm = "architecture" in read_config(path)
    if not timm:
        _prepare_transformers()
    model = load(path, dtype=None if dtype == "auto" else DTYPES[dtype])
    if timm:
        return OpenedModel(
            model, "timm", name, path, True, images=settings_of_timm(model), labels=_timm_labels(model)
        )
    opened = OpenedModel(model, "transformers", name, path, True)
    add_processors(opened, str(path), path)
    return opened


def _open_gguf(name: str, path: Path, dtype: torch.dtype) -> OpenedModel:
    from framequant.integrations import gguf

    _prepare_transformers()
    model, tokenizer = gguf.open_gguf(path, dtype)
    return OpenedModel(model, "transformers", name, path, tokenizer=tokenizer)


def _prepare_transformers() -> Any:
    import transformers.quantizers.auto  # before ours, which registers itself there

    from framequant.errors import ConfigError
    from framequant.integrations.transformers import check_version

    try:
        check_version()
    except ConfigError as error:
        raise ModelSourceError(str(error)) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _open_transformers(name: str, path: Path | None, dtype: torch.dtype) -> OpenedModel:
    transformers = _prepare_transformers()
    source = str(path) if path is not None else name
    with hub.cache_only_if_unreachable() as online:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise ModelSourceError(_not_found(name, path, online, error)) from error
        _refuse_foreign_quantization(name, config)
        architectures = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, str(architectures[0]), None) if architectures else None
        try:
            model, info = (model_class or transformers.AutoModel).from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelSourceError(f"{name}: the weights cannot be loaded: {error}") from error
        opened = OpenedModel(model, "transformers", name, path)
        missing = sorted(info.get("missing_keys", ()))
        if missing:
            opened.notes.append(
                f"{len(missing)} tensors are missing from {name} and were filled with random numbers: "
                + ", ".join(missing[:3])
                + (", …" if len(missing) > 3 else "")
            )
        add_processors(opened, source, path)
    return opened


def _refuse_foreign_quantization(name: str, config: Any) -> None:
    entry = getattr(config, "quantization_config", None)
    if entry is not None:
        method = (
            entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
        )
        raise ModelSourceError(f"{name} is already quantized ({method}); give the float model.")


def add_processors(opened: OpenedModel, source: str, path: Path | None) -> None:
    """Find the tokenizer, or the image processor, of a transformers model."""
    import transformers

    main_input = getattr(opened.model, "main_input_name", "input_ids")
    if main_input == "pixel_values":
        try:
            opened.image_processor = transformers.AutoImageProcessor.from_pretrained(source)
        except ImportError as error:
            raise ModelSourceError(
                f"{opened.name}: images need the vision extra. Run: pip install 'framequant[vision]'"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            opened.notes.append(
                f"no image processor beside {opened.name} ({error}); ImageNet's mean and scale are used."
            )
        opened.images = settings_of_processor(opened.image_processor, opened.model.config)
        names = getattr(opened.model.config, "id2label", None) or {}
        opened.labels = [str(names[index]) for index in sorted(names)] or None
        return
    if path is not None and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return
    try:
        opened.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if path is not None:
            raise ModelSourceError(f"{opened.name}: its tokenizer cannot be read: {error}") from error


def _open_timm(name: str, source: str, path: Path | None, dtype: torch.dtype) -> OpenedModel:
    from framequant.integrations.timm import import_timm

    timm = import_timm()
    if path is None and not timm.is_model(source.split(".")[0]):
        close = difflib.get_close_matches(source, timm.list_models(), n=1, cutoff=0.5)
        hint = f" Did you mean 'timm/{close[0]}'?" if close else " timm.list_models() lists them."
        raise ModelSourceError(f"timm {timm.__version__} has no model {source!r}.{hint}")
    with hub.cache_only_if_unreachable() as online:
        try:
            model = timm.create_model(source, pretrained=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            if path is not None:
                raise ModelSourceError(f"{name}: timm cannot load this directory: {error}") from error
            reason = (
                ""
                if online
                else " The Hugging Face hub cannot be reached and its cache does not hold the model: give a directory "
                "that timm saved."
            )
            raise ModelSourceError(
                f"{name}: the weights cannot be loaded.{reason} ({_first_line(error)})"
            ) from error
    model = model.to(dtype)
    return OpenedModel(model, "timm", name, path, images=settings_of_timm(model), labels=_timm_labels(model))


def _timm_labels(model: nn.Module) -> list[str] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = model.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    with suppress(Exception):
        subset = infer_imagenet_subset(model)
        if subset:
            return list(ImageNetInfo(subset).label_names())
    return None


def _not_found(name: str, path: Path | None, online: bool, error: Exception) -> str:
    if path is not None:
        return f"{name}: transformers cannot read its config.json: {_first_line(error)}"
    close = difflib.get_close_matches(name.lower(), PACKAGED_MODELS, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else _similar_file(Path(name))
    if not online:
        return (
            f"no directory {name!r} here, and the Hugging Face hub cannot be reached to look for it there "
            f"(nor is it in the hub's cache).{hint} A model is {FORMS}."
        )
    answer = _first_line(error)
    return f"no directory {name!r} here, and the Hugging Face hub answers: {answer}{hint} A model is {FORMS}."


def _similar_file(path: Path) -> str:
    """`` Did you mean 'x'?`` for the entry of the parent folder whose name is closest."""
    with suppress(OSError):
        names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
        if close:
            return f" Did you mean '{path.with_name(close[0])}'?"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = [
    "DTYPES",
    "FORMS",
    "CheckpointError",
    "OpenedModel",
    "is_framequant_directory",
    "open_model",
    "read_config",
]
