"""Bounds on the output of a whole network, by following its graph: linears, activations that keep zero, and sums.

A symbolic trace (torch.fx) gives the graph of feed-forward and residual networks alike; each tensor carries a bound on
its norm in the float network and on its distance from the quantized one. Where the graph holds anything without a
global Lipschitz constant (attention, norms of activations), there is no bound, and the reason is reported.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from framequant.layers import FrameLinear
from framequant.quantizers.bounds import Bound, LayerFacts, Spread, activation, add, affine
from framequant.quantizers.sigma_delta_weight import DataFreeResult

#: Lipschitz constants of activations that map 0 to 0. GELU's steepest slope is 1.1289, SiLU's 1.0998.
LIPSCHITZ_MODULES: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Hardtanh: 1.0,
    nn.GELU: 1.13,
    nn.SiLU: 1.1,
    nn.Identity: 1.0,
    nn.Dropout: 1.0,
    nn.Flatten: 1.0,
    nn.Unflatten: 1.0,
}
LIPSCHITZ_FUNCTIONS: dict[Any, float] = {
    torch.relu: 1.0,
    functional.relu: 1.0,
    functional.gelu: 1.13,
    functional.silu: 1.1,
    functional.dropout: 1.0,
    torch.tanh: 1.0,
    torch.flatten: 1.0,
}
LIPSCHITZ_METHODS = {"relu": 1.0, "tanh": 1.0, "flatten": 1.0, "view": 1.0, "reshape": 1.0}
_SUMS = {operator.add, operator.iadd, torch.add}


class _NoBoundError(Exception):
    """The graph holds something that has no global bound."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Quantized linears are nodes, like torch's own modules."""
        return isinstance(m, FrameLinear) or super().is_leaf_module(m, module_qualified_name)


def network_bounds(
    model: nn.Module, results: Mapping[str, DataFreeResult], radius: float | None = None
) -> dict[str, Any]:
    """Bound the output error of a quantized model, a priori and a posteriori.

    Args:
        model: after quantization.
        results: what was found for each quantized linear.
        radius: bound on the norm of the input; by default ``sqrt(features)`` of the first linear, which holds for
            entries in [-1, 1].

    Returns:
        ``radius`` and, where it exists, ``a_priori`` and ``a_posteriori``, each with value, reference (the bound on
        the float output's norm) and ``vacuous``; else ``reason``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(model)
    except Exception as error:  # fx raises whatever the model's control flow raises on a proxy
        return {"reason": f"the model cannot be traced symbolically: {type(error).__name__}"}
    first = next(iter(results.values())).quantized.spec
    if radius is None:
        radius = first.in_features**0.5
    found: dict[str, Any] = {"radius": radius}
    prior = {name: result.prior for name, result in results.items()}
    posterior = {name: result.posterior for name, result in results.items()}
    try:
        found["a_posteriori"] = _as_dict(follow(model, graph, posterior, radius))
        if any(facts is None for facts in prior.values()):
            found["reason"] = "no a-priori bound: some step given by its value overloads"
        else:
            found["a_priori"] = _as_dict(follow(model, graph, prior, radius))
    except _NoBoundError as error:
        return {"reason": str(error)}
    return found


def follow(
    model: nn.Module, graph: fx.Graph, facts: Mapping[str, LayerFacts | None], radius: float
) -> Spread:
    """Carry a spread through a graph.

    Args:
        model: the module that was traced.
        graph: its graph.
        facts: norms of every quantized linear by name.
        radius: bound on the norm of the input.
    """
    spreads: dict[fx.Node, Spread] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            spreads[node] = Spread(radius)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise _NoBoundError("the model returns more than one tensor")
            return spreads[node.args[0]]
        else:
            spreads[node] = _step(model, node, facts, spreads)
    raise _NoBoundError("the model returns nothing")


def _step(
    model: nn.Module, node: fx.Node, facts: Mapping[str, LayerFacts | None], spreads: Mapping[fx.Node, Spread]
) -> Spread:
    inputs = [spreads[argument] for argument in node.args if isinstance(argument, fx.Node)]
    if node.op == "call_module":
        known = facts.get(str(node.target))
        if known is not None:
            return affine(known, inputs[0])
        module = model.get_submodule(str(node.target))
        constant = LIPSCHITZ_MODULES.get(type(module))
        if constant is not None:
            return activation(constant, inputs[0])
        raise _NoBoundError(f"{node.target} ({type(module).__name__}) has no global Lipschitz constant here")
    if node.op == "call_function":
        if node.target in _SUMS and len(inputs) == 2 and not node.kwargs:
            return add(*inputs)
        if node.target in LIPSCHITZ_FUNCTIONS:
            return activation(LIPSCHITZ_FUNCTIONS[node.target], inputs[0])
    if node.op == "call_method" and node.target in LIPSCHITZ_METHODS:
        return activation(LIPSCHITZ_METHODS[str(node.target)], inputs[0])
    raise _NoBoundError(f"{node.op} {node.target} has no global Lipschitz constant here")


def _as_dict(spread: Spread) -> dict[str, float | bool]:
    error, radius = (torch.tensor(value, dtype=torch.float64) for value in (spread.error, spread.radius))
    return Bound(error, radius).to_dict()
