"""PTX of a kernel for a GPU that is not here; only where TRITON_INTERPRET is off."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """Compile for compute capability 9.0 with early starts; pointers are aligned, arguments not named 32-bit integers.

    Args:
        types: of arguments; of other pointers ``*fp32``.
    """
    signature = {}
    for name in kernel.arg_names:
        usual = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, usual)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "launch_pdl": True}
    text: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return text
