"""``FrameLinear``: the layer ``y = T_outᵀ D̃ T_in x + b`` with its codes packed in memory.

It holds exactly the tensors that the checkpoint holds, so a saved layer and a loaded one compute the same bits.
Frames are rebuilt from the spec; their constants are not part of the module's state.

Must not import models, checkpoints or integrations.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from framequant import storage
from framequant.codes.trellis import TrellisSpec
from framequant.frames import FrameOperator, build_frame
from framequant.kernels import cpu, launches, reference
from framequant.spec import LinearSpec


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _wants_gradient(held: list[tuple[Tensor, int]]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor, _ in held)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class FrameLinear(nn.Module):
    """A linear whose weight is stored as codes of its fusion-frame coefficients.

    Takes the place of ``torch.nn.Linear`` (and of GPT-2's ``Conv1D``): inputs (..., in_features) of any float
    dtype give outputs (..., out_features) of the same dtype. No dense weight is kept.

    Args:
        spec: shape, frames and code.
        bias: whether the layer adds a bias.
        dtype: of the bias; the stored tensors have the dtypes that the format gives them, always.
        device: where the empty tensors are made; ``meta`` for a skeleton to load into.

    Attributes:
        backend: "auto": Triton kernels on a GPU, compiled kernels on a CPU, each where it covers the layer and the
            inputs, else plain torch; "reference": plain torch always; "triton": as "auto", and Triton also for tensors
            on a CPU, for its interpreter. The default is the environment variable ``FRAMEQUANT_BACKEND``, else "auto".
    """

    def __init__(
        self,
        spec: LinearSpec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        layout = storage.layout(spec)
        self._stored = tuple(layout)
        for name, (shape, stored) in layout.items():
            self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        if bias:
            empty = torch.empty(spec.out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._frames: tuple[FrameOperator, FrameOperator] | None = None
        self._bias_frame: FrameOperator | None = None
        self._held: dict[tuple[torch.dtype, bool], list[Tensor]] | None = None
        self._dense: dict[torch.dtype, Tensor | None] = {}
        self._prepared: tuple[list[tuple[Tensor, int]], str, Any] | None = None
        self.backend = os.environ.get("FRAMEQUANT_BACKEND", "auto")

    @classmethod
    def from_tensors(
        cls, spec: LinearSpec, tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> FrameLinear:
        """Build a layer around stored tensors (taken as they are, not copied) and an optional bias."""
        storage.check(spec, tensors, "FrameLinear")
        layer = cls(spec, bias=False, device="meta")
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, without the bias."""
        return {name: getattr(self, name) for name in self._stored}

    @property
    def frames(self) -> tuple[FrameOperator, FrameOperator]:
        """Input and output frame, built on first use."""
        if self._frames is None:
            self._frames = build_frame(self.spec.frame_in), build_frame(self.spec.frame_out)
        return self._frames

    def forward(self, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
        """Apply the layer."""
        if inputs.dtype in self._dense:
            return self._by_dense(inputs)
        wanted = self.backend == "triton" or (self.backend == "auto" and inputs.is_cuda)
        if wanted and self.spec.activation is None:
            fast = self._triton(inputs)
            if fast is not None:
                return fast
        plan = self._plan() if self.backend != "reference" and cpu.takes(inputs, self.in_features) else None
        if plan is not None and self.spec.activation is None and cpu.is_few(inputs):
            return cpu.linear(plan, inputs)
        frame_in, frame_out = self.frames
        coefficients = reference.coefficients(self.spec, self.tensors, frame_in, inputs)
        if plan is not None:
            coefficients = cpu.arranged(plan, coefficients)
        products = reference.multiply(coefficients, self._tiles(coefficients.dtype, plan)).to(inputs.dtype)
        outputs = reference.synthesis(frame_out, products)
        bias = self.dense_bias(outputs.dtype)
        return outputs if bias is None else outputs + bias

    def dense_bias(self, dtype: torch.dtype) -> Float[Tensor, " o"] | None:
        """The bias in ``dtype``, decoded if the code holds it; None if there is none."""
        if storage.holds_bias(self.spec):
            if self._bias_frame is None:
                self._bias_frame = build_frame(storage.bias_frame(self.spec))
            return storage.decode_bias(self.spec, self.tensors, self._bias_frame, dtype)
        return None if self.bias is None else self.bias.to(dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Synthesise the weight once into an ordinary linear: more memory, and no decoding at run time."""
        bias = self.dense_bias(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    def hold_decoded(self, hold: bool) -> None:
        """Keep D̃ decoded between forward passes, or no longer: for a block that is run many times over."""
        self._held = {} if hold else None

    def hold_dense(self, dtype: torch.dtype | None) -> None:
        """Multiply inputs of a dtype by Ŵ, made at the first of them, until called with None: for the walk.

        Several times as fast there as transforming them. The outputs are the layer's up to rounding of ``dtype``, not
        the same bits, so nothing is evaluated so. Layers that round their activations hold D̃ instead.
        """
        plain = self.spec.activation is None
        self._dense = {dtype: None} if plain and dtype is not None else {}
        self.hold_decoded(dtype is not None and not plain)

    def _by_dense(self, inputs: Tensor) -> Tensor:
        weight = self._dense[inputs.dtype]
        if weight is None:
            self._dense[inputs.dtype] = weight = self.dequantize(inputs.dtype)
        return functional.linear(inputs, weight, self.dense_bias(inputs.dtype))

    def _tiles(self, dtype: torch.dtype, plan: cpu.CpuPlan | None) -> Iterable[Tensor]:
        tiles = (
            reference.decoded_tiles(self.spec, self.tensors, dtype)
            if plan is None
            else cpu.decoded_tiles(plan, dtype)
        )
        if self._held is None:
            return tiles
        key = dtype, plan is None
        if key not in self._held:
            self._held[key] = list(tiles)
        return self._held[key]

    def _plan(self) -> cpu.CpuPlan | None:
        """Constants of the compiled CPU kernels."""
        return self._prepare("cpu", cpu.cpu_plan)

    def _triton(self, inputs: Tensor) -> Tensor | None:
        """The outputs by Triton, or None where it cannot serve."""
        try:
            from framequant.kernels import triton_linear
        except ImportError:
            _warn_once(
                "The GPU kernels need triton, which is not installed (pip install triton); plain torch is used."
            )
            return None
        if not triton_linear.takes(inputs, self.in_features):
            return None
        trellis, size = isinstance(self.spec.code, TrellisSpec), math.prod(self.spec.coefficient_shape)
        loops = launches.most_loops(trellis, size)
        kind = launches.tokens_to_check(inputs.numel() // self.in_features, loops)
        if not self._serves(inputs.dtype, kind, inputs.is_cuda):
            return None
        assert self._prepared is not None
        return triton_linear.linear(self._prepared[2], inputs)

    @torch.compiler.assume_constant_result
    def _serves(self, dtype: torch.dtype, tokens: int, on_cuda: bool) -> bool:
        """Whether the kernels serve inputs like these; their plan is then in ``_prepared``.

        ``torch.compile`` runs this while it traces, for real, so that what it compiles was compared with plain torch;
        what it reads of the plan is guarded, and forgotten plans are made anew.
        """
        from framequant.kernels import triton_linear

        capturing = on_cuda and torch.cuda.is_current_stream_capturing()
        if self._prepared is None and capturing:
            _warn_once(
                "A linear first ran inside a CUDA graph, in plain torch; run the model once before capturing."
            )
            return False
        plan = self._prepare("triton", triton_linear.triton_plan)
        if plan is None:
            _warn_once(f"No Triton kernel covers linears like {self.spec.scheme()}; plain torch is used.")
            return False
        return triton_linear.is_right(plan, self.tensors, self.frames, dtype, tokens)

    def _prepare(self, kind: str, make: Callable[..., Any]) -> Any:
        """What ``make`` returns for this layer's tensors, made again when one was replaced or written to."""
        if self._prepared is not None and self._prepared[1] == kind and self._is_as_before(self._prepared[0]):
            return None if _wants_gradient(self._prepared[0]) else self._prepared[2]
        stores = self._buffers, self._parameters
        held = [(t, _version(t)) for store in stores for t in store.values() if t is not None]
        if _wants_gradient(held):
            return None  # no kernel has a derivative for what it holds
        plan = make(self.spec, self.tensors, self.frames, self.bias)
        self._prepared = held, kind, plan
        return plan

    def _is_as_before(self, before: list[tuple[Tensor, int]]) -> bool:
        """Whether the layer has the same tensors, not written to since; asked before every token's linears."""
        known = iter(before)
        for store in (self._buffers, self._parameters):
            for tensor in store.values():
                if tensor is not None:
                    old, version = next(known, (None, 0))
                    if old is not tensor or version != _version(tensor):
                        return False
        return next(known, None) is None

    def forget_prepared(self) -> None:
        """Drop constants, frames and decoded matrices; they are made again when needed."""
        self._prepared = self._frames = self._bias_frame = self._held = None
        self._dense = {}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "o n"]:
        """The dense weight that the layer is equal to, up to rounding of ``dtype``; a new tensor."""
        return reference.dense_weight(self.spec, self.tensors, *self.frames, dtype=dtype)

    @property
    def weight(self) -> Float[Tensor, "o n"]:
        """Dense weight, computed at every access: for code that only asks for its dtype or device."""
        dtype = self.bias.dtype if self.bias is not None else torch.get_default_dtype()
        return self.dequantize(dtype)

    def num_bytes(self) -> int:
        """Bytes of the stored tensors, without the bias."""
        return sum(storage.num_bytes(self.tensors).values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrameLinear:
        """Move with the model, but keep the stored dtypes: ``model.half()`` must not alter the scales."""
        dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}
        before = self.tensors
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(device=moved.device))
        if any(getattr(self, name) is not before[name] for name in dtypes):
            self._prepared = None  # compiled code guards it, not the tensors that it was made from
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Load, which writes in place, and have compiled code see it."""
        self._prepared = None
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not the prepared constants, which hold addresses."""
        return {**self.__dict__, "_prepared": None, "_dense": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameLinear:
        """Copy tensors; the frames are rebuilt from the spec."""
        bias = None if self.bias is None else self.bias.detach()
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        copy = FrameLinear.from_tensors(self.spec, tensors, bias)
        copy.training, copy.backend = self.training, self.backend
        memo[id(self)] = copy
        return copy

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"redundancy={self.spec.redundancy:.4g}, code={type(self.spec.code).__name__}"
        )


#: Bytes of decoded matrices that may be held while a model is evaluated.
HELD_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}


@contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """Decode the codes of a model's linears once for many forward passes, where that fits ``HELD_BYTES``.

    Results are the same bits; only time and memory differ.
    """
    layers = [m for m in model.modules() if isinstance(m, FrameLinear) and m._held is None]
    place = next(model.parameters())
    size = place.element_size() * sum(math.prod(layer.spec.coefficient_shape) for layer in layers)
    hold = size <= HELD_BYTES.get(place.device.type, HELD_BYTES["cpu"])
    for layer in layers:
        layer.hold_decoded(hold)
    try:
        yield
    finally:
        for layer in layers:
            layer.hold_decoded(False)
