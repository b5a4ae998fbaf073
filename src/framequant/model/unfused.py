"""A fused module's own forward, run with linears in place of the matrices that it picks from stacked parameters.

``UnfusedExperts`` is what ``experts.unfuse_`` puts into a model; ``probe`` tells from one run on zeros whether a module
can be taken apart so. No names of models or parameters are known here.

Must not import layers or quantizers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from framequant.model.discovery import linears

_PRODUCTS = {"matmul", "mm", "bmm"}


class ExpertMatrix:
    """What a fused forward gets for ``weight[e]``: multiplying by it calls ``product``.

    Args:
        product: takes inputs (..., in) and whether the matrix was used as (in, out); returns (..., out).
        transposed: whether this is a transposed view of the stored matrix.
    """

    def __init__(self, product: Callable[[Tensor, bool], Tensor], transposed: bool = False) -> None:
        self._product, self._transposed = product, transposed

    @property
    def T(self) -> ExpertMatrix:  # noqa: N802 - torch's name
        """The transposed matrix."""
        return ExpertMatrix(self._product, not self._transposed)

    def t(self) -> ExpertMatrix:
        """The transposed matrix."""
        return self.T

    def to(self, *_: Any, **__: Any) -> ExpertMatrix:
        """Itself: a linear takes inputs of any float dtype."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Run the product that ``func`` stands for."""
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
        inputs, matrix, bias = named.get("input"), named.get("weight", named.get("mat2")), named.get("bias")
        name = getattr(func, "__name__", "")
        if not isinstance(matrix, cls) or (func is not functional.linear and name not in _PRODUCTS):
            raise TypeError(f"an expert's matrix cannot be used in {name}")
        is_linear = func is functional.linear
        outputs = matrix._product(inputs, matrix._transposed == is_linear)
        return outputs if bias is None else outputs + bias


class ExpertStack:
    """What a fused forward finds in place of a three-dimensional parameter.

    Args:
        shape: of the parameter.
        product: takes an expert's number, inputs and whether its matrix was used as (in, out).
        like: a tensor with the parameter's dtype and device.
    """

    def __init__(
        self, shape: torch.Size, product: Callable[[int, Tensor, bool], Tensor], like: Tensor | None
    ) -> None:
        self.shape, self._product = shape, product
        self.dtype = torch.get_default_dtype() if like is None else like.dtype
        self.device = torch.device("cpu") if like is None else like.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ExpertMatrix:
        number = int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"expert {number} of {len(self)}")
        return ExpertMatrix(lambda inputs, used_transposed: self._product(number, inputs, used_transposed))

    def __iter__(self) -> Iterator[ExpertMatrix]:
        return (self[number] for number in range(len(self)))

    def size(self, axis: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if axis is None else self.shape[axis]

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Run a batched product, one expert after the other."""
        inputs, stack = args if len(args) == 2 and not kwargs else (None, None)
        name = getattr(func, "__name__", "")
        if name not in _PRODUCTS or not isinstance(stack, cls) or inputs.ndim != 3:
            raise TypeError(f"stacked experts cannot be used in {name}")
        return torch.stack([stack._product(e, inputs[e], True) for e in range(len(stack))])


class _Borrowed(nn.Module):
    """A module that runs the forward of a fused one, with ``stack`` in place of its stacked parameters."""

    def __init__(self, fused: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        plain = {key: value for key, value in fused.__dict__.items() if key not in self.__dict__}
        self.__dict__.update(plain, _source=type(fused), _stacked=tuple(names))
        self.__dict__["_eager"] = inspect.unwrap(type(fused).forward)
        for key, parameter in fused._parameters.items():
            if key not in self._stacked:
                self.register_parameter(key, parameter)
        for key, buffer in fused._buffers.items():
            self.register_buffer(key, buffer, key not in fused._non_persistent_buffers_set)
        for key, child in fused._modules.items():
            self.add_module(key, child)

    def stack(self, name: str) -> ExpertStack:
        """What stands for the stacked parameter ``name``."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name in own.get("_stacked", ()):
            return self.stack(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_source" not in own or not hasattr(own["_source"], name):
                raise
            value = inspect.getattr_static(own["_source"], name)
            return value.__get__(self, own["_source"]) if hasattr(value, "__get__") else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The fused module's own forward."""
        return self._eager(self, *args, **kwargs)


class UnfusedExperts(_Borrowed):
    """Experts as linears: child ``str(e)`` holds expert e's linears under the names of the stacked parameters.

    Its forward equals the fused module's plain one; see the module's text.

    Args:
        fused: the module to take apart; its other parameters, buffers and children are taken over.
        transposed: for each stacked parameter whether its matrices lie (in, out).
    """

    def __init__(self, fused: nn.Module, transposed: dict[str, bool]) -> None:
        super().__init__(fused, transposed)
        self.__dict__["_transposed"] = dict(transposed)
        self.__dict__["_shapes"] = {name: getattr(fused, name).shape for name in transposed}
        self._is_hf_initialized = True  # transformers must not initialise what it does not know
        for number in range(self.num_stacked):
            expert = {
                name: _linear(getattr(fused, name).detach()[number], flip)
                for name, flip in transposed.items()
            }
            self.add_module(str(number), nn.ModuleDict(expert))
        self.train(fused.training)

    @property
    def num_stacked(self) -> int:
        """Number of experts."""
        return int(next(iter(self._shapes.values()))[0])

    def stack(self, name: str) -> ExpertStack:
        """The linears that stand for one stacked parameter."""
        experts = [self._modules[str(number)] for number in range(self.num_stacked)]
        first = experts[0][name]
        like = next((t for t in (*first.parameters(), *first.buffers()) if t.is_floating_point()), None)
        return ExpertStack(self._shapes[name], lambda number, inputs, _: experts[number][name](inputs), like)

    def fused(self) -> nn.Module:
        """The fused module again, of plain linears; what ``UnfusedExperts`` was made from, with today's weights."""
        module = self._source.__new__(self._source)
        nn.Module.__init__(module)
        hidden = {"_source", "_stacked", "_eager", "_transposed", "_shapes", "_is_hf_initialized"}
        plain = {k: v for k, v in self.__dict__.items() if k not in module.__dict__ and k not in hidden}
        module.__dict__.update(plain)
        experts = [self._modules[str(number)] for number in range(self.num_stacked)]
        for name, flip in self._transposed.items():
            weights = [expert[name].weight.detach() for expert in experts]
            stacked = torch.stack([weight.T if flip else weight for weight in weights])
            module.register_parameter(name, nn.Parameter(stacked, requires_grad=stacked.is_floating_point()))
        for key, parameter in self._parameters.items():
            module.register_parameter(key, parameter)
        for key, buffer in self._buffers.items():
            module.register_buffer(key, buffer, key not in self._non_persistent_buffers_set)
        for key, child in self._modules.items():
            if not key.isdigit():
                module.add_module(key, child)
        return module.train(self.training)


def _linear(matrix: Tensor, transposed: bool) -> nn.Linear:
    """A linear around one expert's matrix; a view of it where it lies (out, in)."""
    weight = matrix.T.contiguous() if transposed else matrix
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Probe(_Borrowed):
    """Records how a fused forward uses its stacked parameters; computes with zeros."""

    def __init__(self, fused: nn.Module, names: Iterable[str]) -> None:
        super().__init__(fused, names)
        self.__dict__["_shapes"] = {name: getattr(fused, name).shape for name in self._stacked}
        self.__dict__["used"] = {}
        for key, child in list(self._modules.items()):
            self._modules[key] = None if child is None else copy.deepcopy(child).to_empty(device="cpu").eval()
        for tensors in (self._parameters, self._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is not None:
                    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
                    tensors[key] = nn.Parameter(zeros, False) if tensors is self._parameters else zeros

    def stack(self, name: str) -> ExpertStack:
        def product(_: int, inputs: Tensor, used_transposed: bool) -> Tensor:
            rows, columns = self._shapes[name][1:]
            read, written = (rows, columns) if used_transposed else (columns, rows)
            if inputs.shape[-1] != read or self.used.setdefault(name, used_transposed) != used_transposed:
                raise ValueError(f"{name}: a product of another shape")
            return torch.zeros(*inputs.shape[:-1], written)

        return ExpertStack(self._shapes[name], product, None)


def probe(fused: nn.Module, names: Iterable[str]) -> dict[str, bool] | None:
    """How a module's forward uses its stacked parameters.

    Args:
        fused: owner of the parameters, on any device, meta included; it is not changed and its weights are not read.
        names: of the stacked parameters.

    Returns:
        For each name whether its matrices lie (in, out); None if the forward does more with one of them than to
        multiply by single matrices, or cannot be called in a way that is known here.
    """
    names = list(names)
    shapes = [tuple(getattr(fused, name).shape) for name in names]
    count = shapes[0][0]
    if any(shape[0] != count for shape in shapes) or linears(fused):
        return None
    with torch.device("cpu"), torch.no_grad():
        for width in dict.fromkeys(size for shape in shapes for size in shape[:0:-1]):
            for arguments in _example_calls(count, width):
                trial = _Probe(fused, names)
                try:
                    output = trial(*arguments)
                except Exception:  # whatever a forward of any library raises on arguments it does not take
                    continue
                if set(trial.used) == set(names) and isinstance(output, Tensor):
                    return {name: trial.used[name] for name in names}
    return None


def _example_calls(count: int, width: int) -> Iterator[tuple[Any, ...]]:
    """Ways in which fused experts are called: token t goes to expert t."""
    hidden = torch.zeros(count, width)
    yield hidden, torch.arange(count)[:, None], torch.ones(count, count)
    yield (hidden,)
    yield hidden, [1] * count
