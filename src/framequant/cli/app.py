"""The command ``framequant``: its subcommands, and how errors become messages and exit codes.

Exit codes: 0 done; 2 a user's error, with one message on stderr; 130 interrupted; 1 a bug, with a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from framequant.cli import bench, demo, evaluate, export, generate, inspect, quantize, report, serve
from framequant.cli.console import print_error, print_interrupted

#: A walk allocates and frees gigabytes of many sizes; without this torch came to hold 13 GB of a GPU in holes. Torch
#: reads it when it first uses a GPU, and a user's own setting wins.
if sys.platform == "linux":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

#: Errors of the operating system that a user can act on; their message is enough.
_USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG}


class ErrorHandlingGroup(TyperGroup):
    """Turns this package's errors into one red message and exit code 2, Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_interrupted()
            raise typer.Exit(130) from None
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            print_error(message)
            raise typer.Exit(2) from error


def user_message(error: Exception) -> str | None:
    """The message for an error that the user can act on; None for a bug."""
    from framequant.errors import FrameQuantError

    if isinstance(error, FrameQuantError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Nothing was written."
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full. Use --device cpu, fewer --samples or a smaller --sequence-length."
    return None


app = typer.Typer(
    name="framequant",
    cls=ErrorHandlingGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quantize, evaluate, inspect, report, generate, bench, export, serve, demo):
    app.command(command.NAME, epilog=command.EXAMPLES)(command.run)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"framequant {version('framequant')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize vision transformers and language models to two point something bits, in fusion-frame space."""


def main() -> None:
    """Entry point of the command ``framequant``."""
    try:
        app(prog_name="framequant")
    except KeyboardInterrupt:
        print_interrupted()
        sys.exit(130)
