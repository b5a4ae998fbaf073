"""The linear on a GPU: what its kernels need, prepared once, and whether they may be used.

Before a kind of linear (code, sizes, dtype, launches) is used for the first time, random tokens are compared with
plain torch; a difference, or a launch that fails, sends that kind to plain torch with a warning. No operator has a
derivative: where one is asked for, the layer takes plain torch.

Must not import layers. Only ``framequant.layers`` imports this module, and only where triton is present.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from framequant.codes.trellis_storage import decode_factors
from framequant.frames import FrameOperator
from framequant.kernels import block_ops, block_prompt_ops, lane_ops, launches, prompt_ops, reference, tuning
from framequant.kernels import triton_ops as operators
from framequant.kernels.block_plan import FOLD_BLOCK, BlockPlan, FoldPlan, block_plan, fold_plan
from framequant.kernels.transform_plan import TransformPlan, transform_plan
from framequant.kernels.words import WordLayout, row_shifts, to_words, word_layout
from framequant.spec import LinearSpec

#: Relative difference from plain torch in float32 above which a kernel counts as wrong.
TOLERANCE = 0.02

#: Compute capability below which the tensor cores lack a dtype that the kernels use.
OLDEST_GPU = (8, 0)
_verdicts: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True)
class TritonPlan:
    """The constants of one linear on its device.

    Attributes:
        spec: the linear.
        layout: of its words.
        words: the codes, int32 for a trellis, else int16.
        scales: (rows, 1) or (1, 1), contiguous: as stored, or in float32 with the rows' factors multiplied in.
        top: (1,) float32, a power of two above all scales.
        into: plan of analysis.
        out: plan of synthesis; where it is local to blocks of rows, products end with it.
        bias: (out_features,) or None.
        shifts: ``words.row_shifts``.
        kept: stored tensors that ``words`` and ``scales`` do not give back, by name.
        fold: how prompts have the frame in their panels, where it can be.
    """

    spec: LinearSpec
    layout: WordLayout
    words: Tensor
    scales: Tensor
    top: Tensor
    into: TransformPlan
    out: TransformPlan | BlockPlan
    bias: Tensor | None
    shifts: Tensor | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    fold: FoldPlan | None = None

    @property
    def rows(self) -> int:
        """Rows of coefficients in ``words``, those included that pad a trellis."""
        return self.layout.rows(len(self.words))

    def codes(self, tokens: int) -> Tensor:
        """The words as the product takes them for so many tokens: bytes for few tokens of scalar codes."""
        few = not self.layout.trellis and self.layout.planes == 1 and tokens <= launches.BYTE_TOKENS
        return self.words.view(torch.int8) if few else self.words

    def interleave(self, words: Tensor) -> int:
        """Coefficients that meet one word, or one byte."""
        return 8 // self.layout.bits if words.dtype == torch.int8 else self.layout.codes_per_word

    def count(self, words: Tensor) -> int:
        """Words, or bytes, of a row that meet coefficients."""
        if words.dtype != torch.int8:
            return self.layout.length
        return -(-self.spec.coefficient_shape[1] * self.layout.bits // 8)

    def takes_lanes(self, tokens: int) -> bool:
        """Whether codes of so many tokens can go through registers alone (``lane_ops``)."""
        layout = self.layout
        codes, count = self.lane_coefficients
        numbers = lane_ops.analysed([*self.into.sizes, *self.into.padded], list(self.into.block))
        fits = lane_ops.fits(0 if layout.trellis else codes, count, numbers)
        able = layout.in_lanes and fits and tokens <= launches.LANE_TOKENS and self.lanes_finish
        return able and launches.lanes_pay(layout.per_state == 1, self.rows, isinstance(self.out, BlockPlan))

    def takes_lane_tokens(self, tokens: int) -> bool:
        """Whether codes of so many tokens, more than one, can go through registers alone (``lane_ops.tokens``)."""
        layout = self.layout
        known = not layout.trellis and layout.planes == 1 and layout.length % 4 == 0
        if (
            not known
            or not self.lanes_finish
            or not launches.BYTE_TOKENS < tokens <= launches.MOST_LANE_TOKENS
            or not lane_ops.tokens_fit(launches.lane_columns(tokens), layout.bits)
        ):
            return False
        return launches.lane_tokens_pay(
            self.rows,
            self.spec.coefficient_shape[1],
            launches.lane_columns(tokens),
            isinstance(self.out, BlockPlan),
            lane_ops.multiprocessors(self.words.device),
        )

    @property
    def lanes_finish(self) -> bool:
        """Whether lanes can rotate the blocks of a local output frame; other frames have a launch of their own."""
        return not isinstance(self.out, BlockPlan) or self.out.block in launches.LANE_BLOCKS

    @property
    def lane_coefficients(self) -> tuple[int, int]:
        """Coefficients that meet one byte, and bytes of a plane: whole 16-byte loads and one of zeros."""
        columns, bits = self.spec.coefficient_shape[1], self.layout.bits
        if self.layout.trellis:
            return 1, (-(-columns // 64) + 1) * 64
        return 8 // bits, (-(-columns * bits // 128) + 1) * 16

    @property
    def lane_code(self) -> list[int]:
        """The ``layout`` of ``lane_ops.linear``."""
        return [self.layout.per_state, *self.code[1:4], *self.lane_coefficients]

    @property
    def prompt(self) -> tuple[TransformPlan, Tensor | None, int]:
        """The analysis of a prompt whose output frame is local, the block in its panels, and its coefficients."""
        if self.fold is not None:
            return self.fold.into, self.fold.lanes, self.spec.in_features
        return self.into, None, self.spec.coefficient_shape[1]

    @property
    def code(self) -> list[int]:
        """The ``layout`` of a prompt's product."""
        layout = self.layout
        return [
            int(layout.trellis),
            layout.bits,
            layout.multiplier,
            layout.addend,
            layout.pattern,
            layout.levels,
        ]

    def numbers(self, words: Tensor) -> list[int]:
        """The ``layout`` of the product of few tokens."""
        return [*self.code, self.count(words), words.shape[1] // self.layout.planes]


def triton_plan(
    spec: LinearSpec,
    tensors: Mapping[str, Tensor],
    frames: tuple[FrameOperator, FrameOperator],
    bias: Tensor | None,
) -> TritonPlan | None:
    """Prepare a linear on its tensors' device, or return None where the kernels do not cover it."""
    device = tensors["packed_codes"].device
    layout = word_layout(spec)
    if layout is None or (device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU):
        return None
    into = transform_plan(frames[0], True, device)
    out = block_plan(frames[1], device) or transform_plan(frames[1], False, device)
    if into is None or out is None:
        return None
    digits = layout.planes > 1 and layout.levels < 1 << layout.bits
    if digits and isinstance(out, BlockPlan):  # their panels are not rotated
        return None
    scales = tensors["scales"]
    if scales.numel() not in (1, spec.coefficient_shape[0]):
        return None
    kept = {name: tensors[name] for name in ("scales", "row_factors") if "row_factors" in tensors}
    if kept:
        scales = scales * decode_factors(tensors["row_factors"], scales.dtype)
    words = to_words(tensors["packed_codes"], spec, layout)
    shifts, fold = row_shifts(layout, device), folded(frames[0], layout, out, device)
    return TritonPlan(
        spec, layout, words, scales.contiguous(), power_above(scales), into, out, bias, shifts, kept, fold
    )


def folded(
    frame: FrameOperator, layout: WordLayout, out: TransformPlan | BlockPlan, device: torch.device
) -> FoldPlan | None:
    """How prompts have the frame in their panels: two-bit codes, blocks of 32, a GPU that turns small matrices."""
    known = isinstance(out, BlockPlan) and out.block == FOLD_BLOCK and layout.is_two_bits
    return fold_plan(frame, layout.factor, device) if known and operators.turns_matrices(device) else None


def power_above(scales: Tensor) -> Tensor:
    """A power of two above the modulus of all scales, at most twice the largest; (1,), float32."""
    exponent = torch.frexp(scales.float().abs().amax().clamp(min=1e-30)).exponent
    return torch.ldexp(torch.ones(1, device=scales.device), exponent)


def loops(plan: TritonPlan, rows: int) -> int:
    """How many launches for few tokens a prompt may take, for so many rows of coefficients."""
    return launches.most_loops(plan.layout.trellis, rows * plan.spec.coefficient_shape[1])


def takes(inputs: Tensor, in_features: int) -> bool:
    """Whether the kernels know these inputs: some tokens, a dtype of theirs, and no gradient asked for."""
    return (
        inputs.dtype in (torch.float16, torch.bfloat16)  # coefficients are rounded to halves
        and inputs.shape[-1:] == (in_features,)
        and inputs.numel() > 0
        and not (inputs.requires_grad and torch.is_grad_enabled())
    )


def linear(plan: TritonPlan, inputs: Float[Tensor, "*b n"]) -> Float[Tensor, "*b o"]:
    """Apply the linear; ``takes(inputs)`` holds. A new tensor of the inputs' dtype."""
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    (y,) = products(plan, x, ((plan, plan.spec.coefficient_shape[0]),))
    return y.view(*inputs.shape[:-1], plan.spec.out_features)


def products(
    plan: TritonPlan, x: Float[Tensor, "t n"], members: Sequence[tuple[TritonPlan, int]]
) -> tuple[Float[Tensor, "t o"], ...]:
    """Outputs of linears whose rows, so many of each, lie one below the other in the words of ``plan``."""
    few = launches.loop_tokens(x.shape[0], loops(plan, sum(rows for _, rows in members)))
    if few:
        parts = [products(plan, part, members) for part in x.split(few)]
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))
    starts = list(accumulate((rows for _, rows in members), initial=0))
    if isinstance(plan.out, BlockPlan):
        y = _outputs(plan, plan.out, x)
        return tuple(y[:, start : start + rows] for start, (_, rows) in zip(starts, members, strict=False))
    u, unit = _multiply(plan, x, starts[-1])
    return tuple(
        _synthesise(member, plan, u[..., start : start + rows], unit, x.dtype)
        for start, (member, rows) in zip(starts, members, strict=False)
    )


def _outputs(plan: TritonPlan, out: BlockPlan, x: Float[Tensor, "t n"]) -> Float[Tensor, "t rows"]:
    """Analysis, and a product that ends with the outputs of all rows."""
    ends = out.places, out.signs, out.matrix, plan.bias
    if x.shape[0] > launches.FEW_TOKENS:
        into, frame, columns = plan.prompt
        sizes = [*into.sizes, *into.padded]
        return block_prompt_ops.prompt(
            x,
            into.flips,
            into.signs,
            list(into.matrices),
            sizes,
            into.norm,
            columns,
            plan.words,
            plan.scales,
            plan.top,
            *ends,
            frame,
            list(out.ends),
            plan.code,
            plan.layout.factor,
        )
    if plan.takes_lanes(x.shape[0]):
        return _lanes(plan, x, len(out.places), out)[0]
    words, z, unit, sums, lanes = _few_coefficients(plan, x)
    if lanes:
        return lane_ops.tokens(
            words, z, sums, unit, plan.scales, out.places, out.signs, plan.bias, len(out.places), out.block,
            plan.layout.bits, x.dtype,
        )  # fmt: skip
    return block_ops.product(
        words,
        z,
        sums,
        unit,
        plan.scales,
        plan.shifts,
        plan.top,
        *ends,
        plan.numbers(words),
        plan.layout.factor,
        x.dtype,
    )


def _few_coefficients(
    plan: TritonPlan, x: Float[Tensor, "t n"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Words, and coefficients, units and sums of few tokens as they meet them; whether through registers alone."""
    into, words, lanes = plan.into, plan.codes(x.shape[0]), plan.takes_lane_tokens(x.shape[0])
    interleave, count = plan.interleave(words), plan.count(words)
    if lanes:
        return words, *lane_ops.token_coefficients(into, x, interleave, count, plan.layout.bits), True
    z, unit, sums = operators.analysis(
        x, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm, interleave, count,
        words.dtype == torch.int8,
    )  # fmt: skip
    return words, z, unit, sums, False


def _lanes(
    plan: TritonPlan, x: Float[Tensor, "1 n"], rows: int, out: BlockPlan | None
) -> tuple[Tensor, Tensor]:
    """The linear through registers alone: outputs, or what ``_multiply`` returns, and the token's unit."""
    into = plan.into
    ends = (None, None, None, rows, 0) if out is None else (out.places, out.signs, plan.bias, rows, out.block)
    return lane_ops.linear(
        plan.words, x, into.lane_signs, list(into.matrices), list(into.columns), [*into.sizes, *into.padded],
        list(into.block), into.norm, plan.scales, *ends, plan.lane_code, plan.layout.factor, x.dtype,
    )  # fmt: skip


def _multiply(plan: TritonPlan, x: Float[Tensor, "t n"], rows: int) -> tuple[Tensor, Tensor]:
    """Analysis and product, and the tokens' units.

    Few tokens: float32 partial sums of ``rows`` coefficients (splits, tokens, rows). A prompt: halves (tokens, rows).
    """
    into, sizes = plan.into, [*plan.into.sizes, *plan.into.padded]
    if x.shape[0] > launches.FEW_TOKENS:
        columns = plan.spec.coefficient_shape[1]
        z, unit = prompt_ops.analysis(x, into.signs, list(into.matrices), sizes, into.norm, columns)
        return prompt_ops.product(plan.words, z, plan.scales, plan.top, rows, plan.code), unit
    if plan.takes_lanes(x.shape[0]):
        return _lanes(plan, x, rows, None)
    words, z, unit, sums, lanes = _few_coefficients(plan, x)
    if lanes:
        return lane_ops.tokens(
            words, z, sums, unit, plan.scales, None, None, None, rows, 0, plan.layout.bits, x.dtype
        ), unit
    products = operators.product(
        words, z, sums, plan.scales, plan.shifts, rows, plan.numbers(words), plan.layout.factor
    )
    return products, unit


def _synthesise(
    plan: TritonPlan, joined: TritonPlan, u: Tensor, unit: Tensor, dtype: torch.dtype
) -> Float[Tensor, "t o"]:
    """Outputs of a linear from its products with the words of ``joined``, bias added."""
    out, dim = plan.out, plan.spec.out_features
    assert isinstance(out, TransformPlan)
    matrices, sizes = list(out.matrices), [*out.sizes, *out.padded]
    if u.dim() == 2:
        norm = out.norm * prompt_ops.gain(plan.layout.trellis, plan.layout.factor)
        return prompt_ops.synthesis(
            u, unit, joined.top, out.signs, matrices, sizes, norm, dim, plan.bias, dtype
        )
    return operators.synthesis(u, unit, out.signs, matrices, sizes, out.norm, dim, plan.bias, dtype)


def problem_with(found: Callable[[], Tensor], exact: Callable[[], Tensor]) -> str:
    """What is wrong with the outputs of kernels beside plain torch's in float32, or nothing."""
    try:
        expected = exact()
        error = float((found().float() - expected).norm() / expected.norm().clamp(min=1e-30))
    except Exception as failure:
        return f"failed: {type(failure).__name__}: {str(failure)[:200]}"
    return "" if error <= TOLERANCE else f"differ from plain torch by {error:.2g}"


def raised(outputs: Tensor) -> float:
    """A power of two, up to 2**10, for inputs of linears with small weights: subnormal halves are all rounding."""
    largest = float(outputs.abs().max())
    return 2.0 ** min(10, -math.frexp(largest)[1]) if 0 < largest < 0.0625 else 1.0


def is_right(
    plan: TritonPlan,
    tensors: Mapping[str, Tensor],
    frames: tuple[FrameOperator, FrameOperator],
    dtype: torch.dtype,
    tokens: int,
) -> bool:
    """Whether random tokens come out as in plain torch; asked once for every kind of linear, dtype and launch.

    Cost: one decoding of the linear, at first use of its kind. A kind that fails is warned about once.
    """
    tokens = launches.tokens_to_check(tokens, loops(plan, plan.spec.coefficient_shape[0]))
    key = (plan.spec.scheme(), plan.bias is not None, dtype, plan.words.device, tokens)
    if key not in _verdicts:
        if plan.words.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be read back now
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, plan.spec.in_features, generator=generator).to(
            device=plan.words.device, dtype=dtype
        )
        exact = reference.product(reference.analysis(frames[0], x.float()), plan.spec, tensors)
        exact = reference.synthesis(frames[1], exact)
        times = raised(exact)
        x, exact = x * times, exact * times
        exact = exact if plan.bias is None else exact + plan.bias.float()
        problem = tuning.checked(
            lambda: linear(plan, x),
            lambda: problem_with(lambda: linear(plan, x), lambda: exact),
            plan.words.device,
        )
        if problem:
            name = f"{plan.spec.out_features} x {plan.spec.in_features} ({type(plan.spec.code).__name__}, {dtype})"
            warnings.warn(
                f"The Triton kernels of linears {name} {problem}; plain torch is used.",
                RuntimeWarning,
                stacklevel=2,
            )
        _verdicts[key] = not problem
    return _verdicts[key]
