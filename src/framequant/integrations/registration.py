"""Make transformers and PEFT know framequant as soon as both are imported, whichever comes first, importing neither.

``import framequant`` must stay light, so it does not import them; a finder waits for the module of theirs that we
add to, transformers' registry of quantizers or PEFT's ``LoraConfig``, and registers ours right after.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Module of theirs: module of ours whose ``register`` takes it.
HOOKS = {
    "transformers.quantizers.auto": "framequant.integrations.transformers",
    "peft.tuners.lora.config": "framequant.integrations.peft",
}


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module, once, and wraps its loader."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(self.name, module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with each library now, or when it is imported."""
    for name in HOOKS:
        module = sys.modules.get(name)
        if module is not None:
            _register(name, module)
        else:
            sys.meta_path.insert(0, _RegisterAfterImport(name))


def _register(name: str, module: ModuleType) -> None:
    ours = sys.modules.get(HOOKS[name])
    if ours is not None and not hasattr(ours, "register"):
        return  # It is being imported right now, and is what imported theirs; it registers itself at its end.
    importlib.import_module(HOOKS[name]).register(module)
