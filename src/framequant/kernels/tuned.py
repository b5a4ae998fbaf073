"""Which launches were measured to be better than those that ``launches`` computes: a table for this process' GPU.

A function of ``launches`` that is ``tunable`` looks here first. ``tuning`` fills the table. Pure, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple


class Knob(NamedTuple):
    """A decision of ``launches``.

    Attributes:
        name: of the function that takes it.
        arguments: that it gets.
    """

    name: str
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(str(int(argument)) for argument in self.arguments)})"


#: What to decide, by the knob's text: a bool, or the fields of a named tuple.
choices: dict[str, Any] = {}
_asked: list[dict[Knob, Any]] = []


def tunable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``choices`` overrule a function of integers that returns a bool or a named tuple of integers."""

    @wraps(function)
    def decide(*arguments: int) -> Any:
        knob, usual = Knob(function.__name__, arguments), function(*arguments)
        for asked in _asked:
            asked[knob] = usual
        chosen = choices.get(str(knob))
        if chosen is None:
            return usual
        return chosen if isinstance(usual, bool) else type(usual)(*chosen)

    return decide


@contextmanager
def recorded() -> Iterator[dict[Knob, Any]]:
    """Collect the decisions that are taken while the context lasts, each with what ``launches`` computes for it."""
    asked: dict[Knob, Any] = {}
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)
