"""Take fused experts apart: matrices stacked in three-dimensional parameters become linears that can be quantized.

A mixture of experts often holds one parameter (experts, rows, columns) per projection and picks ``weight[e]`` inside
its forward. ``UnfusedExperts`` runs that very forward, but what it finds in place of the parameter is a stack of
linears: a product with the e-th matrix runs the e-th linear. So activations, gates and routing stay whatever the
model's author wrote, and hooks, capture and checkpoints see plain linears ``experts.3.down_proj``.

Which modules qualify is decided by running their forward once on zeros, with recorders in place of the stacked
parameters (``probe``): all uses must be products with one matrix (``linear``, ``@``, ``bmm``). That run also says
whether the matrices lie (out, in) or (in, out). No names of models or parameters are known here.

Must not import layers or quantizers.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from framequant.model.discovery import linear_weight, linears, stacked_parameters

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


def find_fused(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Modules that ``unfuse_`` can take apart.

    Returns:
        For each, by qualified name, its stacked parameters and whether their matrices lie (in, out).
    """
    found: dict[str, dict[str, bool]] = {}
    known: dict[Any, dict[str, bool] | None] = {}
    for path, module in model.named_modules():
        names = stacked_parameters(module) if not isinstance(module, _Borrowed) else []
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
