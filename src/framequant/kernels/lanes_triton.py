"""A kernel written for the threads of warps: a tensor of as many elements as a program has threads is one register.

Element i of such a tensor belongs to thread i, so PTX that works on a whole warp (tensor cores, shuffles, loads of 16
bytes, shared memory) can be written as an elementwise operation, and nothing is moved between layouts. Each function
has a second form in plain Triton for the interpreter, where "shared memory" is a tensor that the caller passes.

Only kernels import this module. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from framequant.kernels.triton_support import COMPILED

#: The signs of both halves of a word.
BOTH_SIGNS = tl.constexpr(0x80008000 - (1 << 32))


@triton.jit
def load_words(address, there):
    """Four int32 from a 16-byte aligned address each, not kept in L1; where ``there`` is 0 none, and they are any.

    The L2 cache gets the whole line, which another lane asks for soon.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p ld.global.L1::no_allocate.L2::128B.v4.b32 "
            "{$0, $1, $2, $3}, [$4]; }",
            "=r,=r,=r,=r,l,r", [address, there], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    at = address.to(tl.pointer_type(tl.int32), bitcast=True)
    mask = there != 0
    return (
        tl.load(at, mask=mask),
        tl.load(at + 1, mask=mask),
        tl.load(at + 2, mask=mask),
        tl.load(at + 3, mask=mask),
    )


@triton.jit
def four(values, INDEX: tl.constexpr):
    """The INDEX-th four elements of a tuple."""
    return values[4 * INDEX], values[4 * INDEX + 1], values[4 * INDEX + 2], values[4 * INDEX + 3]


@triton.constexpr_function
def _global_text(offset, once):
    return f"ld.global{'.L1::no_allocate' if once else ''}.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"


@triton.jit
def load_global_words(address, OFFSET: tl.constexpr, ONCE: tl.constexpr):
    """Four int32 each, OFFSET bytes from a 16-byte aligned address; ONCE: nothing is to keep them in L1."""
    if COMPILED:
        text: tl.constexpr = _global_text(OFFSET, ONCE)
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,l", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )  # fmt: skip
    at = address.to(tl.pointer_type(tl.int32), bitcast=True) + OFFSET // 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.constexpr_function
def _mma_text(unsigned):
    kind = "u8" if unsigned else "s8"
    return (
        f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.jit
def _bytes(words, UNSIGNED: tl.constexpr):
    """The four bytes of each word along a last axis."""
    shift = 8 * tl.arange(0, 4)
    if UNSIGNED:
        return (tl.expand_dims(words, -1) >> shift) & 255
    return (tl.expand_dims(words, -1) << (24 - shift)) >> 24


@triton.jit
def _added(acc, a, b):
    """Four registers and sums of products: a (warp, row, 1, quarter, step, 8 rows, n), b (warp, 1, column, …)."""
    total = tl.sum(tl.sum(tl.sum(a * b, axis=6), axis=4), axis=3)
    upper, lower = tl.split(tl.reshape(total, [acc[0].shape[0] * 2, 2]))
    c0, c1 = tl.split(tl.reshape(upper, [acc[0].shape[0], 2]))
    c2, c3 = tl.split(tl.reshape(lower, [acc[0].shape[0], 2]))
    return acc[0] + c0, acc[1] + c1, acc[2] + c2, acc[3] + c3


@triton.jit
def _operands(a0, a1, a2, a3, b0, b1):
    """Words of both operands of a product, as ``_added`` takes them."""
    warps: tl.constexpr = a0.shape[0] // 32
    a = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [warps, 8, 1, 4, 2, 2])
    return a, tl.reshape(tl.join(b0, b1), [warps, 1, 8, 4, 2, 1])


@triton.jit
def mma_bytes(acc, a0, a1, a2, a3, b0, b1, UNSIGNED: tl.constexpr):
    """Add the product of 16 × 32 bytes (``UNSIGNED`` or not) with 32 × 8 signed ones to four registers of int32.

    The registers are PTX's of ``mma.m16n8k32``: with lane = 4 row + quarter, ``a0`` holds bytes 4 quarter … of a row,
    ``a1`` of row + 8, ``a2`` and ``a3`` the same 16 bytes on; ``b0`` and ``b1`` likewise of a column in place of a row;
    the result (row, 2 quarter), (row, 2 quarter + 1), then of row + 8.
    """
    if COMPILED:
        text: tl.constexpr = _mma_text(UNSIGNED)
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, acc[0], acc[1], acc[2], acc[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    a, b = _operands(a0, a1, a2, a3, b0, b1)
    return _added(acc, _bytes(a, UNSIGNED), _bytes(b, False))


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """The two numbers of 16 bits of each word along a last axis, float32."""
    if tl.bfloat16 == DTYPE:
        return tl.join(words << 16, words & -0x10000).to(tl.float32, bitcast=True)
    low = (words << 16) >> 16
    parts = tl.join(low, words >> 16).to(tl.int16)
    return parts.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def mma_halves(acc, a0, a1, a2, a3, b0, b1):
    """Add the product of 16 × 16 halves with 16 × 8 ones to four float32, as PTX's ``mma.m16n8k16`` does.

    As in ``mma_bytes``, with two halves of a row in place of four bytes.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
            "{$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, acc[0], acc[1], acc[2], acc[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    a, b = _operands(a0, a1, a2, a3, b0, b1)
    return _added(acc, _halves(a, tl.float16), _halves(b, tl.float16))


@triton.constexpr_function
def _first_text(dtype):
    kind = "bf16" if dtype == tl.bfloat16 else "f16"
    return (
        f"{{ .reg .f32 z; mov.f32 z, 0f00000000; mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }"
    )


@triton.jit
def first_mma_halves(a0, a1, a2, a3, b0, b1, DTYPE: tl.constexpr = tl.float16):
    """The product alone, whose sums begin with zeros that need no registers; of float16 or bfloat16."""
    if COMPILED:
        text: tl.constexpr = _first_text(DTYPE)
        return tl.inline_asm_elementwise(
            text, "=f,=f,=f,=f,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    zero = a0 * 0.0
    a, b = _operands(a0, a1, a2, a3, b0, b1)
    return _added((zero, zero, zero, zero), _halves(a, DTYPE), _halves(b, DTYPE))


@triton.jit
def mma_eight_halves(acc, a0, a1, b0):
    """The same with eight columns and rows in place of sixteen: ``mma.m16n8k8``."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
            "=f,=f,=f,=f,r,r,r,f,f,f,f", [a0, a1, b0, acc[0], acc[1], acc[2], acc[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    none = b0 * 0
    return mma_halves(acc, a0, a1, none, none, b0, none)


@triton.constexpr_function
def _pack_text(dtype):
    return f"cvt.rn.{'bf16x2' if dtype == tl.bfloat16 else 'f16x2'}.f32 $0, $2, $1;"


@triton.jit
def packed_pair(low, high, DTYPE: tl.constexpr):
    """Two float32, rounded to a dtype of 16 bits, as a word."""
    if COMPILED:
        text: tl.constexpr = _pack_text(DTYPE)
        return tl.inline_asm_elementwise(text, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def byte_of_two(low, high, selector, mask):
    """A byte of eight, those of two words, in the lowest place of both halves of a word, and of that what is masked.

    ``selector``: the byte's number, four times, as hexadecimal digits; ``mask``: of the lowest byte of each half.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, $3; and.b32 $0, t, $4; }", "=r,r,r,r,r", [low, high, selector, mask],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    number = selector & 7
    byte = (tl.where(number < 4, low, high) >> (8 * (number % 4))) & 255
    return (byte | (byte << 16)) & mask


@triton.constexpr_function
def _two_text(factor):
    if factor == 1:
        return "prmt.b32 $0, $1, $2, $3;"
    half = (factor.bit_length() + 14) << 10  # a power of two
    return (
        f"{{ .reg .b32 t, f; mov.b32 f, {half * 0x10001}; prmt.b32 t, $1, $2, $3; mul.rn.f16x2 $0, t, f; }}"
    )


@triton.jit
def halves_of_two(first, second, selector, FACTOR: tl.constexpr):
    """Two halves out of two words, times a power of two; ``selector`` has the numbers of their bytes, lowest first."""
    if COMPILED:
        text: tl.constexpr = _two_text(FACTOR)
        return tl.inline_asm_elementwise(
            text, "=r,r,r,r", [first, second, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    found = ()
    for i in tl.static_range(2):
        number = (selector >> (8 * i)) & 7
        half = (tl.where(number < 4, first, second) >> (8 * (number % 4))).to(tl.int16)
        found += (half.to(tl.float16, bitcast=True).to(tl.float32) * FACTOR,)
    return packed_pair(found[0], found[1], tl.float16)


@triton.jit
def copy_some_to_shared(address, source, there, wanted):
    """Begin to bring 16 bytes each from a 16-byte aligned address to shared memory; zeros where ``there`` is 0.

    Where it is not ``wanted`` shared memory stays as it is.
    """
    if COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p cp.async.cg.shared.global [$1], [$2], 16, $3; mov.b32 $0, 0; }",
            "=r,r,l,r,r", [address, source, there * 16, wanted], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        at = address.to(tl.pointer_type(tl.int32), bitcast=True)
        found = source.to(tl.pointer_type(tl.int32), bitcast=True)
        for i in tl.static_range(4):
            value = tl.load(found + i, mask=(there != 0) & (wanted != 0), other=0)
            tl.store(at + i, value, mask=wanted != 0)


@triton.jit
def warp_barrier(thread):
    """Wait for the other lanes of the warp; what they wrote to shared memory is there then."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, 0;",
            "=r,r",
            [thread],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def some_barrier(number, threads):
    """Wait for so many threads, whole warps, that name this number, 1 … 14; 0 is that of all threads."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "bar.sync $1, $2; mov.b32 $0, 0;",
            "=r,r,r",
            [number, threads],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.constexpr_function
def _arrived_text(threads):
    return (
        f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p bar.sync 15, {threads}; @!p bar.arrive 15, {threads}; "
        "mov.b32 $0, 0; }"
    )


@triton.jit
def arrived_or_all(waiting):
    """Wait for all warps; those that are not ``waiting`` say that they have come this far, and go on."""
    if COMPILED:
        text: tl.constexpr = _arrived_text(waiting.shape[0])
        tl.inline_asm_elementwise(text, "=r,r", [waiting], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _number_text(dtype, offset):
    at = f"[$1+{offset}]"
    if dtype == tl.float16:
        return f"{{ .reg .b16 h; ld.shared.b16 h, {at}; cvt.f32.f16 $0, h; }}"
    if dtype == tl.bfloat16:
        return f"{{ .reg .b16 h, z; mov.b16 z, 0; ld.shared.b16 h, {at}; mov.b32 $0, {{z, h}}; }}"
    return f"ld.shared.b32 $0, {at};"


@triton.jit
def load_shared_number(address, DTYPE: tl.constexpr, OFFSET: tl.constexpr = 0):
    """A number of a float dtype each from shared memory, OFFSET bytes on, as float32."""
    if COMPILED:
        text: tl.constexpr = _number_text(DTYPE, OFFSET)
        return tl.inline_asm_elementwise(text, "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return tl.load((address + OFFSET).to(tl.pointer_type(DTYPE), bitcast=True)).to(tl.float32)


@triton.jit
def prefetch_line(address, there):
    """Ask for the line of 128 bytes that each address is in to come to the L2 cache, where ``there`` is not 0."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
            [address, there], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def end_of_copies(thread):
    """What this thread began to copy since the last such end is a group."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "cp.async.commit_group; mov.b32 $0, 0;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.constexpr_function
def _wait_text(groups):
    return f"cp.async.wait_group {groups}; mov.b32 $0, 0;" if groups else "cp.async.wait_all; mov.b32 $0, 0;"


@triton.jit
def wait_for_copies(thread, GROUPS: tl.constexpr = 0):
    """Wait until what this thread began to copy has come, all but the last GROUPS groups; a barrier must follow."""
    if COMPILED:
        text: tl.constexpr = _wait_text(GROUPS)
        tl.inline_asm_elementwise(text, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def from_lane(value, lane):
    """The value that another lane of the warp, 0 … 31, has; 32-bit numbers."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [value, lane], dtype=value.dtype,
            is_pure=True, pack=1,
        )  # fmt: skip
    thread = tl.arange(0, value.shape[0])
    return tl.gather(value, thread // 32 * 32 + lane, 0)


@triton.jit
def lane_sum(value):
    """The sum over the lanes of a warp."""
    lane = tl.arange(0, value.shape[0]) % 32
    for i in tl.static_range(5):
        value += from_lane(value, lane ^ (1 << i))
    return value


@triton.jit
def lane_largest(value):
    """The largest of a warp's numbers, none negative, as integers order their bits."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        lane = tl.arange(0, value.shape[0]) % 32
        for i in tl.static_range(5):
            value = tl.maximum(value, from_lane(value, lane ^ (1 << i)))
        return value


@triton.jit
def larger_pair(pair, other):
    """The larger of two bfloat16, none negative, and of the moduli of two others, as words; not of a NaN and one."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, 0x7fff7fff; max.bf16x2 $0, $1, t; }", "=r,r,r", [pair, other],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    low = tl.maximum(pair & 0x7FFF, other & 0x7FFF)
    return low | (tl.maximum((pair >> 16) & 0x7FFF, (other >> 16) & 0x7FFF) << 16)


@triton.jit
def lane_hadamard(value, SIZE: tl.constexpr):
    """Sylvester's Hadamard matrix of SIZE, a power of two up to 32, times each SIZE lanes."""
    lane = tl.arange(0, value.shape[0]) % 32
    for i in tl.static_range(5):
        if (1 << i) < SIZE:
            other = from_lane(value, lane ^ (1 << i))
            value = other + tl.where((lane >> i) % 2 == 1, -value, value)
    return value


@triton.jit
def byte_repeated(word, INDEX: tl.constexpr):
    """One of a word's four bytes, four times."""
    if COMPILED:
        text: tl.constexpr = _repeat_text(INDEX)
        # not pure, or copies that a loop could share would be kept in registers
        return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.int32, is_pure=False, pack=1)
    return ((word >> (8 * INDEX)) & 255) * 0x01010101


@triton.jit
def bytes_doubled(word, UPPER: tl.constexpr):
    """The two lower of a word's bytes, or the upper ones, each twice, side by side."""
    if COMPILED:
        text: tl.constexpr = _doubled_text(UPPER)
        return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.int32, is_pure=False, pack=1)
    first, second = (word >> (16 * UPPER)) & 255, (word >> (16 * UPPER + 8)) & 255
    return first * 0x0101 + second * 0x01010000


@triton.constexpr_function
def _doubled_text(upper):
    return f"prmt.b32 $0, $1, 0, {'0x3322' if upper else '0x1100'};"


@triton.jit
def half_word(word, BYTE: tl.constexpr):
    """The sixteen bits of a word from its BYTE-th byte on, 0 to 2, as an int32."""
    if COMPILED:
        text: tl.constexpr = _half_text(BYTE)
        return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    return (word >> (8 * BYTE)) & 0xFFFF


@triton.constexpr_function
def _half_text(byte):
    return f"prmt.b32 $0, $1, 0, 0x44{byte + 1}{byte};"


@triton.constexpr_function
def _repeat_text(index):
    return f"prmt.b32 $0, $1, 0, 0x{index}{index}{index}{index};"


@triton.constexpr_function
def _shared_text(size):
    return (
        f"{{ .reg .b64 t; .shared .align 16 .b8 framequant_shared[{size}]; mov.u64 t, framequant_shared; "
        "cvt.u32.u64 $0, t; }"
    )


@triton.jit
def shared_memory(SIZE: tl.constexpr, memory):
    """Where SIZE bytes of shared memory begin: an address, or ``memory``, a pointer, in the interpreter."""
    if COMPILED:
        text: tl.constexpr = _shared_text(SIZE)
        return tl.inline_asm_elementwise(
            text, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return memory.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.constexpr_function
def _store_text(offset):
    return f"st.shared.b32 [$1+{offset}], $2; mov.b32 $0, 0;"


@triton.jit
def store_shared(address, value, OFFSET: tl.constexpr = 0):
    """Write a float32 each to shared memory, OFFSET bytes on."""
    if COMPILED:
        text: tl.constexpr = _store_text(OFFSET)
        tl.inline_asm_elementwise(text, "=r,r,r", [address, value], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store((address + OFFSET).to(tl.pointer_type(tl.float32), bitcast=True), value)


@triton.constexpr_function
def _load_text(offset):
    return f"ld.shared.b32 $0, [$1+{offset}];"


@triton.jit
def load_shared(address, OFFSET: tl.constexpr = 0):
    """A float32 each from shared memory, OFFSET bytes on."""
    if COMPILED:
        text: tl.constexpr = _load_text(OFFSET)
        return tl.inline_asm_elementwise(text, "=r,r", [address], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return tl.load((address + OFFSET).to(tl.pointer_type(tl.float32), bitcast=True))


@triton.constexpr_function
def _store_where_text(space):
    return f"{{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.{space}.v4.b32 [$1], {{$2, $3, $4, $5}}; mov.b32 $0, 0; }}"


@triton.jit
def _store_words_there(address, words, there):
    """Four int32 each, for the interpreter, which has one memory."""
    at = address.to(tl.pointer_type(tl.int32), bitcast=True)
    for i in tl.static_range(4):
        tl.store(at + i, words[i], mask=there != 0)


@triton.jit
def store_shared_words(address, words, there):
    """Write four int32 each to a 16-byte aligned address, where ``there`` is not 0."""
    if COMPILED:
        text: tl.constexpr = _store_where_text("shared")
        tl.inline_asm_elementwise(
            text, "=r,r,r,r,r,r,r", [address, words[0], words[1], words[2], words[3], there], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        _store_words_there(address, words, there)


@triton.constexpr_function
def _store_words_text(offset):
    return f"st.global.v4.b32 [$1+{offset}], {{$2, $3, $4, $5}}; mov.b32 $0, 0;"


@triton.jit
def store_words(address, words, OFFSET: tl.constexpr = 0):
    """Write four int32 each, OFFSET bytes from a 16-byte aligned address."""
    if COMPILED:
        text: tl.constexpr = _store_words_text(OFFSET)
        tl.inline_asm_elementwise(
            text, "=r,l,r,r,r,r", [address, words[0], words[1], words[2], words[3]], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        at = address.to(tl.pointer_type(tl.int32), bitcast=True) + OFFSET // 4
        for i in tl.static_range(4):
            tl.store(at + i, words[i])


@triton.jit
def store_words_where(address, words, there):
    """Write four int32 each to a 16-byte aligned address, where ``there`` is not 0."""
    if COMPILED:
        text: tl.constexpr = _store_where_text("global")
        tl.inline_asm_elementwise(
            text, "=r,l,r,r,r,r,r", [address, words[0], words[1], words[2], words[3], there], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        _store_words_there(address, words, there)


@triton.jit
def store_pair_where(address, first, second, there):
    """Write two int32 each to an 8-byte aligned address, where ``there`` is not 0."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,l,r,r,r", [address, first, second, there], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        at = address.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(at, first, mask=there != 0)
        tl.store(at + 1, second, mask=there != 0)


@triton.constexpr_function
def _arrive_text(parties):
    """PTX of ``last_to_arrive``: what lanes wrote is in memory before one of them counts, what they read comes after.

    A counter that has seen all begins at 0 again.
    """
    return (
        "{ .reg .pred none, one; mov.b32 $0, 0; setp.eq.b32 none, $3, 0; @none bra.uni end; "
        "bar.warp.sync 0xffffffff; setp.eq.b32 one, $2, 0; "
        f"@one atom.acq_rel.gpu.global.inc.u32 $0, [$1], {parties - 1}; "
        "shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; bar.warp.sync 0xffffffff; "
        f"setp.eq.u32 one, $0, {parties - 1}; selp.b32 $0, 1, 0, one; end: }}"
    )


@triton.jit
def last_to_arrive(counter, lane, there, PARTIES: tl.constexpr):
    """Whether a warp is the last of PARTIES, anywhere, that count themselves: 1, or 0, also where ``there`` is 0.

    Then it sees what all of them wrote before. The counter, an int32 that all lanes of a warp name, is 0 before the
    first and after the last one. ``there``: the same for all lanes of a warp.
    """
    if COMPILED:
        text: tl.constexpr = _arrive_text(PARTIES)
        return tl.inline_asm_elementwise(
            text, "=&r,l,r,r", [counter, lane, there], dtype=tl.int32, is_pure=False, pack=1
        )
    at = counter + lane * 0
    before = tl.atomic_add(at, 1, mask=(there != 0) & (lane == 0))
    before = from_lane(tl.where(lane == 0, before, 0), lane * 0)
    last = (before == PARTIES - 1) & (there != 0)
    tl.store(at, 0, mask=last & (lane == 0))
    return last.to(tl.int32)


@triton.jit
def end_of_warps(finished):
    """Warps that have ``finished`` leave the program, which has no barriers from here on."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p exit; mov.b32 $0, 0; }", "=r,r", [finished], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.constexpr_function
def _transposed_text(offset):
    return f"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$1+{offset}], {{$2, $3, $4, $5}}; mov.b32 $0, 0;"


@triton.jit
def store_shared_transposed(address, words, OFFSET: tl.constexpr = 0):
    """Write four matrices of 8 × 8 numbers of 16 bits, transposed, OFFSET bytes on; for GPUs from sm_90 on.

    With lane = 4 row + quarter a lane has two neighbours of a row, 2 quarter …, in a word of each. Lane 8 i + j has the
    16-byte aligned address of column j of the i-th matrix.
    """
    if COMPILED:
        text: tl.constexpr = _transposed_text(OFFSET)
        tl.inline_asm_elementwise(
            text, "=r,r,r,r,r,r", [address, words[0], words[1], words[2], words[3]], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        lane = tl.arange(0, words[0].shape[0]) % 32
        for i in tl.static_range(4):
            for e in tl.static_range(2):
                at = from_lane(address.to(tl.int64), 8 * i + lane % 4 * 2 + e) + (OFFSET + lane // 4 * 2)
                tl.store(at.to(tl.pointer_type(tl.int16)), (words[i] >> (16 * e)).to(tl.int16))


@triton.constexpr_function
def _matrices_text(offset):
    return f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"


@triton.jit
def load_shared_transposed(address, OFFSET: tl.constexpr = 0):
    """Four matrices of 8 × 8 numbers of 16 bits from shared memory, transposed, OFFSET bytes on.

    Lane 8 i + j has the 16-byte aligned address of row j of the i-th matrix. With lane = 4 column + quarter a lane gets
    two neighbours of a column, rows 2 quarter …, in a word of each matrix.
    """
    if COMPILED:
        text: tl.constexpr = _matrices_text(OFFSET)
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,r", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )  # fmt: skip
    lane = tl.arange(0, address.shape[0]) % 32
    found = ()
    for i in tl.static_range(4):
        row = 8 * i + lane % 4 * 2
        low = from_lane(address.to(tl.int64), row) + (OFFSET + lane // 4 * 2)
        high = from_lane(address.to(tl.int64), row + 1) + (OFFSET + lane // 4 * 2)
        found += (
            (tl.load(low.to(tl.pointer_type(tl.int16))).to(tl.int32) & 0xFFFF)
            | (tl.load(high.to(tl.pointer_type(tl.int16))).to(tl.int32) << 16),
        )
    return found


@triton.constexpr_function
def _pair_text(offset):
    return f"st.shared.v2.b32 [$1+{offset}], {{$2, $3}}; mov.b32 $0, 0;"


@triton.jit
def store_shared_pair(address, first, second, OFFSET: tl.constexpr = 0):
    """Write two float32 each to an 8-byte aligned address, OFFSET bytes on."""
    if COMPILED:
        text: tl.constexpr = _pair_text(OFFSET)
        tl.inline_asm_elementwise(
            text, "=r,r,r,r", [address, first, second], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        store_shared(address, first, OFFSET)
        store_shared(address, second, OFFSET + 4)


@triton.constexpr_function
def _load_words_text(offset, ordered):
    return f"ld.{'volatile.' if ordered else ''}shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"


@triton.jit
def load_shared_words(address, OFFSET: tl.constexpr = 0, ORDERED: tl.constexpr = False):
    """Four int32 each from a 16-byte aligned address, OFFSET bytes on; before all later ones that are ORDERED, too."""
    if COMPILED:
        text: tl.constexpr = _load_words_text(OFFSET, ORDERED)
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,r", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )  # fmt: skip
    else:
        at = (address + OFFSET).to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.constexpr_function
def _load_where_text(offset):
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return (
        f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {zeros} "
        f"@p ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}]; }}"
    )


@triton.jit
def load_shared_words_where(address, there, OFFSET: tl.constexpr = 0):
    """The same where ``there`` is not 0; zeros elsewhere."""
    if COMPILED:
        text: tl.constexpr = _load_where_text(OFFSET)
        return tl.inline_asm_elementwise(
            text, "=&r,=&r,=&r,=&r,r,r", [address, there], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        at = (address + OFFSET).to(tl.pointer_type(tl.int32), bitcast=True)
        found = ()
        for i in tl.static_range(4):
            found += (tl.load(at + i, mask=there != 0, other=0),)
        return found


@triton.jit
def kept(address, words):
    """Four int32 each, by way of 16 bytes of shared memory for each thread: made here, before a barrier that follows.

    Compilers would make them where they are needed, when all else has come.
    """
    store_shared_words(address, words, words[0] * 0 + 1)
    return load_shared_words(address)


@triton.constexpr_function
def _planes_text(stride, offset, less):
    first, second, third = (f"[$1+{offset + i * stride}]" for i in range(3))
    return (
        f"{{ .reg .b32 t; mov.b32 $0, 0; st.shared.b8 {first}, $2; shr.u32 t, $2, 8; st.shared.b8 {second}, t; "
        f"shr.u32 t, $2, 16; {f'sub.u32 t, t, {less}; ' if less else ''}st.shared.b8 {third}, t; }}"
    )


@triton.jit
def store_shared_planes(
    address, value, STRIDE: tl.constexpr, OFFSET: tl.constexpr = 0, LESS: tl.constexpr = 0
):
    """Write the lowest three bytes, the third LESS a number, STRIDE apart, OFFSET bytes on."""
    if COMPILED:
        text: tl.constexpr = _planes_text(STRIDE, OFFSET, LESS)
        tl.inline_asm_elementwise(text, "=r,r,r", [address, value], dtype=tl.int32, is_pure=False, pack=1)
    else:
        for i in tl.static_range(3):
            byte = (value >> (8 * i)) - (LESS if i == 2 else 0)
            tl.store(address + (OFFSET + i * STRIDE), byte.to(tl.int8))
