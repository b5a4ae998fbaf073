"""What the kernel benchmarks share: a linear with random codes and the launches of its kernels, and their timing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from framequant import storage
from framequant.codes.grid import GridSpec
from framequant.codes.packing import pack_codes
from framequant.codes.trellis import PAIR_ID, TrellisSpec
from framequant.frames import block_frame, build_frame, choose_frame
from framequant.kernels.block_plan import block_plan
from framequant.kernels.product_bytes_triton import byte_product
from framequant.kernels.product_triton import product
from framequant.kernels.transform_plan import transform_plan
from framequant.kernels.transform_triton import LAST_BIT, transform
from framequant.kernels.vector_triton import vector_transform
from framequant.kernels.words import row_shifts, to_words, word_layout
from framequant.spec import LinearSpec

SCALAR = GridSpec("sigma_clip", 4, "symmetric")
TRELLIS = TrellisSpec(12, (2,))
PAIRS = TrellisSpec(16, (4,), codebook=PAIR_ID)  # two weights a state
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLD = 160e6  # bytes of codes to run through: more than twice the L2 cache of an H100
MULTIPROCESSORS = 132

Config = tuple[int, int, int, int, int]  # rows, words or bytes, columns of a tile; stages; warps


def random_bytes(spec: LinearSpec) -> torch.Tensor:
    """Stored bytes of random codes."""
    shape = storage.layout(spec)["packed_codes"][0]
    if isinstance(spec.code, GridSpec) and spec.code.num_levels.bit_count() > 1:  # not every byte is one
        codes = torch.randint(
            0, spec.code.num_levels, spec.coefficient_shape, dtype=torch.uint8, device=DEVICE
        )
        return pack_codes(codes, spec.code.num_levels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


class Case:
    """A quantized linear with random codes, as many copies as make them cold, and its launches.

    Args:
        shape: out_features, in_features.
        code: of the coefficients.
        redundancy: of the input frame; the output frame has 1.
        cold: bytes of codes that all copies together should have.
        as_bytes: integer tensor cores on bytes (scalar codes only); else halves.
        block: of an output frame that is local to so many rows; 0 for one transform of all.
    """

    def __init__(self, shape: tuple[int, int], code: object, redundancy: float = 1.125, cold: float = COLD,
                 as_bytes: bool = False, block: int = 0) -> None:  # fmt: skip
        self.shape, self.as_bytes = shape, as_bytes
        frame_in, frame_out = choose_frame(shape[1], redundancy, seed=3), choose_frame(shape[0], 1.0, seed=5)
        if block:
            frame_out = block_frame(shape[0], block, seed=5)
        self.frames = build_frame(frame_in), build_frame(frame_out)
        self.spec = LinearSpec(shape[1], shape[0], frame_in, frame_out, code)
        self.rows, self.cols = self.spec.coefficient_shape
        self.layout = word_layout(self.spec)
        self.shifts = row_shifts(self.layout, DEVICE)
        stored = storage.layout(self.spec)["packed_codes"][0]
        self.bytes = stored[0] * stored[1]
        copies = max(1, min(48, -(-int(cold) // self.bytes)))
        self.packed = [random_bytes(self.spec) for _ in range(copies)]
        self.words = [to_words(packed, self.spec, self.layout) for packed in self.packed]
        if as_bytes:
            self.words = [words.view(torch.int8) for words in self.words]
        self.count = -(-self.cols * self.layout.bits // 8) if as_bytes else self.layout.length
        self.interleave = 8 // self.layout.bits if as_bytes else self.layout.codes_per_word
        scales = torch.rand(storage.layout(self.spec)["scales"][0], device=DEVICE) * 0.1 + 0.05
        self.scales = scales.to(storage.layout(self.spec)["scales"][1])
        self.into = transform_plan(self.frames[0], True, DEVICE)
        self.out = block_plan(self.frames[1], DEVICE) or transform_plan(self.frames[1], False, DEVICE)

    def tensors(self, tokens: int, splits: int) -> None:
        """Make inputs and outputs for this many tokens; outputs begin as NaN."""
        self.x = torch.randn(tokens, self.spec.in_features, device=DEVICE, dtype=torch.float16)
        shape = (
            (tokens, 4, self.interleave, self.count)
            if self.as_bytes
            else (tokens, self.interleave, self.count)
        )
        if self.as_bytes:
            self.z = torch.zeros(shape, device=DEVICE, dtype=torch.int8)
        else:
            self.z = torch.zeros(shape, device=DEVICE, dtype=torch.float16)
        self.unit = torch.ones(tokens, device=DEVICE)
        self.sums = torch.zeros(tokens, self.into.num_rows, device=DEVICE)
        self.vector_sums = torch.zeros(tokens, self.into.sizes[0], device=DEVICE)
        self.u = torch.full((splits, tokens, self.rows), float("nan"), device=DEVICE, dtype=torch.float32)
        self.y = torch.full(
            (tokens, self.spec.out_features), float("nan"), device=DEVICE, dtype=torch.float16
        )

    def splits(self, config: Config, programs: int, tokens: int) -> tuple[int, int]:
        """Splits for about so many programs, and the span of each."""
        columns = tokens * (4 if self.as_bytes else 1)
        blocks = -(-self.rows // config[0]) * -(-columns // config[2])
        steps = -(-self.count // config[1])
        splits = max(1, min(steps, round(programs / blocks), 16))
        span = -(-steps // splits) * config[1]
        return -(-self.count // span), span

    def product(self, copy: int, config: Config, splits: int, span: int, pdl: bool = False,
                prefetch: bool = False, vector: bool = False) -> None:  # fmt: skip
        rows, step, columns, stages, warps = config
        lay, tokens, words = self.layout, self.x.shape[0], self.words[copy]
        ahead = min(span, self.count) * words.element_size() // 16 * 16 if prefetch else 0
        tile = {"BR": rows, "BK": step, "BN": columns, "STAGES": stages, "PDL": pdl}
        tile |= {"num_warps": warps, "launch_pdl": pdl}
        scaled = self.scales.numel() > 1
        sums = self.vector_sums if vector else self.sums
        tile |= {"PARTS": sums.shape[1], "PADDED_PARTS": 1 << (sums.shape[1] - 1).bit_length()}
        if self.as_bytes:
            byte_product[(-(-self.rows // rows), splits, -(-tokens * 4 // columns))](
                words, self.z, sums, self.scales, self.u, self.rows, self.count, words.shape[1], span, tokens,
                LAST_BIT, (1 << lay.bits) / 2 - 0.5, BITS=lay.bits, ROW_SCALES=scaled, HELD=1, LOOP=span > step, **tile,
            )  # fmt: skip
            return
        product[(-(-self.rows // rows), splits, -(-tokens // columns))](
            words, self.z, sums, self.scales, self.scales if self.shifts is None else self.shifts, self.u, self.rows,
            self.count, lay.stride, span, tokens, lay.factor, TRELLIS=lay.trellis, BITS=lay.bits,
            MULTIPLIER=lay.multiplier, ADDEND=lay.addend, PATTERN=lay.pattern, LEVELS=lay.levels,
            CENTRED=not lay.trellis, ROW_SCALES=scaled, PREFETCH=ahead, **tile,
        )  # fmt: skip

    def transform(
        self, analysis: bool, parts: int = 1, low: bool = True, pdl: bool = False, warps: int = 4
    ) -> None:
        plan = self.into if analysis else self.out
        source, target = (self.x, self.z) if analysis else (self.u, self.y)
        transform[(self.x.shape[0], plan.num_rows)](
            source, plan.signs, *plan.matrices, source, target, self.unit, self.sums, self.x.shape[0],
            source.stride(-2), source.stride(0) if parts > 1 else 0, self.count, plan.norm, *plan.sizes, *plan.padded,
            ROWS=16, PARTS=parts, ANALYSIS=analysis, INTERLEAVE=self.interleave if analysis else 1,
            PLANES=analysis and self.as_bytes, BIAS=False, LOW=low, PDL=pdl, num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip

    def vector(self, analysis: bool, parts: int = 1, pdl: bool = False, warps: int = 4) -> None:
        """Analysis or synthesis with one program for each index of the first axis."""
        plan = self.into if analysis else self.out
        source, target = (self.x, self.z) if analysis else (self.u, self.y)
        vector_transform[(self.x.shape[0], plan.sizes[0])](
            source, plan.signs, *plan.matrices, source, target, self.unit, self.vector_sums, self.x.shape[0],
            source.stride(-2), source.stride(0) if parts > 1 else 0, self.count, plan.norm, *plan.sizes, *plan.padded,
            PARTS=parts, ANALYSIS=analysis, INTERLEAVE=self.interleave if analysis else 1,
            PLANES=analysis and self.as_bytes, BIAS=False, PDL=pdl, num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip

    def coefficients(self) -> torch.Tensor:
        """What the product reads, as float64 (tokens, cols) in units of the token."""
        z = self.z.double()
        if self.as_bytes:
            z = (z[:, 0] + 256 * z[:, 1] + 65536 * z[:, 2]) * LAST_BIT
        return z.transpose(1, 2).reshape(len(z), -1)[:, : self.cols]

    def matrix(self) -> torch.Tensor:
        """D̃ of the first copy in float64."""
        tensors = {"packed_codes": self.packed[0], "scales": self.scales}
        return storage.decode_rows(self.spec, tensors, 0, self.rows, torch.float64)

    def product_error(self) -> float:
        """Relative error of ``u`` against float64; NaN where something was not written."""
        exact = self.coefficients() @ self.matrix().T
        return float((self.u.double().sum(0) - exact).norm() / exact.norm())


def captured(launches: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of launches, the first two of which are run before."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def graphs_us(several: list[list[Callable[[], object]]], budget: float = 0.015) -> list[float]:
    """Median microseconds of one launch of each list, from replays of graphs of them, in turns.

    Replays for as long before settle the clocks; in turns they are the same for all.
    """
    graphs, times, spent = [captured(launches) for launches in several], [[] for _ in several], 0.0
    begin_time = time.perf_counter()
    while time.perf_counter() - begin_time < budget:
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    while len(times[0]) < 5 or (spent < budget and len(times[0]) < 200):
        for graph, launches, found in zip(graphs, several, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / len(launches))
            spent += found[-1] * len(launches) / 1e6
    return [sorted(found)[len(found) // 2] for found in times]


def graph_us(launches: list[Callable[[], object]], budget: float = 0.015) -> float:
    """Median microseconds of one launch, from replays of a graph of all of them."""
    return graphs_us([launches], budget)[0]
