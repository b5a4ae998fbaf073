"""The product of a quantized linear on several threads, for the few microseconds that one takes in decoding.

Threads are those of torch's OpenMP, see ``openmp``. Rows are taken in pieces from a common counter, so that a thread
that the system has put aside holds up the others by one piece at most. Sums are exact: results do not depend on who
took what.

Only ``framequant.kernels.cpu`` imports this module. Imports numba, llvmlite and numpy, no torch.
"""

# Compiled in: e133b989524d (tests/kernels/test_stamps.py says why)
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from framequant.kernels.product_cpu import BIAS, SCALES, finish, multiply, pointer, prepare

#: Places in a job: the next row that nobody has taken, rows, rows of a piece, then the arguments of ``multiply``.
NEXT, ROWS, PIECE, Z, STREAMS, LENGTH, TOTALS, UNITS, TOKENS, PARTS, HEADER, SUMS = range(12)
JOB_SIZE = 12
HEADER_SIZE = BIAS + 2
#: Pieces for each thread.
PIECES = 4

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_float64_pointer, _int64_pointer = pointer(types.float64), pointer(types.int64)
_int16_pointer = pointer(types.int16)


@intrinsic
def _add(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Add to the integer at an address, whoever else does so at the time, and return what it was."""

    def generate(_, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "acq_rel")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def _fork(typing_context, fork, function, data, threads):  # type: ignore[no-untyped-def]
    """Call ``GOMP_parallel`` at the address ``fork``: ``function(data)`` on so many threads, this one among them."""

    def generate(_, builder, signature, arguments):  # type: ignore[no-untyped-def]
        anything = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [anything, anything, _I32, _I32]).as_pointer()
        call, function, data = (
            builder.inttoptr(argument, type_)
            for argument, type_ in zip(arguments, (kind, anything, anything), strict=False)
        )
        builder.call(call, [function, data, builder.trunc(arguments[3], _I32), _I32(0)])
        return _I64(0)

    return types.int64(types.intp, types.intp, types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def _take_part(job):
    """Take pieces of a job until none is left."""
    z = carray(_int16_pointer(job[Z]), (job[STREAMS], job[LENGTH]))
    totals = carray(_int64_pointer(job[TOTALS]), job[STREAMS])
    units = carray(_float64_pointer(job[UNITS]), job[TOKENS])
    u = carray(_float64_pointer(job[SUMS]), (job[TOKENS], job[ROWS]))
    header = carray(_int64_pointer(job[HEADER]), HEADER_SIZE)
    counter = job.ctypes.data + 8 * NEXT
    while True:
        start = _add(counter, job[PIECE])
        if start >= job[ROWS]:
            return
        stop = min(start + job[PIECE], job[ROWS])
        multiply(z, totals, units, job[PARTS], header, u, start, stop)


@cfunc(types.void(types.intp), cache=True)
def _part(address):
    _take_part(carray(_int64_pointer(address), JOB_SIZE))


#: Address of what each thread runs.
PART: int = _part.address


@njit(nogil=True, cache=True)
def linear(x, out, tokens, kind, parts, header, fork, part, threads):
    """``product_cpu.linear`` on several threads.

    Args:
        fork: address of ``GOMP_parallel``.
        part: ``PART``.
        threads: how many, 2 or more.
    """
    z, totals, units = prepare(x, tokens, kind, parts, header)
    rows = header[SCALES + 1]
    u = np.zeros((tokens, rows), np.float64)
    job = np.zeros(JOB_SIZE, np.int64)
    job[ROWS], job[PIECE] = rows, -(-rows // (16 * PIECES * threads)) * 16
    job[Z], job[STREAMS], job[LENGTH] = z.ctypes.data, z.shape[0], z.shape[1]
    job[TOTALS], job[UNITS], job[TOKENS] = totals.ctypes.data, units.ctypes.data, tokens
    job[PARTS], job[HEADER], job[SUMS] = parts, header.ctypes.data, u.ctypes.data
    _fork(fork, part, job.ctypes.data, threads)
    # A last use: numba frees an array that only an address still names.
    job[NEXT] = z.size + totals.size + units.size
    finish(u, out, kind, header)
