"""Linears of a loaded model joined for speed: those that read one input share one analysis and one product.

``fuse_`` finds them by structure: linears of one module whose specs name the same input frame, as quantization gives
it to linears that read one input (q, k and v; gate and up). Each place keeps a module of its own, so that any model's
code runs as it is: the first to be called with a tensor computes all, the others find their outputs. A tensor that
the others do not get costs time, never a wrong answer.

What is kept of the codes is the kernels' arrangement alone; ``unfuse_`` gives the ``FrameLinear`` back, bit for bit.

Must not import models, checkpoints or integrations; imports triton only where it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from framequant import storage
from framequant.errors import CheckpointError
from framequant.kernels import launches
from framequant.layers import FrameLinear
from framequant.spec import LinearSpec

_DTYPES = (torch.float16, torch.bfloat16)


class FusedLinears(nn.Module):
    """Linears with one input frame, computed together; not safe to call from two threads at once.

    Args:
        layers: which ``fuse_`` found to belong together; they are not changed, and not kept.
        plans: their ``TritonPlan``, which ``triton_group.can_join`` allows together.

    Attributes:
        specs: of the linears, in order.
    """

    words: Tensor
    scales: Tensor

    def __init__(self, layers: list[FrameLinear], plans: list[Any]) -> None:
        super().__init__()
        self.specs = [layer.spec for layer in layers]
        self._frames = [layer.frames for layer in layers]
        self._right: dict[tuple[torch.dtype, int], bool] = {}
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._hold(layers, plans)

    def _hold(self, layers: list[FrameLinear], plans: list[Any]) -> None:
        from framequant.kernels import triton_group, triton_linear

        for number, layer in enumerate(layers):
            self.register_parameter(f"bias{number}", layer.bias)
        self._group = triton_group.join(plans)
        self._loops = triton_linear.loops(self._group.joined, sum(self._group.rows))
        self.register_buffer("words", self._group.joined.words)
        self.register_buffer("scales", self._group.joined.scales)

    @torch.compiler.assume_constant_result
    def serves(self, dtype: torch.dtype, tokens: int = 1) -> bool:
        """Whether the kernels serve so many tokens of ``dtype``; plain torch is asked once for a kind of linears.

        ``torch.compile`` runs this while it traces, for real.
        """
        key = dtype, launches.tokens_to_check(tokens, self._loops)
        if key not in self._right:
            if self.words.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            from framequant.kernels import triton_group

            self._right[key] = triton_group.is_right(self._group, self._frames, dtype, tokens)
        return self._right[key]

    def stored(self, number: int) -> dict[str, Tensor]:
        """The stored tensors of a linear, as the checkpoint has them; new tensors."""
        from framequant.kernels import triton_group

        return triton_group.stored(self._group.members[number])

    def bias(self, number: int) -> Tensor | None:
        """The bias of a linear, or None."""
        found = getattr(self, f"bias{number}")
        return found if found is None else found.detach()

    def layer(self, number: int) -> FrameLinear:
        """One of the linears as it was; new tensors."""
        layer = FrameLinear.from_tensors(self.specs[number], self.stored(number), self.bias(number))
        return layer.train(self.training)

    def forward(self, inputs: Float[Tensor, "*b n"]) -> tuple[Tensor, ...]:
        """Outputs of all linears for one input."""
        from framequant.kernels import triton_group, triton_linear

        size = self.specs[0].in_features
        kind = launches.tokens_to_check(inputs.numel() // size, self._loops)
        if triton_linear.takes(inputs, size) and self.serves(inputs.dtype, kind):
            return triton_group.linears(self._group, inputs)
        return triton_group.plain(self._group, self._frames, inputs)

    def output(self, number: int, inputs: Tensor) -> Tensor:
        """One linear's output; all are computed when the first is asked for, and each is handed out once."""
        if self._input is not inputs or self._outputs[number] is None:
            self._outputs = list(self(inputs))
            self._input = inputs
        found, self._outputs[number] = self._outputs[number], None
        assert found is not None
        if all(output is None for output in self._outputs):
            self._input = None
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLinears:
        """Move with the model, the stored dtypes kept as ``FrameLinear`` keeps them."""
        with torch.no_grad():
            if all(fn(tensor) is tensor for tensor in (self.words, *self.parameters(recurse=False))):
                return self
        layers = [self.layer(number)._apply(fn) for number in range(len(self.specs))]
        self._input, self._outputs, self._right = None, [], {}
        self._hold(layers, [_plan(layer) for layer in layers])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinears:
        """Copy tensors once, though plans and buffers share them."""
        layers = [self.layer(number) for number in range(len(self.specs))]
        copy = FusedLinears(layers, [_plan(layer) for layer in layers]).train(self.training)
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: no outputs that wait."""
        return {**self.__dict__, "_input": None, "_outputs": []}


class FusedLinear(nn.Module):
    """One of the linears of a ``FusedLinears``, at its place in the model.

    Args:
        group: the linears.
        number: of this one; the first holds the group as its submodule.
    """

    def __init__(self, group: FusedLinears, number: int) -> None:
        super().__init__()
        self._group, self.number = (group,), number  # in a tuple: no submodule
        self.spec: LinearSpec = group.specs[number]
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        if number == 0:
            self.group = group

    def forward(self, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
        """Apply the linear."""
        return self._group[0].output(self.number, inputs)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        return self._group[0].bias(self.number)

    @property
    def weight(self) -> Float[Tensor, "o n"]:
        """Dense weight, computed at every access: for code that only asks for its dtype or device."""
        return self.unfused().weight

    def unfused(self) -> FrameLinear:
        """The linear as it was; new tensors."""
        return self._group[0].layer(self.number)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        shared = len(self._group[0].specs)
        return f"in_features={self.in_features}, out_features={self.out_features}, fused={shared}"


def _plan(layer: FrameLinear) -> Any:
    from framequant.kernels import triton_linear

    return triton_linear.triton_plan(layer.spec, layer.tensors, layer.frames, layer.bias)


def _is_free(layer: nn.Module, anywhere: bool) -> bool:
    """Whether a module is a quantized linear that may be replaced."""
    if type(layer) is not FrameLinear or layer.backend == "reference" or layer.spec.activation is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return False
    trained = layer.bias is not None and layer.bias.requires_grad
    if trained or storage.holds_bias(layer.spec):
        return False
    return anywhere or layer.tensors["packed_codes"].is_cuda


def groups(model: nn.Module, anywhere: bool = False) -> Iterator[list[str]]:
    """Names of the linears that can be joined: of one module, with one input frame, its signs included.

    Args:
        model: a quantized model.
        anywhere: also where tensors are not on a GPU.

    Yields:
        Names in module order; lists of one for linears that share with none.
    """
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FrameLinear) and _is_free(module, anywhere):
            key = name.rpartition(".")[0], module.spec.frame_in, module.packed_codes.device
            found.setdefault(key, []).append(name)
    yield from found.values()


def fuse_(model: nn.Module, join: bool = True) -> list[tuple[str, ...]]:
    """Join the linears of a model that read one input, in place, for inference on a GPU in float16 or bfloat16.

    Outputs are those of the unfused model up to the order of float32 sums. Linears that no GPU kernel covers, that
    have hooks or that were told to use the reference backend stay as they are; on a CPU all do. A fused model is
    saved after ``unfuse_``.

    Args:
        model: quantized, on its device.
        join: compute linears that read one input together; if False each for itself, which saves the same memory.

    Returns:
        For each module that was made the names of its linears; one name where a linear shares its input with none,
        which saves memory: the kernels' arrangement of the codes takes the place of the stored one.
    """
    try:
        from framequant.kernels import triton_group
        from framequant.kernels.triton_support import COMPILED
    except ImportError:
        return []
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in _DTYPES:
        return []
    made = []
    for names in groups(model, anywhere=not bool(COMPILED)):
        layers: list[Any] = [model.get_submodule(name) for name in names]
        plans = [_plan(layer) for layer in layers]
        for numbers in _alike(plans, triton_group.can_join if join else lambda _: False):
            group = FusedLinears([layers[i] for i in numbers], [plans[i] for i in numbers])
            if not group.serves(dtype):
                continue
            for place, number in enumerate(numbers):
                stand_in = FusedLinear(group, place).train(layers[number].training)
                model.set_submodule(names[number], stand_in)
                layers[number].forget_prepared()
            made.append(tuple(names[number] for number in numbers))
    return made


def _alike(plans: list[Any], can_join: Callable[[list[Any]], bool]) -> list[list[int]]:
    """Numbers of the plans, in sets that can be joined; None is in no set."""
    sets: list[list[int]] = []
    for number, plan in enumerate(plans):
        if plan is None:
            continue
        fitting = next((found for found in sets if can_join([plans[found[0]], plan])), None)
        if fitting is None:
            sets.append([number])
        else:
            fitting.append(number)
    return sets


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo ``fuse_``, in place: every linear a ``FrameLinear`` again, its stored tensors the same bytes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            model.set_submodule(name, module.unfused().train(module.training))
    return model


def refuse_fused(model: nn.Module) -> None:
    """Check that a model that is to be saved holds its linears as the format stores them.

    Raises:
        CheckpointError: it is fused.
    """
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise CheckpointError(
            "the model was fused for speed, and the file format stores single linears. Call framequant.unfuse_(model) "
            "before saving, and fuse_ after loading."
        )
