"""Take fused experts apart: matrices stacked in three-dimensional parameters become linears that can be quantized.

A mixture of experts often holds one parameter (experts, rows, columns) per projection and picks ``weight[e]`` inside
its forward. ``UnfusedExperts`` runs that very forward, but what it finds in place of the parameter is a stack of
linears: a product with the e-th matrix runs the e-th linear. So activations, gates and routing stay whatever the
model's author wrote, and hooks, capture and checkpoints see plain linears ``experts.3.down_proj``.

Which modules qualify is decided by running their forward once on zeros (``unfused.probe``): all uses of the stacked
parameters must be products with one matrix (``linear``, ``@``, ``bmm``).

Must not import layers or quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from framequant.model.discovery import linear_weight, linears, stacked_parameters
from framequant.model.unfused import UnfusedExperts, probe

__all__ = [
    "UnfusedExperts",
    "families",
    "find_fused",
    "fuse_",
    "is_expert",
    "mixtures",
    "put_back_unselected",
    "routers",
    "unfuse_",
]


def find_fused(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Modules that ``unfuse_`` can take apart.

    Returns:
        For each, by qualified name, its stacked parameters and whether their matrices lie (in, out).
    """
    found: dict[str, dict[str, bool]] = {}
    known: dict[Any, dict[str, bool] | None] = {}
    for path, module in model.named_modules():
        names = stacked_parameters(module) if not isinstance(module, UnfusedExperts) else []
        if not path or not names:
            continue
        kind = type(module), tuple((name, tuple(getattr(module, name).shape)) for name in names)
        if kind not in known:
            known[kind] = probe(module, names)
        layout = known[kind]
        if layout is not None:
            found[path] = layout
    return found


def unfuse_(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Replace fused experts by linears, in place.

    Args:
        model: on any device; a skeleton on the meta device gets linears there.
        names: of the linears that are wanted, of this model or of one that it is a part or the whole of; fused
            modules that hold none of them stay as they are. None for all.

    Returns:
        The fused modules that were replaced, by qualified name.
    """
    owners = None if names is None else {_owner(name) for name in names if is_expert(name)}
    replaced: dict[str, nn.Module] = {}
    if owners is not None and not owners:
        return replaced
    for path, layout in find_fused(model).items():
        if owners is None or any(_same_place(path, owner) for owner in owners):
            replaced[path] = fused = model.get_submodule(path)
            model.set_submodule(path, UnfusedExperts(fused, layout))
    return replaced


def is_expert(name: str) -> bool:
    """Whether a linear's name may be one of an unfused expert: its last part but one is a number."""
    parts = name.split(".")
    return len(parts) > 2 and parts[-2].isdigit()


def _owner(name: str) -> str:
    return name.rsplit(".", 2)[0]


def _same_place(path: str, owner: str) -> bool:
    """Whether two names can be of one module, seen from a model and from a part of it."""
    return path == owner or path.endswith(f".{owner}") or owner.endswith(f".{path}")


def fuse_(model: nn.Module) -> nn.Module:
    """Undo ``unfuse_`` where all experts are plain linears: what a float model's own classes load."""
    for path, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            parts = [expert for key, expert in module._modules.items() if key.isdigit()]
            if all(isinstance(linear, nn.Linear) for expert in parts for linear in expert.values()):
                model.set_submodule(path, module.fused())
    return model


def put_back_unselected(model: nn.Module, fused: dict[str, nn.Module], selected: Iterable[str]) -> list[str]:
    """Put fused modules back of whose linears none is selected.

    Args:
        model: updated.
        fused: from ``unfuse_``; emptied, so that the stacked parameters can be freed.
        selected: names of linears.

    Returns:
        Names of the modules that were put back.
    """
    wanted = {_owner(name) for name in selected if is_expert(name)}
    unwanted = [path for path in fused if path not in wanted]
    for path in unwanted:
        model.set_submodule(path, fused[path])
    fused.clear()
    return unwanted


def mixtures(model: nn.Module, blocks: Iterable[str]) -> dict[str, list[str]]:
    """What may hold experts: unfused ones, and lists or dictionaries of like modules inside a block.

    Args:
        model: with its experts unfused.
        blocks: names of its blocks.

    Returns:
        Names of the experts inside each, by its qualified name. Whether tokens are shared out among them is seen when
        the model runs.
    """
    found: dict[str, list[str]] = {}
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if path == block or not isinstance(module, UnfusedExperts | nn.ModuleList | nn.ModuleDict):
                continue
            experts = {key: child for key, child in module.named_children() if linears(child)}
            shapes = [[parameter.shape for parameter in child.parameters()] for child in experts.values()]
            if len(experts) > 1 and all(shape == shapes[0] for shape in shapes):
                found[path] = list(experts)
    return found


def families(model: nn.Module, blocks: Iterable[str]) -> dict[str, str]:
    """For each linear that may be an expert's, the name that it shares with that linear of its fellow experts."""
    found: dict[str, str] = {}
    for path, experts in mixtures(model, blocks).items():
        for expert in experts:
            for name in linears(model.get_submodule(f"{path}.{expert}")):
                found.setdefault(f"{path}.{expert}.{name}".rstrip("."), f"{path}.{name}".rstrip("."))
    return found


def routers(model: nn.Module, blocks: Iterable[str]) -> set[str]:
    """Linears beside experts that route: one output for each expert; beside unfused ones also a single output.

    Where several linears have as many outputs as there are experts, those named gate or router.
    """
    found: set[str] = set()
    for path, experts in mixtures(model, blocks).items():
        mixture = path.rpartition(".")[0]
        outputs = {
            f"{mixture}.{name}": linear_weight(linear).shape[0]
            for name, linear in linears(model.get_submodule(mixture)).items()
            if not f"{mixture}.{name}".startswith(f"{path}.")
        }
        choices = [name for name, count in outputs.items() if count == len(experts)]
        if len(choices) > 1:
            choices = [name for name in choices if re.search("gate|router", name.removeprefix(mixture))]
        found.update(choices)
        if isinstance(model.get_submodule(path), UnfusedExperts):
            found.update(name for name, count in outputs.items() if count == 1)
    return found
