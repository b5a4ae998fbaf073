"""``framequant bench``: how fast a language model reads and decodes, beside its float model in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequant.cli.console import Reporter, size
from framequant.cli.options import DeviceOption, JsonOption, choose_device

if TYPE_CHECKING:
    from framequant.evaluation.speed import Speed

NAME = "bench"
EXAMPLES = (
    "Examples:\n\n"
    "framequant bench smol-2bit\n\n"
    "framequant bench smol-2bit --against smollm2 --prompt 512 --tokens 128 --compile\n\n"
    "framequant bench smol-2bit --against none --device cpu --json"
)


def run(
    directory: Annotated[
        str, typer.Argument(help="A checkpoint of framequant, or any model that quantize accepts.")
    ],
    against: Annotated[
        str,
        typer.Option(
            help="float: the same model with its linears synthesised; none; or any model that quantize accepts."
        ),
    ] = "float",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile blocks with torch.compile first (GPU only).")
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto (as saved; on a GPU float16 in place of float32), float32, bfloat16 or float16.",
        ),
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure prompt and decoding speed, first-token time, memory and the share of the bandwidth limit."""
    from framequant.evaluation.speed import copy_bandwidth, measure_speed

    reporter = Reporter(as_json)
    place = choose_device(device)
    options: dict[str, Any] = {"repeats": repeats, "compile_blocks": compile_blocks}
    found: dict[str, Speed] = {}
    for name, source in {directory: directory, **_others(directory, against)}.items():
        with reporter.stage(f"loading {name}"):
            model, note = _open(source, dtype, place, dense=source == directory and name != directory)
        if note:
            reporter.notice(note)
        options.setdefault("bandwidth", copy_bandwidth(next(model.parameters()).device))
        with reporter.stage(f"measuring {name}"):
            found[name] = measure_speed(model, prompt, tokens, **options)
        del model
    reporter.print(_table(found))
    reporter.print_json(
        {
            "device": _device_name(place),
            "tokens": tokens,
            "models": {name: speed.to_dict() for name, speed in found.items()},
            "decoding_ratio": _ratio(found),
        }
    )


def _others(directory: str, against: str) -> dict[str, str]:
    """What to measure beside the model: names in the table, and what to open."""
    if against == "none":
        return {}
    return {f"{directory} in float": directory} if against == "float" else {against: against}


def _open(source: str, dtype: str, place: str, dense: bool) -> tuple[Any, str]:
    """A model ready to be measured, and what the user should know about it."""
    import torch

    from framequant.errors import ConfigError
    from framequant.fused import fuse_
    from framequant.integrations.sources import open_model

    opened = open_model(source, dtype, place)
    if opened.kind != "transformers" or opened.is_vision or not opened.model.can_generate():
        raise ConfigError(f"{source} is no language model; bench measures decoding.")
    model = opened.model
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype == "auto" and place != "cpu" and kind == torch.float32:
        model = model.to(torch.float16)
        kind = torch.float16
    if dense:
        from framequant.integrations.transformers import dequantize_

        return dequantize_(model, kind).to(place), ""
    if place == "cpu" or not opened.quantized:
        return model, ""
    made = fuse_(model)
    note = (
        "" if made else f"the GPU kernels cover no linear of {source} in {kind}; plain torch serves, slowly."
    )
    return model, note


def _ratio(found: dict[str, Speed]) -> float | None:
    """Decoding speed of the first model over the second's."""
    speeds = [speed.tokens_per_second for speed in found.values()]
    return speeds[0] / speeds[1] if len(speeds) > 1 else None


def _device_name(place: str) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(place) if place != "cpu" else platform.processor() or platform.machine()


def _table(found: dict[str, Speed]) -> Any:
    from rich import box
    from rich.table import Table

    rows = {
        "decoding, tokens/s": [f"{speed.tokens_per_second:.1f}" for speed in found.values()],
        "prompt, tokens/s": [f"{speed.prompt_tokens_per_second:.0f}" for speed in found.values()],
        "first token": [f"{1e3 * speed.first_token_seconds:.1f} ms" for speed in found.values()],
        "model": [size(speed.model_bytes) for speed in found.values()],
        "memory with cache": [size(speed.memory_bytes) for speed in found.values()],
        "read for a token": [size(speed.bytes_per_token) for speed in found.values()],
        "of the limit by bandwidth": [f"{100 * speed.bandwidth_fraction:.0f} %" for speed in found.values()],
        "CUDA graph": ["yes" if speed.graph else "no" for speed in found.values()],
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", *found):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *values)
    ratio = _ratio(found)
    if ratio is not None:
        table.caption = f"decoding: {ratio:.2f} times"
    return table
