"""Runs the code blocks of a Markdown page in order, in one folder, on tiny stand-ins of the models they name.

``python`` blocks share one namespace per page. Lines of ``bash`` blocks that begin with ``framequant`` run in
this process; those with ``--tune`` or under ``torchrun``, the demo, and blocks after ``<!-- parse: WHY -->`` are only
parsed, which checks every option. Of other commands the extras, targets and scripts they name must exist. Anything
else is an error.
"""

from __future__ import annotations

import re
import shlex
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from framequant.cli.app import app
from tests.conftest import ROOT

FENCE = re.compile(
    r"(?:<!-- (?P<mark>parse): [^>]*-->\n)?^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```", re.M | re.S
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
KINDS = {"python", "bash", "json", "text", "yaml", ""}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    code: str
    line: int
    parse_only: bool


def blocks(text: str) -> list[Block]:
    """Every fenced block in order."""
    found = [
        Block(m["kind"], m["code"], text.count("\n", 0, m.start("code")) + 1, m["mark"] == "parse")
        for m in FENCE.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^```", text, re.M)), "a fence is not closed"
    assert {block.kind for block in found} <= KINDS, {block.kind for block in found} - KINDS
    return found


def run_page(page: Path, namespace: dict[str, Any] | None = None) -> int:
    """Run the blocks of a page in the current folder.

    Returns:
        How many were executed or parsed.
    """
    names: dict[str, Any] = {"__name__": "page", **(namespace or {})}
    count = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.kind == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "framequant: ")  # our own notices, which the pages explain
                if not block.parse_only:
                    exec(code, names)
            count += 1
        elif block.kind == "bash":
            for command in commands(block.code):
                run_command(command, where, block.parse_only)
            count += 1
    return count


def commands(code: str) -> list[list[str]]:
    """The commands of a bash block as words, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], where: str, parse_only: bool = False) -> None:
    """Run or check one command."""
    program, arguments = Path(words[0]).name, words[1:]
    if program == "framequant":
        _framequant(arguments, where, parse_only)
    elif program == "torchrun":
        _framequant(words[words.index("framequant") + 1 :], where, parse_only=True)
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(EXTRAS), f"{where}: no extra {extra}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets), f"{where}: {arguments} is no target of the Makefile"
    elif program == "python" and arguments[0].endswith(".py"):
        script = ROOT / arguments[0]
        assert script.is_file(), f"{where}: no script {arguments[0]}"
        for option in [word for word in arguments if word.startswith("--") and word != "--help"]:
            assert option in script.read_text(), f"{where}: {arguments[0]} has no option {option}"
    else:
        raise AssertionError(f"{where}: no rule for the command {program!r}")


def _framequant(arguments: list[str], where: str, parse_only: bool) -> None:
    if parse_only or "--tune" in arguments or (arguments[0] == "demo" and "--help" not in arguments):
        group = typer.main.get_command(app)
        command = group.commands[arguments[0]]
        command.make_context(arguments[0], list(arguments[1:]))  # raises a usage error for unknown options
        return
    result = CliRunner().invoke(app, arguments)
    message = result.stderr if result.exit_code == 2 else f"{result.stderr}{result.exception!r}"
    assert result.exit_code == 0, f"{where}: framequant {shlex.join(arguments)}\n{message}"
