"""What a model's block computes around our linears of one token, moved into them: fewer launches for a step.

A graph of ``torch.compile`` is searched for the patterns that transformers' models have: a root-mean-square norm
before a linear, ``silu(gate) up`` before one, a sum behind one, and rotated queries and keys before our attention. What
is found becomes arguments of our operators, which round less often than the graph did; what is not found stays.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from torch.nn import functional

from framequant.kernels import launches
from framequant.kernels.transform_plan import in_one

#: Python's own operators that change what they are given.
_IN_PLACE = {"setitem", *(name for name in dir(operator) if name[0] == "i" and name[1:] in dir(operator))}
#: Places of arguments of ``framequant::lane_linear`` and ``framequant::one_query``.
X, COLUMNS, SIZES, BLOCK_IN, ROWS, BLOCK_OUT = 1, 4, 5, 6, 12, 13
QUERY, KEY = 0, 1
_SAME_ORDER = ("reshape", "view", "contiguous", "flatten")


def compile_fused(
    graph: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any] | None = None
) -> Any:
    """A backend of ``torch.compile``: inductor, after ``fuse_graph_``."""
    from torch._inductor.compile_fx import compile_fx

    fuse_graph_(graph)
    return compile_fx(graph, list(inputs), config_patches=options or None)


def fuse_graph_(module: fx.GraphModule) -> int:
    """Move what stands around our operators into them, in place.

    Args:
        module: as ``torch.compile`` gives it to a backend: calls of torch, one token, values in ``meta``.

    Returns:
        How many moves were made.
    """
    graph, made = module.graph, 0
    norms = {**found(graph, _norm), **found(graph, _own_norm)}
    linears = calls(graph, "lane_linear")
    made += sum(_take_norm(node, norms) + _take_gate(node) for node in linears)
    made += sum(_take_sum(node) for node in linears)  # last: ``norms`` may name the sums
    for node in calls(graph, "one_query"):
        made += _take_angles(node)
    graph.eliminate_dead_code(_writes)
    graph.lint()
    module.recompile()
    return made


def _writes(node: fx.Node) -> bool:
    """Whether a node does more than to make its result: in place, as fx itself does not ask, or to an ``out``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    return node.is_impure() or in_place or "out" in node.kwargs


def calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    """Calls of one of our operators; of none if its module was not imported."""
    packet = getattr(torch.ops.framequant, name, None)
    return [] if packet is None else [node for node in graph.nodes if node.target in (packet, packet.default)]


def found(graph: fx.Graph, pattern: Callable[..., Any]) -> dict[fx.Node, tuple[Any, ...]]:
    """Results of a pattern in a graph, and for each what stands for the pattern's arguments."""
    matches = SubgraphMatcher(fx.symbolic_trace(pattern).graph).match(graph)
    return {match.returning_nodes[0]: tuple(match.placeholder_nodes) for match in matches}


def _norm(x, weight, epsilon, dtype):  # type: ignore[no-untyped-def]
    """As transformers' models of Llama's kind write it."""
    whole = x.to(torch.float32)
    whole = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * whole.to(dtype)


def _own_norm(x, shape, weight, epsilon):  # type: ignore[no-untyped-def]
    """Torch's own, as ``nn.RMSNorm`` calls it."""
    return torch.rms_norm(x, shape, weight, epsilon)


def _rotation(half: int) -> Callable[..., Any]:
    def rotated(x, cos, sin):  # type: ignore[no-untyped-def]
        """The halves of a head rotated by angles, as transformers' models of Llama's kind write it."""
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    return rotated


def _source(node: Any) -> Any:
    """What a node is, but for its shape: the numbers and their order are the same."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _SAME_ORDER:
        node = node.args[0]
    return node


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _row(node: fx.Node, before: fx.Node) -> fx.Node:
    """A node as one row of numbers, made before another."""
    with before.graph.inserting_before(before):
        return before.graph.call_method("reshape", (node, 1, -1))


def _take_norm(node: fx.Node, norms: dict[fx.Node, tuple[Any, ...]]) -> int:
    """Where every program of a linear analyses for itself, it can norm as well."""
    source = _source(node.args[X])
    threads = 32 * launches.LANE_WARPS
    if source not in norms or not in_one(node.args[SIZES], node.args[BLOCK_IN], threads):
        return 0
    arguments = [argument for argument in norms[source] if isinstance(argument, fx.Node | float)]
    if len(arguments) != 3 or not isinstance(arguments[2], float):
        return 0
    x, weight, epsilon = arguments
    node.update_arg(X, _row(x, node))
    node.kwargs = {**node.kwargs, "weight": weight, "epsilon": epsilon}
    return 1


def _take_gate(node: fx.Node) -> int:
    """Where a linear's analysis is a launch of its own by rows, it can make ``silu(gate) x``."""
    source = _source(node.args[X])
    if not node.args[COLUMNS] or not isinstance(source, fx.Node) or source.target is not operator.mul:
        return 0
    for gate, x in (source.args, source.args[::-1]):
        plain = (
            isinstance(gate, fx.Node)
            and gate.target is functional.silu
            and gate.args
            and isinstance(x, fx.Node)
        )
        if plain and _shape(gate.args[0]) == _shape(x) is not None:
            node.update_arg(X, _row(x, node))
            node.kwargs = {**node.kwargs, "gate": _row(gate.args[0], node)}
            return 1
    return 0


def _shape(node: Any) -> torch.Size | None:
    value = _value(node) if isinstance(node, fx.Node) else None
    return None if value is None else value.shape


def _take_sum(node: fx.Node) -> int:
    """Where a linear writes outputs, what is added to all of them can be added there."""
    if not node.args[BLOCK_OUT]:
        return 0
    last = [node, *_only_users(node)][-1]
    if len(last.users) != 1:
        return 0
    total, value = next(iter(last.users)), _value(last)
    if (
        total.target is not operator.add
        or len(total.args) != 2
        or value is None
        or value.numel() != node.args[ROWS]
    ):
        return 0
    others = [argument for argument in total.args if argument is not last]
    other = _value(others[0]) if len(others) == 1 and isinstance(others[0], fx.Node) else None
    if other is None or other.shape != value.shape or other.dtype != value.dtype or not others[0] < node:
        return 0
    node.kwargs = {**node.kwargs, "added": _row(others[0], node)}
    total.replace_all_uses_with(last)
    return 1


def _only_users(node: fx.Node) -> Iterator[fx.Node]:
    """The outputs of a linear and their other shapes, one after the other, while each has one user."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is not operator.getitem and not (
            node.op == "call_method" and node.target in _SAME_ORDER
        ):
            return
        yield node


def _take_angles(node: fx.Node) -> int:
    """Attention rotates the query and the key of its step itself."""
    q, k = node.args[QUERY], node.args[KEY]
    shape = _shape(q)
    if shape is None or "cos" in node.kwargs:
        return 0
    rotated = found(node.graph, _rotation(shape[-1] // 2))
    if q not in rotated or k not in rotated or rotated[q][1:] != rotated[k][1:]:
        return 0
    cos, sin = rotated[q][1:]
    angles = _shape(cos)
    if angles is None or len(angles) != 4 or angles[1:] != (1, 1, shape[-1]):
        return 0
    node.update_arg(QUERY, rotated[q][0])
    node.update_arg(KEY, rotated[k][0])
    node.kwargs = {**node.kwargs, "cos": cos, "sin": sin}
    return 1
