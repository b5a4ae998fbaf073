"""Inner products of packed codes with integer activations, as vectors of LLVM: what numba's loops are built from.

``S`` *streams* of 15-bit integers (tokens, or the halves of one token's 30-bit integers) are multiplied with the
codes of one row; each code is decoded once, in registers, and pairs of 16-bit products go into 32-bit sums (one
``vpmaddwd`` or ``vpdpwssd``). Sums are exact, so results do not depend on the machine, on the number of threads
or on how tokens are batched. Vectors are 256 bits wide: any x86 with AVX2 has them, and LLVM splits them elsewhere.

Only ``framequant.kernels.product_cpu`` imports this module. Imports numba, llvmlite and numpy, no torch.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # 16-bit lanes of a vector
TILES = 8  # 32-bit lanes: tiles side by side
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_V8 = ir.VectorType(_I8, 32)
_V16 = ir.VectorType(_I16, LANES)
_V32 = ir.VectorType(_I32, TILES)
_WIDE = ir.VectorType(_I32, LANES)
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def words_per_group(bits: int) -> int:
    """16-bit words after which codes of ``bits`` bits start at a word again."""
    return bits // math.gcd(bits, 16)


def codes_per_group(bits: int) -> int:
    """Codes in that many words."""
    return 16 // math.gcd(bits, 16)


def _constant(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [kind.element(value)] * kind.count)


def _indices(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), [_I32(value) for value in values])


def _load(builder: ir.IRBuilder, base: Any, place: Any, kind: ir.VectorType) -> Any:
    """Load a vector ``place`` bytes behind the address ``base``, however it is aligned."""
    pointer = builder.inttoptr(builder.add(base, place), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 1
    return loaded


def _store(builder: ir.IRBuilder, value: Any, base: Any, place: Any) -> None:
    """Store a vector ``place`` bytes behind the address ``base``, however it is aligned."""
    pointer = builder.inttoptr(builder.add(base, place), value.type.as_pointer())
    builder.store(value, pointer).align = 1


def _pair_products(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """``a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`` as 32-bit lanes; LLVM knows the pattern as one instruction."""
    product = builder.mul(builder.sext(a, _WIDE), builder.sext(b, _WIDE))
    nothing = ir.Constant(_WIDE, ir.Undefined)
    even = builder.shuffle_vector(product, nothing, _indices(range(0, LANES, 2)))
    odd = builder.shuffle_vector(product, nothing, _indices(range(1, LANES, 2)))
    return builder.add(even, odd)


def _byte_pairs(builder: ir.IRBuilder, words: Any) -> Any:
    """Sums of neighbouring bytes of 32-bit lanes, as 16-bit lanes."""
    if _IS_X86:
        kind = ir.FunctionType(_V16, [_V8, _V8])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.ub.sw")
        return builder.call(call, [builder.bitcast(words, _V8), _constant(_V8, 1)])
    halves = builder.bitcast(words, _V16)
    low = builder.and_(halves, _constant(_V16, 255))
    return builder.add(low, builder.lshr(halves, _constant(_V16, 8)))


def _accumulators(builder: ir.IRBuilder, streams: int) -> list[list[Any]]:
    """Two sums a stream, so that additions need not wait for one another."""
    zero = _constant(_V32, 0)
    return [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(streams)]


def _clear(builder: ir.IRBuilder, sums: list[list[Any]]) -> None:
    for pair in sums:
        for total in pair:
            builder.store(_constant(_V32, 0), total)


def _add_to_results(builder: ir.IRBuilder, sums: list[list[Any]], results: Any) -> None:
    """Add each stream's sum to the 64-bit integer at ``results`` + 8 * stream."""
    for stream, pair in enumerate(sums):
        total = builder.add(builder.load(pair[0]), builder.load(pair[1]))
        _add_lanes(builder, total, builder.add(results, results.type(8 * stream)))


def _add_lanes(builder: ir.IRBuilder, lanes: Any, place: Any) -> None:
    """Add the sum of 32-bit lanes to the 64-bit integer at the address ``place``."""
    pointer = builder.inttoptr(place, _I64.as_pointer())
    wide = builder.sext(lanes, ir.VectorType(_I64, TILES))
    kind = ir.FunctionType(_I64, [wide.type])
    call = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{TILES}i64")
    builder.store(builder.add(builder.load(pointer), builder.call(call, [wide])), pointer)


def _scalar_dot(bits: int, streams: int) -> Callable[..., Any]:
    """The intrinsic ``dot(words, row_stride, rows, z, z_stride, chunks, results)``, addresses as integers.

    A chunk is ``LANES`` groups of words of one row; ``z`` holds, a chunk after the other, code p of every group as
    ``LANES`` 16-bit integers, p rising. Strides are in bytes; ``results`` is (rows, streams) int64, added to.
    """
    vectors, codes = words_per_group(bits), codes_per_group(bits)

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words, row_stride, rows, z, z_stride, chunks, results = arguments
        number = words.type
        sums = _accumulators(builder, streams)
        with cgutils.for_range(builder, rows, intp=number) as row_loop:
            _clear(builder, sums)
            row = builder.add(words, builder.mul(row_loop.index, row_stride))
            with cgutils.for_range(builder, chunks, intp=number) as loop:
                start = builder.mul(loop.index, number(2 * LANES * vectors))
                groups = _deal(builder, row, start, vectors)
                for p in range(codes):
                    code = _extract(builder, groups, p * bits, bits)
                    place = builder.mul(loop.index, number(2 * LANES * codes))
                    place = builder.add(place, number(2 * LANES * p))
                    for stream in range(streams):
                        at = builder.add(place, builder.mul(z_stride, number(stream)))
                        value = _pair_products(builder, code, _load(builder, z, at, _V16))
                        total = sums[stream][p % 2]
                        builder.store(builder.add(builder.load(total), value), total)
            _add_to_results(
                builder, sums, builder.add(results, builder.mul(row_loop.index, number(8 * streams)))
            )
        return _I64(0)

    @intrinsic
    def dot(  # type: ignore[no-untyped-def]
        typing_context, words, row_stride, rows, z, z_stride, chunks, results
    ):
        return types.int64(*[types.intp] * 7), generate

    return dot


def _deal(builder: ir.IRBuilder, words: Any, start: Any, vectors: int) -> list[Any]:
    """Load ``vectors`` vectors of words; the i-th result holds the i-th word of each group."""
    number = words.type
    loaded = [_load(builder, words, builder.add(start, number(2 * LANES * v)), _V16) for v in range(vectors)]
    if vectors == 1:
        return loaded
    together = loaded[0]
    for count, vector in enumerate(loaded[1:], start=1):
        # Shuffles take two vectors of one length, so the newcomer is stretched first.
        longer = LANES * (count + 1)
        stretched = builder.shuffle_vector(
            vector,
            ir.Constant(_V16, ir.Undefined),
            _indices([min(i, LANES - 1) for i in range(LANES * count)]),
        )
        kept = range(LANES * count)
        added = range(LANES * count, LANES * count + LANES)
        together = builder.shuffle_vector(together, stretched, _indices([*kept, *added][:longer]))
    nothing = ir.Constant(together.type, ir.Undefined)
    return [
        builder.shuffle_vector(together, nothing, _indices(range(i, LANES * vectors, vectors)))
        for i in range(vectors)
    ]


def _extract(builder: ir.IRBuilder, groups: list[Any], first: int, bits: int) -> Any:
    """Bits ``first`` … ``first + bits - 1`` of every group."""
    index, shift = divmod(first, 16)
    value = groups[index]
    if shift:
        value = builder.lshr(value, _constant(_V16, shift))
    if shift + bits > 16:
        value = builder.or_(value, builder.shl(groups[index + 1], _constant(_V16, 16 - shift)))
    if shift + bits == 16:
        return value
    return builder.and_(value, _constant(_V16, (1 << bits) - 1))


def _trellis_dot(streams: int, each: int) -> Callable[..., Any]:
    """The intrinsic ``dot(words, places, rows, z, z_stride, chunks, book, sums, results)``, addresses as integers.

    Adds up some rows of one row of tiles, over ``TILES * chunks`` tiles side by side. ``words`` is the first tile's
    32-bit word 0; ``places`` has for each of the states of a row of a tile, of ``each`` columns, three int64: words
    from there to the one that holds its lowest bit, to the one above it, and the bit. ``z`` holds, a chunk after the
    other, state by state the activations of ``TILES`` tiles: each integer twice in a 32-bit lane, or both of a state.
    ``book`` are the int32 numbers mask, multiplier, addend; ``sums`` is room for (rows, streams, TILES) int32, results
    (rows, streams) int64, added to. They are sums of bytes as they are, without the centre.

    A row's states are written out one after the other: loops over the few chunks of a short row would be left, and
    that mispredicted, eight times a row.
    """

    def generate(_: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        words, places, rows, z, z_stride, chunks, book, sums, results = arguments
        number = words.type
        size = 4 * TILES

        def constant(index: int) -> Any:
            pointer = builder.inttoptr(builder.add(book, number(4 * index)), _I32.as_pointer())
            return _splat(builder, builder.load(pointer))

        def place(index: Any) -> Any:
            """Bytes from ``sums`` to a sum; those of a row's streams follow one another."""
            return builder.mul(index, number(size))

        mask, multiplier, addend = (constant(index) for index in range(3))
        with cgutils.for_range(builder, builder.mul(rows, number(streams)), intp=number) as loop:
            _store(builder, _constant(_V32, 0), sums, place(loop.index))
        with cgutils.for_range(builder, chunks, intp=number) as chunk:
            tiles = builder.add(words, builder.mul(chunk.index, number(size)))
            first = builder.add(z, builder.mul(chunk.index, number(16 // each * size)))
            with cgutils.for_range(builder, rows, intp=number) as row:
                spots = builder.add(places, builder.mul(row.index, number(16 // each * 24)))
                start = builder.mul(row.index, number(streams))
                own = [place(builder.add(start, number(stream))) for stream in range(streams)]
                held = [[_load(builder, sums, at, _V32), _constant(_V32, 0)] for at in own]
                for column in range(16 // each):
                    state = _state(builder, tiles, builder.add(spots, number(24 * column)))
                    hashed = builder.mul(builder.and_(state, mask), multiplier)
                    levels = _byte_pairs(builder, builder.add(hashed, addend))
                    for stream, pair in enumerate(held):
                        at = builder.add(builder.mul(z_stride, number(stream)), number(size * column))
                        value = _pair_products(builder, levels, _load(builder, first, at, _V16))
                        pair[column % 2] = builder.add(pair[column % 2], value)
                for pair, at in zip(held, own, strict=True):
                    _store(builder, builder.add(*pair), sums, at)
        with cgutils.for_range(builder, builder.mul(rows, number(streams)), intp=number) as loop:
            lanes = _load(builder, sums, place(loop.index), _V32)
            _add_lanes(builder, lanes, builder.add(results, builder.mul(loop.index, number(8))))
        return _I64(0)

    @intrinsic
    def dot(  # type: ignore[no-untyped-def]
        typing_context, words, places, rows, z, z_stride, chunks, book, sums, results
    ):
        return types.int64(*[types.intp] * 9), generate

    return dot


def _state(builder: ir.IRBuilder, tiles: Any, spot: Any) -> Any:
    """The bits of ``TILES`` tiles from a state's lowest on, at one of the ``places`` of ``_trellis_dot``."""
    number = tiles.type

    def words(part: int) -> Any:
        pointer = builder.inttoptr(builder.add(spot, number(8 * part)), _I64.as_pointer())
        return _load(builder, tiles, builder.mul(builder.load(pointer), number(4)), _V32)

    bit = builder.load(builder.inttoptr(builder.add(spot, number(16)), _I32.as_pointer()))
    return _funnel(builder, words(1), words(0), _splat(builder, bit))


def _splat(builder: ir.IRBuilder, value: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_V32, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(vector, ir.Constant(_V32, ir.Undefined), _indices([0] * TILES))


def _funnel(builder: ir.IRBuilder, high: Any, low: Any, shift: Any) -> Any:
    """The low words of ``high:low`` shifted right by less than 32."""
    kind = ir.FunctionType(_V32, [_V32] * 3)
    call = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fshr.v{TILES}i32")
    return builder.call(call, [high, low, shift])


scalar_dot_1_1, scalar_dot_1_2, scalar_dot_1_4 = (_scalar_dot(1, streams) for streams in (1, 2, 4))
scalar_dot_2_1, scalar_dot_2_2, scalar_dot_2_4 = (_scalar_dot(2, streams) for streams in (1, 2, 4))
scalar_dot_3_1, scalar_dot_3_2, scalar_dot_3_4 = (_scalar_dot(3, streams) for streams in (1, 2, 4))
scalar_dot_4_1, scalar_dot_4_2, scalar_dot_4_4 = (_scalar_dot(4, streams) for streams in (1, 2, 4))
trellis_dot_1, trellis_dot_2, trellis_dot_4 = (_trellis_dot(streams, 1) for streams in (1, 2, 4))
pair_dot_1, pair_dot_2, pair_dot_4 = (_trellis_dot(streams, 2) for streams in (1, 2, 4))
