"""Make transformers know framequant as soon as both are imported, whichever comes first, importing neither.

``import framequant`` must stay light, so it does not import transformers; a finder waits for transformers'
registry of quantizers to be imported and registers ours right after.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module, once, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with transformers now, or when it is imported."""
    registry = sys.modules.get(REGISTRY)
    if registry is not None:
        _register(registry)
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register(registry: ModuleType) -> None:
    ours = sys.modules.get("framequant.integrations.transformers")
    if ours is not None and not hasattr(ours, "register"):
        return  # It is being imported right now, and is what imported transformers; it registers itself at its end.
    from framequant.integrations import transformers

    transformers.register(registry)
