"""A frame's transform as the kernels apply it: three small half-precision matrices, padded, and the signs.

The block of a fusion frame is multiplied into the last Hadamard factor, so analysis and synthesis are a product
along each axis of a tensor with three axes and nothing else. Must not import layers; imports no triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float16, Float32, Int8, Int32, Int64
from torch import Tensor

from framequant.frames import FrameOperator, FusionFrame, RandomizedHadamard
from framequant.frames.hadamard import sylvester
from framequant.kernels.launches import LANE_WARPS

ROWS = 16  # indices of the first axis that one program makes: the smallest side of a tensor-core tile
MAX_ELEMENTS = 1 << 15  # padded coordinates of one program
ROW, MOST_COLUMNS, MOST_EACH = 256, 112, 20  # ``column_triton``: numbers of a row, rows, coefficients of 16
LAST_FACTORS = (64, 128)  # of transforms whose frame has longer groups than their last factor


@dataclass(frozen=True)
class TransformPlan:
    """Matrices and sizes for one direction of a frame's transform.

    Attributes:
        sizes: (F0, F1, F2_IN, F2_OUT).
        padded: (P0, P1, P2_IN, P2_OUT), powers of two.
        signs: (dim,) +1 and -1.
        matrices: first factor as (rows, P0), second as (P1, P1), third as (P2_IN, P2_OUT), the latter two to
            multiply from the right; all scaled so that Walsh-Hadamard entries are +1 and -1.
        norm: what the result is multiplied by.
        block: sizes of the frame's block, coefficients and coordinates; 1, 1 without a frame.
        lane_signs: ``lane_sign_words`` where one program makes all coefficients, else ``signs``.
        columns: of an analysis that is a matrix times Walsh and Hadamard's of 256, that matrix, and the frame's block
            as often as 16 coordinates have it, transposed, both float32; else empty.
    """

    sizes: tuple[int, int, int, int]
    padded: tuple[int, int, int, int]
    signs: Int8[Tensor, " dim"]
    matrices: tuple[Float16[Tensor, "a b"], ...]
    norm: float
    block: tuple[int, int] = (1, 1)
    columns: tuple[Float32[Tensor, "a b"], ...] = ()
    lane_signs: Tensor | None = None

    @property
    def flips(self) -> Tensor | None:
        """Signs of a transform that is Walsh and Hadamard's alone as words (``sign_words`` of 256), where there are."""
        words = self.lane_signs
        return words if words is not None and words.dtype == torch.int32 and self.block == (1, 1) else None

    @property
    def num_rows(self) -> int:
        """Programs for one token."""
        return self.matrices[0].shape[0] // ROWS


def transform_plan(frame: FrameOperator, analysis: bool, device: torch.device | str) -> TransformPlan | None:
    """Plan analysis or synthesis of a frame, or None where the kernels do not cover it.

    Covered: randomized Hadamard transforms of up to three factors, and block-diagonal fusion frames after one whose
    groups lie within the last factor, or divide 128 coordinates where the last factors are powers of two.
    """
    stages = getattr(frame, "stages", ())
    if not stages or not isinstance(stages[0], RandomizedHadamard) or len(stages) > 2:
        return None
    hadamard = stages[0]
    constants = hadamard._constants.originals
    factors = [constants[f"factor{i}"] * math.sqrt(size) for i, size in enumerate(hadamard.factors)]
    if len(factors) > 3:
        return None
    one = torch.ones(1, 1, dtype=torch.float64)
    factors = {1: [one, one], 2: [factors[0], one], 3: factors[:2]}[len(factors)] + factors[-1:]
    shape: tuple[int, int] = (1, 1)
    block, whole = torch.ones(1, 1, dtype=torch.float64), list(factors)
    if len(stages) == 2:
        block = shared_block(stages[1])
        if block is not None and len(factors[2]) % block.shape[1]:
            factors = _with_longer_last(factors, block.shape[1])
        if block is None or len(factors[2]) % block.shape[1]:
            return None
        copies = torch.eye(len(factors[2]) // block.shape[1], dtype=torch.float64)
        factors[2] = torch.kron(copies, block) @ factors[2]
        shape = (block.shape[0], block.shape[1])
    if not analysis:
        factors = [factor.mT for factor in factors]
    f2_out, f2_in = factors[2].shape
    sizes = (len(factors[0]), len(factors[1]), f2_in, f2_out)
    padded = (_power(sizes[0]), 1 if sizes[1] == 1 else _power(sizes[1]), _power(f2_in), _power(f2_out))
    if padded[0] * padded[1] * max(padded[2:]) > MAX_ELEMENTS:
        return None
    rows, threads = -(-sizes[0] // ROWS) * ROWS, 32 * LANE_WARPS
    signs = constants["signs"].to(torch.int8)
    lane_signs = lane_sign_words(signs, threads) if in_one(sizes, shape, threads) else signs
    matrices = (
        _pad(factors[0], rows, padded[0]),
        _pad(factors[1].mT, padded[1], padded[1]),
        _pad(factors[2].mT, padded[2], padded[3]),
    )
    return TransformPlan(
        sizes,
        padded,
        signs.to(device),
        tuple(matrix.to(device) for matrix in matrices),
        1.0 / math.sqrt(hadamard.dim),
        shape,
        tuple(matrix.to(device) for matrix in _columns(whole, block)) if analysis else (),
        lane_signs.to(device),
    )


def in_one(sizes: Sequence[int], block: Sequence[int], threads: int) -> bool:
    """Whether every program makes all coefficients itself: of Walsh and Hadamard's transforms that fit its registers.

    Args:
        sizes: of a ``TransformPlan``.
        block: sizes of the frame's block; 1, 1 without a frame.
        threads: of a program.
    """
    size = sizes[0] * sizes[1] * sizes[2]
    powers = all(factor.bit_count() == 1 for factor in sizes[:3])
    return powers and size in (16 * threads, 32 * threads) and 16 % block[1] == 0


def sign_words(signs: Int8[Tensor, " dim"], threads: int) -> Int32[Tensor, " threads"]:
    """Signs as bits, 1 for -1: bit i of the t-th word is that of number ``t + i threads``, of up to 32."""
    return _words_of(signs.reshape(-1, threads) < 0)


def half_numbers(size: int, threads: int) -> Int64[Tensor, "threads bits"]:
    """Which of a token's numbers of 16 bits a thread has, in order of the bits of its word of signs.

    Operands of ``mma.m16n8k16``: with lane = 4 column + quarter register i of the t-th two has numbers of rows
    2 quarter + 8 i and + 1, in its lower and upper half. A row is 16 numbers from the next, the ninth 512 from the
    first, and a tile 1024; each of eight warps has eight columns of the first 512. A register's bits are 15 − (2 t + i)
    and 16 more. Where ``size`` has fewer tiles -1.
    """
    thread, bit = torch.arange(threads)[:, None], torch.arange(32)
    lane, warp = thread % 32, thread // 32
    register, upper = 15 - bit % 16, bit // 16
    first = lane // 4 + warp % 2 * 8 + warp // 2 * 128 + lane % 4 * 32
    found = first + upper * 16 + register % 2 * 512 + register // 2 * 1024
    return torch.where(found < size, found, -1)


def lane_sign_words(signs: Int8[Tensor, " dim"], threads: int) -> Int32[Tensor, " words"]:
    """``sign_words``, and the same of each thread's ``half_numbers``."""
    numbers = half_numbers(len(signs), threads).to(signs.device)
    negative = (numbers >= 0) & (signs[numbers.clamp(min=0)] < 0)
    return torch.cat((sign_words(signs, threads), _words_of(negative.mT)))


def _words_of(bits: Bool[Tensor, "bits words"]) -> Int32[Tensor, " words"]:
    """Words of up to 32 bits, the lowest first."""
    words = (bits.long() << torch.arange(len(bits), device=bits.device)[:, None]).sum(0)
    return ((words + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


def _split(factors: list[Tensor]) -> tuple[Tensor, int]:
    """The same Kronecker product as a matrix times a Walsh-Hadamard matrix of that size, the largest there is."""
    head, tail = torch.ones(1, 1, dtype=torch.float64), 1
    for factor in factors:
        if len(factor).bit_count() > 1:
            head, tail = torch.kron(torch.kron(head, _walsh(tail)), factor), 1
        else:
            tail *= len(factor)
    return head, tail


def _columns(factors: list[Tensor], block: Tensor) -> tuple[Tensor, ...]:
    """``TransformPlan.columns`` of an analysis with these Hadamard factors and this block of a frame."""
    head, tail = _split(factors)
    if tail % ROW or 16 % block.shape[1] or len(head) * tail > ROW * MOST_COLUMNS:
        return ()
    copies = torch.eye(16 // block.shape[1], dtype=torch.float64)
    if len(copies) * len(block) > MOST_EACH:
        return ()
    found = torch.kron(head, _walsh(tail // ROW)), torch.kron(copies, block).mT
    return tuple(matrix.to(torch.float32).contiguous() for matrix in found)


def _with_longer_last(factors: list[Tensor], width: int) -> list[Tensor]:
    """The same Kronecker product with a last factor that groups of ``width`` divide, if powers of two at its end allow.

    Such factors are Walsh-Hadamard matrices, whose Kronecker products are longer ones. Of the lengths that serve, the
    one whose padded matrices are smallest.
    """
    head, tail = _split(factors)
    serving = [last for last in LAST_FACTORS if tail % last == 0 and last % width == 0]
    if not serving:
        return factors
    last = min(serving, key=lambda size: _power(len(head) * tail // size) ** 2 + 2 * size**2)
    one = torch.ones(1, 1, dtype=torch.float64)
    return [torch.kron(head, _walsh(tail // last)), one, _walsh(last)]


def _walsh(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of entries +1 and -1."""
    return torch.from_numpy(sylvester(size) * math.sqrt(size)).round()


def shared_block(stage: object) -> Tensor | None:
    """The block of a block-diagonal fusion frame of even dimension."""
    form = getattr(stage, "_form", None)
    if not isinstance(stage, FusionFrame) or type(form).__name__ != "_BlockForm" or stage.dim % 2:
        return None
    return form._constants.originals["block"]


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _pad(matrix: Tensor, rows: int, cols: int) -> Tensor:
    padded = torch.zeros((rows, cols), dtype=torch.float16)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix.to(torch.float16)
    return padded
