"""What the commands print: results on stdout, progress and notices on stderr, errors in red.

With ``--json`` stdout carries one JSON document and nothing else, and progress is off.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Update = Callable[[int, int, str], None]

#: Columns of tables that go to a file or a pipe.
WIDTH_OF_FILES = 120


class Reporter:
    """Prints for one command.

    Args:
        json_only: whether ``--json`` was given.
    """

    def __init__(self, json_only: bool = False) -> None:
        self.json_only = json_only
        self.out = Console(quiet=json_only, highlight=False)
        if not self.out.is_terminal:
            self.out.width = max(self.out.width, WIDTH_OF_FILES)
        self.err = Console(stderr=True, quiet=json_only, highlight=False)

    def notice(self, message: str) -> None:
        """Print a remark on stderr."""
        self.err.print(f"[yellow]note:[/] {_plain(message)}", soft_wrap=True)

    @contextmanager
    def stage(self, message: str) -> Iterator[None]:
        """Show what is being done, and afterwards how long it took."""
        start = time.perf_counter()
        with self.err.status(_plain(message)):
            yield
        self.err.print(f"[green]✓[/] {_plain(message)} [dim]{seconds(time.perf_counter() - start)}[/]")

    @contextmanager
    def bar(self, message: str, unit: str) -> Iterator[Update]:
        """Show a progress bar.

        Yields:
            A function of the amount done, the total, and what is being done.
        """
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[amount]}[/]"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}[/]"),
        )
        live = self.err.is_terminal and not self.json_only
        with Progress(
            *columns, console=self.err, transient=True, disable=not live, speed_estimate_period=120
        ) as progress:
            task = progress.add_task(_plain(message), total=None, amount="", detail="")
            printed = 0

            def update(done: int, total: int, detail: str = "") -> None:
                nonlocal printed
                amount = f"{count(done)} of {count(total)} {unit}"
                progress.update(task, completed=done, total=total, amount=amount, detail=_plain(detail))
                tenth = 10 * done // max(total, 1)
                if not live and tenth > printed and done < total:
                    printed = tenth
                    self.err.print(
                        f"  {10 * tenth} %  {amount}, {seconds(time.perf_counter() - start)}", style="dim"
                    )

            yield update
        self.err.print(f"[green]✓[/] {_plain(message)} [dim]{seconds(time.perf_counter() - start)}[/]")

    def print(self, *things: Any) -> None:
        """Print on stdout, unless JSON was asked for."""
        self.out.print(*things, soft_wrap=all(isinstance(thing, str) for thing in things))

    def print_json(self, data: Mapping[str, Any]) -> None:
        """Print JSON on stdout, if it was asked for; numbers that are not finite become null."""
        if self.json_only:
            typer.echo(json.dumps(_finite(dict(data)), indent=2, ensure_ascii=False, default=str))


def print_error(message: str) -> None:
    """Print an error in red on stderr."""
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)


def print_interrupted() -> None:
    """Say that Ctrl-C was heard."""
    Console(stderr=True, highlight=False).print("[bold red]interrupted:[/] nothing was written.")


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """A table of two columns: what, and how much."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, _plain(value))
    return table


def seconds(value: float) -> str:
    """A duration in words."""
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60):02d} s"


def size(value: float) -> str:
    """A number of bytes in words (1 MB = 10⁶ bytes)."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def count(value: float) -> str:
    """A count in words."""
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.2f} G"


def _plain(text: str) -> str:
    """Text with rich's markup escaped."""
    from rich.markup import escape

    return escape(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
