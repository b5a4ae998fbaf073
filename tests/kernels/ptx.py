"""The few PTX instructions that our kernels' inline pieces use, interpreted: what compiles is not yet right."""

from __future__ import annotations

import re

import numpy as np

WORD = (1 << 32) - 1
Registers = dict[str, int]


def halves(word: int) -> np.ndarray:
    return np.array([word & 0xFFFF, word >> 16], dtype=np.uint16).view(np.float16)


def word_of(values: np.ndarray) -> int:
    low, high = values.astype(np.float16).view(np.uint16)
    return int(low) | int(high) << 16


def _lop3(a: int, b: int, c: int, table: int) -> int:
    assert table == 0xEA
    return a & b | c


def _permute(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(data[selector >> 4 * i & 15] for i in range(4)), "little")


def _fma(a: int, b: int, c: int) -> int:
    x, y, z = (halves(word).astype(np.float64) for word in (a, b, c))
    return word_of(x * y + z)  # exact in float64, rounded once


OPERATIONS = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & WORD,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "shf.r.wrap.b32": lambda a, b, n: (b << 32 | a) >> (n & 31) & WORD,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & WORD,
    "dp4a.u32.u32": lambda a, b, c: sum((a >> 8 * i & 255) * (b >> 8 * i & 255) for i in range(4)) + c,
    "prmt.b32": _permute,
    "fma.rn.f16x2": _fma,
    "sub.rn.f16x2": lambda a, b: word_of(halves(a).astype(np.float64) - halves(b).astype(np.float64)),
}


def interpret(text: str, *inputs: int) -> int:
    """The output ``$0`` of a piece for inputs ``$1`` and on, all 32-bit words."""
    registers: Registers = {f"${i + 1}": value for i, value in enumerate(inputs)}
    for line in re.sub(r"\{|\}|\.reg [^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        name, rest = line.split(None, 1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[part] if part in registers else int(part, 0) for part in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]
