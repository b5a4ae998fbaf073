"""Triton's interpreter without a third of its work: imported by what tests run in it.

At every call of one ``jit`` function by another it looks through all of ``triton.language`` for what it is to replace,
though the kernel's start has replaced it. Here it does so once for each module in a run of a kernel. Where Triton has
other names than these, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

_patched: set[int] = set()


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def patch_new(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in _patched:
            return None
        _patched.add(module)
        return patch(fn)

    return patch_new


def _anew(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_anew(*args: Any, **kwargs: Any) -> Any:
        _patched.clear()  # the end of a run restores what it replaced
        return run(*args, **kwargs)

    return run_anew


if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor"):
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter.GridExecutor.__call__ = _anew(interpreter.GridExecutor.__call__)
