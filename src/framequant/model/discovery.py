"""Find the repeated blocks of a model and the linears inside them, by structure and never by model name.

A *chain* is a ``ModuleList`` or ``Sequential`` whose children are of one class, most often of one shape, and
contain linears: the layers of a decoder, the blocks of one stage of a Swin transformer. Outer containers win
over inner ones, so the experts of a mixture are not mistaken for blocks; a container of stages of different
widths is passed over for the lists of blocks inside its stages.

Must not import layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from framequant.config import FrameQuantConfig
from framequant.errors import ConfigError, DiscoveryError


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be replaced: ``nn.Linear`` or GPT-2's transposed ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear with its weight stored (in, out)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear as (out_features, in_features); a view."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """All linears inside a module by their qualified name."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own three-dimensional parameters, stacks of matrices; convolutions have none."""
    if type(module).__module__ == nn.Conv1d.__module__:
        return []
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1
    ]


def stacked_weights(module: nn.Module) -> dict[str, int]:
    """Matrices that a block holds in parameters that are no linear's: fused experts that were not taken apart.

    Returns:
        Number of weights by the parameter's qualified name: stacks of matrices, and matrices larger than all linears
        of the block, as experts side by side are. Convolutions and embeddings are not among them.
    """
    largest = max((linear_weight(linear).numel() for linear in linears(module).values()), default=0)
    found: dict[str, int] = {}
    for name, owner in module.named_modules():
        stacks = stacked_parameters(owner)
        for key, parameter in owner.named_parameters(recurse=False):
            wide = parameter.ndim == 2 and parameter.numel() > largest and min(parameter.shape) > 1
            if key in stacks or (wide and not is_linear(owner) and not isinstance(owner, nn.Embedding)):
                found[f"{name}.{key}".lstrip(".")] = parameter.numel()
    return found


def find_blocks(model: nn.Module) -> dict[str, list[str]]:
    """Find the chains of repeated blocks.

    Returns:
        For each chain, by the name of its container, the qualified names of its blocks in order.

    Raises:
        DiscoveryError: the model has no repeated blocks with linears in them.
    """
    chains = dict(_chains(model, ""))
    if not chains:
        raise DiscoveryError(
            f"{type(model).__name__} has no repeated blocks: no ModuleList or Sequential of like modules with linears "
            "inside. Put the layers to quantize into a ModuleList of blocks."
        )
    return chains


def _chains(module: nn.Module, prefix: str) -> Iterator[tuple[str, list[str]]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList | nn.Sequential) and _is_chain(list(child)):
            yield path, [f"{path}.{key}" for key, _ in child.named_children()]
        else:
            yield from _chains(child, path)


def _is_chain(children: list[nn.Module]) -> bool:
    if not children or len({type(child) for child in children}) != 1:
        return False
    if is_linear(children[0]) or not all(linears(child) for child in children):
        return False
    shapes = Counter(_signature(child) for child in children)
    if len(children) == 1:
        return not any(_chains(children[0], ""))
    return shapes.most_common(1)[0][1] > 1 or not any(any(_chains(child, "")) for child in children)


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def select_linears(model: nn.Module, blocks: Iterable[str] | None, config: FrameQuantConfig) -> list[str]:
    """Names of the linears that the config's patterns select.

    Args:
        model: the whole model.
        blocks: names of its blocks; without ``include`` only linears inside them are selected. None for no such
            restriction.
        config: its ``include``, ``ignore`` and ``overrides``.

    Returns:
        Qualified names in module order.

    Raises:
        ConfigError: a pattern matches no linear; the message lists what there is to match.
        DiscoveryError: nothing is left to quantize.
    """
    names = list(linears(model))
    for kind, patterns in (
        ("include", config.include),
        ("ignore", config.ignore),
        ("override", config.overrides),
    ):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(f"{kind} pattern {pattern!r} matches no linear. {_examples(names)}")
    prefixes = ("",) if blocks is None else tuple(f"{block}." for block in blocks)
    if config.include:
        chosen = [name for name in names if any(re.search(pattern, name) for pattern in config.include)]
    else:
        chosen = [name for name in names if name.startswith(prefixes)]
    chosen = [name for name in chosen if not any(re.search(pattern, name) for pattern in config.ignore)]
    chosen = [name for name in chosen if config.for_linear(name) is not None]
    if not chosen:
        raise DiscoveryError(f"every linear is ignored, so nothing is left to quantize. {_examples(names)}")
    return chosen


def _examples(names: list[str]) -> str:
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))
    return "The model's linears are: " + ", ".join(kinds[:12]) + (", …" if len(kinds) > 12 else "") + "."
