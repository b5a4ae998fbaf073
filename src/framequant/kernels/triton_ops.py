"""Analysis, product and synthesis on a GPU as ``torch.library`` operators, and the linear made of the three.

Fake implementations give shapes to ``torch.compile``. The operators have no derivative: where one is asked for, the
layer takes plain torch. Before a kind of linear (code, sizes, dtype) is used for the first time, two random tokens
are compared with plain torch; a difference, or a launch that fails, sends that kind to plain torch with a warning.

**Not yet run on hardware**: ``FrameLinear`` takes this path only where its ``backend`` is "triton". Must not import
layers. Only ``framequant.layers`` imports this module, and only where triton is present.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.frames import FrameOperator
from framequant.kernels import reference
from framequant.kernels.product_triton import product as product_kernel
from framequant.kernels.transform_plan import ROWS, TransformPlan, transform_plan
from framequant.kernels.transform_triton import transform as transform_kernel
from framequant.kernels.words import WordLayout, to_words, word_layout
from framequant.spec import LinearSpec

#: More tokens than this take plain torch.
MOST_TOKENS = 64
#: Programs that keep a large GPU busy, for the number of splits; results depend on it in the last bits only.
PROGRAMS = 512
#: Relative difference from plain torch in float32 above which a kernel counts as wrong.
TOLERANCE = 0.02

_verdicts: dict[tuple[object, ...], bool] = {}


@torch.library.custom_op("framequant::analysis", mutates_args=())
def analysis(
    x: Tensor,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    interleave: int,
    words: int,
) -> tuple[Tensor, Tensor]:
    """Coefficients of tokens (tokens, dim) as halves (tokens, interleave, words), and their units (tokens,)."""
    z = torch.zeros((x.shape[0], interleave, words), dtype=torch.float16, device=x.device)
    unit = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    transform_kernel[(x.shape[0], matrices[0].shape[0] // ROWS)](
        x, signs, *matrices, x, z, unit, unit, x.shape[0], x.stride(0), 0, words, norm, *sizes, ROWS=ROWS, PARTS=1,
        ANALYSIS=True, INTERLEAVE=interleave, PLANES=False, BIAS=False, LOW=True, PDL=False,
    )  # fmt: skip
    return z, unit


@analysis.register_fake
def _(x, signs, matrices, sizes, norm, interleave, words):  # type: ignore[no-untyped-def]
    tokens = x.shape[0]
    return (
        x.new_empty((tokens, interleave, words), dtype=torch.float16),
        x.new_empty(tokens, dtype=torch.float32),
    )


@torch.library.custom_op("framequant::product", mutates_args=())
def product(
    words: Tensor, z: Tensor, scales: Tensor, rows: int, layout: list[int], factor: float, splits: int
) -> Tensor:
    """``D̃ z`` as partial sums, float32 (splits, tokens, rows).

    ``layout`` holds numbers of ``WordLayout``: trellis or not, bits, multiplier, addend, words, stride.
    """
    trellis, bits, multiplier, addend, count, stride = layout
    tokens, (block, step) = z.shape[0], _tile(bool(trellis), count)
    share = -(-count // splits)
    span = -(-share // step) * step
    u = torch.zeros((splits, tokens, rows), dtype=torch.float32, device=z.device)
    product_kernel[(-(-rows // block), splits, -(-tokens // 16))](
        words, z, scales, u, rows, count, stride, span, tokens, factor, TRELLIS=bool(trellis), BITS=bits,
        MULTIPLIER=multiplier, ADDEND=addend, CENTRED=True, ROW_SCALES=scales.numel() > 1, BR=block, BK=step,
        BN=16, STAGES=3, PDL=False, PREFETCH=0,
    )  # fmt: skip
    return u


@product.register_fake
def _(words, z, scales, rows, layout, factor, splits):  # type: ignore[no-untyped-def]
    return z.new_empty((splits, z.shape[0], rows), dtype=torch.float32)


@torch.library.custom_op("framequant::synthesis", mutates_args=())
def synthesis(
    u: Tensor,
    unit: Tensor,
    signs: Tensor,
    matrices: list[Tensor],
    sizes: list[int],
    norm: float,
    dim: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Outputs (tokens, dim) of ``dtype`` from partial sums (splits, tokens, coefficients), the bias added."""
    splits, tokens, _ = u.shape
    y = torch.empty((tokens, dim), dtype=dtype, device=u.device)
    transform_kernel[(tokens, matrices[0].shape[0] // ROWS)](
        u, signs, *matrices, u if bias is None else bias, y, unit, unit, tokens, u.stride(1), u.stride(0), 0, norm,
        *sizes, ROWS=ROWS, PARTS=splits, ANALYSIS=False, INTERLEAVE=1, PLANES=False, BIAS=bias is not None, LOW=True,
        PDL=False,
    )  # fmt: skip
    return y


@synthesis.register_fake
def _(u, unit, signs, matrices, sizes, norm, dim, bias, dtype):  # type: ignore[no-untyped-def]
    return u.new_empty((u.shape[1], dim), dtype=dtype)


def _tile(trellis: bool, words: int) -> tuple[int, int]:
    """Rows and words of a program's step."""
    return 64, 16 if words <= 64 else (32 if trellis else 64)


@dataclass(frozen=True)
class TritonPlan:
    """The constants of one linear on its device.

    Attributes:
        spec: the linear.
        layout: of its words.
        words: the codes.
        scales: as stored, contiguous.
        into: plan of analysis.
        out: plan of synthesis.
        bias: (out_features,) or None.
    """

    spec: LinearSpec
    layout: WordLayout
    words: Tensor
    scales: Tensor
    into: TransformPlan
    out: TransformPlan
    bias: Tensor | None

    @property
    def splits(self) -> int:
        """Parts into which columns are cut, so that few rows still keep the GPU busy."""
        block, step = _tile(self.layout.trellis, self.layout.words)
        steps = -(-self.layout.words // step)
        wanted = max(1, min(steps, PROGRAMS // -(-self.spec.coefficient_shape[0] // block), 16))
        return -(-steps // -(-steps // wanted))  # no empty part


def triton_plan(
    spec: LinearSpec,
    tensors: Mapping[str, Tensor],
    frames: tuple[FrameOperator, FrameOperator],
    bias: Tensor | None,
) -> TritonPlan | None:
    """Prepare a linear on its tensors' device, or return None where the kernels do not cover it."""
    device = tensors["packed_codes"].device
    layout = word_layout(spec)
    if layout is None:
        return None
    into, out = transform_plan(frames[0], True, device), transform_plan(frames[1], False, device)
    if into is None or out is None:
        return None
    scales = tensors["scales"]
    if scales.numel() not in (1, spec.coefficient_shape[0]):
        return None
    words = to_words(tensors["packed_codes"], spec, layout)
    return TritonPlan(spec, layout, words, scales.contiguous(), into, out, bias)


def takes(inputs: Tensor, in_features: int) -> bool:
    """Whether the kernels know these inputs: few tokens, a dtype of theirs, and no gradient asked for."""
    return (
        inputs.dtype in (torch.float16, torch.bfloat16)  # coefficients are rounded to halves
        and inputs.shape[-1:] == (in_features,)
        and 0 < inputs.numel() <= MOST_TOKENS * in_features
        and not (inputs.requires_grad and torch.is_grad_enabled())
    )


def linear(plan: TritonPlan, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
    """Apply the linear; ``takes(inputs)`` holds. A new tensor of the inputs' dtype."""
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    lay, into, out = plan.layout, plan.into, plan.out
    z, unit = torch.ops.framequant.analysis(
        x,
        into.signs,
        list(into.matrices),
        [*into.sizes, *into.padded],
        into.norm,
        lay.codes_per_word,
        lay.words,
    )
    numbers = [int(lay.trellis), lay.bits, lay.multiplier, lay.addend, lay.words, lay.stride]
    rows = plan.spec.coefficient_shape[0]
    u = torch.ops.framequant.product(plan.words, z, plan.scales, rows, numbers, lay.factor, plan.splits)
    y = torch.ops.framequant.synthesis(
        u, unit, out.signs, list(out.matrices), [*out.sizes, *out.padded], out.norm, plan.spec.out_features,
        plan.bias, inputs.dtype,
    )  # fmt: skip
    return y.view(*inputs.shape[:-1], plan.spec.out_features)


def is_right(
    plan: TritonPlan,
    tensors: Mapping[str, Tensor],
    frames: tuple[FrameOperator, FrameOperator],
    dtype: torch.dtype,
) -> bool:
    """Whether two random tokens come out as in plain torch; asked once for every kind of linear and dtype.

    Cost: one decoding of the linear, at first use of its kind. A kind that fails is warned about once.
    """
    key = (plan.spec.scheme(), plan.bias is not None, dtype, plan.words.device.type)
    if key not in _verdicts:
        if plan.words.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be read back now
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, plan.spec.in_features, generator=generator).to(
            device=plan.words.device, dtype=dtype
        )
        exact = reference.product(reference.analysis(frames[0], x.float()), plan.spec, tensors)
        exact = reference.synthesis(frames[1], exact)
        problem = ""
        try:
            found = linear(plan, x).float()
            exact = exact if plan.bias is None else exact + plan.bias.float()
            error = float((found - exact).norm() / exact.norm().clamp(min=1e-30))
            if not error <= TOLERANCE:
                problem = f"differ from plain torch by {error:.2g}"
        except Exception as failure:
            problem = f"failed: {type(failure).__name__}: {str(failure)[:200]}"
        if problem:
            name = f"{plan.spec.out_features} x {plan.spec.in_features} ({type(plan.spec.code).__name__}, {dtype})"
            warnings.warn(
                f"The Triton kernels of linears {name} {problem}; plain torch is used.",
                RuntimeWarning,
                stacklevel=2,
            )
        _verdicts[key] = not problem
    return _verdicts[key]
