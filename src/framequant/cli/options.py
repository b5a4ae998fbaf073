"""Options that several subcommands share, and how a config is made from preset, file and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequant.errors import ConfigError

if TYPE_CHECKING:
    from framequant.config import FrameQuantConfig

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda; auto takes the GPU if there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (float32), float32, bfloat16 or float16: to compute in, and to save the rest in.",
    ),
]


def choose_device(name: str) -> str:
    """The device that ``--device`` means.

    Raises:
        ConfigError: unknown, or no GPU is there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"--device {name}: choose auto, cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; leave --device out or use cpu.")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0.")
    return name


def build_config(
    preset: str | None, file: Path | None, settings: Sequence[str], flags: Mapping[str, Any]
) -> FrameQuantConfig:
    """Make a config: the preset's fields, then the file's, then ``--set``, then the other flags.

    Args:
        preset: name of a preset; wins over the file's; "framequant" if neither names one.
        file: YAML in the form of ``FrameQuantConfig.from_dict``.
        settings: ``KEY=VALUE`` strings, values in YAML.
        flags: fields given by flags of their own; None where a flag was not given.

    Raises:
        ConfigError: unknown preset or key, or a bad value.
    """
    from framequant.config import FrameQuantConfig

    values = _read_yaml(file) if file is not None else {}
    if preset is not None:
        values["preset"] = preset
    values.setdefault("preset", "framequant")
    for setting in settings:
        values.update(_parse_setting(setting))
    given = {key: value for key, value in flags.items() if value is not None}
    if "overrides" in given:  # on top of those of the file
        given["overrides"] = {**(values.get("overrides") or {}), **given["overrides"]}
    values.update(given)
    return FrameQuantConfig.from_dict(values)


def parse_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings of single linears from ``REGEX::KEY=VALUE,KEY=VALUE`` or ``REGEX::skip``.

    Two colons, since a regular expression may hold one.

    Raises:
        ConfigError: another form.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, colons, settings = text.rpartition("::")
        if not colons or not pattern or not settings:
            raise ConfigError(
                f"--override {text!r}: expected REGEX::KEY=VALUE,…, for example --override 'down_proj::bits=3'."
            )
        changes: dict[str, Any] = {}
        for part in settings.split(","):
            changes.update({"skip": True} if part.strip() == "skip" else _parse_setting(part))
        overrides[pattern] = {**overrides.get(pattern, {}), **changes}
    return overrides


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {file} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not valid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"--config {file}: expected settings as KEY: VALUE, found {type(data).__name__}.")
    return {str(key): value for key, value in (data or {}).items()}


def _parse_setting(setting: str) -> dict[str, Any]:
    import yaml

    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r}: expected KEY=VALUE, for example --set clip_sigmas=1.75.")
    try:
        return {key.strip().replace("-", "_"): yaml.safe_load(value)}
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML: {error}") from error
