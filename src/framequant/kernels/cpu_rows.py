"""Rows times a small matrix in float32, as vectors of LLVM: what a frame's transform on the CPU is made of.

Compilers make of the loops one that reads and writes a row of results for each few numbers; here results of some rows
by some vectors of columns stay in registers, eight or so that do not wait for one another.

Only ``framequant.kernels.transform_cpu`` imports this module. Imports numba and llvmlite, no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # numbers of a vector
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _address(builder: ir.IRBuilder, base: Any, place: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, place), kind.as_pointer())


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(_I32, LANES), [_I32(0)] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, _I32(0)), nothing, lanes)


def _rows_times(rows: int, vectors: int) -> Callable[..., Any]:
    """The intrinsic ``product(source, matrix, result, count, inner, outer)``, addresses as integers.

    Of ``rows * count`` rows of ``inner`` numbers the products with ``8 * vectors`` columns of a matrix (inner, outer),
    from the column at the address ``matrix`` on; rows of results are ``outer`` numbers apart.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        source, matrix, result, count, inner, outer = arguments
        number = source.type
        zero = ir.Constant(_VECTOR, [_F32(0.0)] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
        wide, long = builder.mul(outer, number(4)), builder.mul(inner, number(4))
        with cgutils.for_range(builder, count, intp=number) as loop:
            for row in sums:
                for total in row:
                    builder.store(zero, total)
            first = builder.mul(loop.index, number(rows))
            begin = builder.add(source, builder.mul(first, long))
            with cgutils.for_range(builder, inner, intp=number) as step:
                line = builder.add(matrix, builder.mul(step.index, wide))
                column = builder.add(begin, builder.mul(step.index, number(4)))
                loaded = []
                for v in range(vectors):
                    loaded.append(builder.load(_address(builder, line, number(4 * LANES * v), _VECTOR)))
                    loaded[-1].align = 4
                for r, row in enumerate(sums):
                    value = builder.load(_address(builder, column, builder.mul(long, number(r)), _F32))
                    factor = _splat(builder, value)
                    for v, total in enumerate(row):
                        flags = ("contract",)
                        term = builder.fmul(factor, loaded[v], flags=flags)
                        builder.store(builder.fadd(builder.load(total), term, flags=flags), total)
            to = builder.add(result, builder.mul(first, wide))
            for r, row in enumerate(sums):
                for v, total in enumerate(row):
                    place = builder.add(builder.mul(wide, number(r)), number(4 * LANES * v))
                    builder.store(builder.load(total), _address(builder, to, place, _VECTOR)).align = 4
        return _I64(0)

    @intrinsic
    def product(typing_context, source, matrix, result, count, inner, outer):  # type: ignore[no-untyped-def]
        return types.int64(*[types.intp] * 6), generate

    return product


#: Of so many rows by so many vectors: with 32, 16 and 8 columns, each also for a row by itself.
rows_2_4, rows_4_2, rows_8_1 = _rows_times(2, 4), _rows_times(4, 2), _rows_times(8, 1)
rows_1_4, rows_1_2, rows_1_1 = (_rows_times(1, vectors) for vectors in (4, 2, 1))
