"""``framequant serve``: an OpenAI-compatible server for a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from framequant.cli.console import Reporter
from framequant.cli.options import DeviceOption, DtypeOption, choose_device

NAME = "serve"
EXAMPLES = (
    "Examples:\n\n"
    "framequant serve smol-2bit\n\n"
    "framequant serve smol-2bit --host 0.0.0.0 --port 9000 --device cuda --dtype bfloat16"
)


def run(
    directory: Annotated[str, typer.Argument(help="A checkpoint of a language model, with its tokenizer.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Answer OpenAI's chat and completion requests with the model in DIRECTORY, until interrupted."""
    from framequant.integrations.serving import check_directory, serve, serve_class

    reporter = Reporter(False)
    path = check_directory(directory)
    serve_class()
    reporter.print(f"Serving http://{host}:{port}/v1 for the model name {path}; Ctrl-C ends it.")
    serve(path, host, port, choose_device(device), dtype)
