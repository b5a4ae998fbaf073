"""Trellises of every rate on Triton: their words, where states lie in them, and the linears through the interpreter."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.frames import FrameKind, FrameSpec
from framequant.kernels.words import row_shifts, stored_bytes, to_words, word_layout
from framequant.spec import LinearSpec
from framequant.storage import layout
from tests.kernels.test_prompts import run

pytest.importorskip("triton")

NAMES = {1: "bytesum-1", 2: "bytepair-1"}
RATES = [step / 8 for step in range(8, 65)]


def linear_spec(code: TrellisSpec, rows: int, cols: int) -> LinearSpec:
    return LinearSpec(
        cols, rows, FrameSpec(FrameKind.IDENTITY, cols), FrameSpec(FrameKind.IDENTITY, rows), code
    )


@st.composite
def codes(draw: st.DrawFn) -> TrellisSpec:
    codebook, longest = draw(st.sampled_from([("bytesum-1", 8), ("bytepair-1", 4)]))
    length = draw(st.sampled_from([length for length in (1, 2, 4, 8) if length <= longest]))
    rates = draw(st.lists(st.integers(1, 8), min_size=length, max_size=length))
    return TrellisSpec(draw(st.integers(8, 16)), tuple(rates), codebook=codebook)


@settings(max_examples=60, deadline=None)
@given(codes(), st.integers(1, 70), st.integers(1, 300))
def test_words_hold_the_stored_bytes_and_nothing_else(code: TrellisSpec, rows: int, cols: int) -> None:
    spec = linear_spec(code, rows, cols)
    shape = layout(spec)["packed_codes"][0]
    packed = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = word_layout(spec)
    words = to_words(packed, spec, found)
    assert torch.equal(stored_bytes(words, spec, found), packed)
    assert found.rows(len(words)) == 16 * shape[0]
    assert (
        packed.numel() * found.stride == 4 * words.numel() * found.words
    )  # as many bytes but for a row's padding
    assert found.words <= found.stride < found.words + 8


@pytest.mark.parametrize("run_steps", [8, 16])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_states_lie_where_the_kernels_cut_them_out(run_steps: int, bits: int) -> None:
    from framequant.kernels import trellis_triton as kernel

    for rate in RATES:
        each = 2 if rate <= 4 and bits > 8 else 1  # all rates of one, some of two weights a state
        code = TrellisSpec(bits, rate_pattern(rate, each), codebook=NAMES[each])
        pattern = word_layout(linear_spec(code, 16, 16)).pattern
        size, loaded = code.bits_per_tile, kernel.loaded_words(pattern, run_steps, bits)
        assert kernel.tile_words(pattern) * 32 == size
        number = random.Random(int(8 * rate)).getrandbits(size)
        around = number | number << size
        for index in range(256 // run_steps):
            lowest = size * (256 // run_steps - 1 - index) * run_steps // 256
            words = around >> lowest // 32 * 32 & (1 << 32 * loaded) - 1  # what a kernel loads
            moved = words >> lowest % 32 & (1 << 32 * kernel.moved_words(pattern, run_steps, bits)) - 1
            assert not kernel.is_aligned(pattern, run_steps) or lowest % 32 == 0
            for step in range(run_steps):
                state = moved >> kernel.offset(pattern, run_steps, step) & (1 << bits) - 1
                place = code.offsets[(index * run_steps + step) // each]
                assert state == around >> place & (1 << bits) - 1


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_partners_share_a_window(bits: int) -> None:
    from framequant.kernels import trellis_triton as kernel

    for rate in RATES:
        pattern = sum(rate << 4 * step for step, rate in enumerate(rate_pattern(rate)))
        tops = [kernel.partner(pattern, 16, bits, step) for step in range(16)]
        pairs = [(low, top) for low, top in enumerate(tops) if top >= 0]
        for low, top in pairs:
            assert kernel.offset(pattern, 16, top) - kernel.offset(pattern, 16, low) == 32 - bits
        assert sorted(top for _, top in pairs) == [step for step, top in enumerate(tops) if top == -2]
    assert [kernel.partner(0x2, 16, 12, step) for step in (15, 14, 5, 4, 9)] == [5, 4, -2, -2, -1]


def test_patterns_that_no_kernel_takes_have_no_layout() -> None:
    code = TrellisSpec(12, (4, 4, 4, 4, 4, 4, 4, 5), codebook="bytepair-1")  # a tile of 528 bits
    assert word_layout(linear_spec(code, 16, 16)) is None


def test_rows_begin_where_their_shift_says() -> None:
    code = TrellisSpec(12, (2, 2, 2, 3))
    found = row_shifts(word_layout(linear_spec(code, 16, 16)), "cpu")
    assert found.tolist() == [code.offsets[16 * row + 15] % 32 for row in range(16)]


LINEARS = """
import torch
from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.kernels import launches, triton_linear
from tests.kernels.test_cpu import make_layer
torch.manual_seed(0)
launches.panel_tile = lambda _: launches.PanelTile(32, 16, 32, 4)  # the interpreter is slow
launches.PANEL_BYTES = 16384  # several panels
half, short = torch.float16, torch.bfloat16
cases = (
    (12, rate_pattern(2.25), False, (192, 70), (1.125, 1.0), 1, half),
    (12, rate_pattern(2.25), True, (192, 64), (1.0, 1.125), 5, half),
    (12, rate_pattern(2.25), True, (192, 130), (1.125, 1.0), 70, half),
    (8, rate_pattern(1.5), True, (100, 36), (1.0, 1.0), 1, short),
    (16, rate_pattern(3), False, (100, 36), (1.0, 1.0), 5, half),
    (16, rate_pattern(3.125), True, (64, 40), (1.0, 1.0), 70, half),
    (10, rate_pattern(1.125), False, (192, 36), (1.125, 1.0), 17, half),
    (12, rate_pattern(2.25), False, (1024, 36), (65 / 64, 1.0), 2, half),
    (12, rate_pattern(2.25), False, (1024, 36), (33 / 32, 1.0), 5, half),
    (12, rate_pattern(2.25), False, (1024, 36), (65 / 64, 1.0), 70, half),
    (12, (2,), True, (64, 40), (1.0, 1.0), 1, half),
    (13, (4, 1), False, (64, 40), (1.0, 1.0), 1, half),
    (9, rate_pattern(1), False, (64, 40), (1.0, 1.0), 70, half),
    (14, rate_pattern(5.125), True, (64, 40), (1.0, 1.0), 1, half),
    (16, (8,), True, (64, 40), (1.0, 1.0), 70, half),
    (16, (4,), True, (64, 40), (1.0, 1.0), 5, half, "bytepair-1"),
    (12, (4, 5), False, (64, 40), (1.0, 1.0), 70, half, "bytepair-1"),
)
for bits, rates, factors, features, redundancy, tokens, dtype, *codebook in cases:
    layer = make_layer(TrellisSpec(bits, rates, 16, 16, *codebook, row_factors=factors), features, redundancy)
    x = torch.randn(tokens, features[0]).to(dtype)
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    mine, plan = layer(x), layer._prepared[2]
    assert isinstance(plan, triton_linear.TritonPlan) and list(triton_linear._verdicts.values())[-1]
    assert plan.words.nbytes <= layer.packed_codes.nbytes * plan.layout.stride / plan.layout.words
    error, allowed = (float((y.double() - exact).norm() / exact.norm()) for y in (mine, torchs))
    times = 4 if dtype == short else 2  # the interpreter cuts bfloat16 off, which doubles its error
    assert error <= times * allowed, (bits, rates, features, tokens, error, allowed)
    torch.library.opcheck(
        torch.ops.framequant.product.default,
        (plan.words, torch.zeros(1, 16, plan.layout.length).half(), torch.zeros(1, plan.into.sizes[0]), plan.scales,
         plan.shifts, plan.spec.coefficient_shape[0], plan.numbers(plan.words), plan.layout.factor),
        test_utils=("test_schema", "test_faketensor"),
    )
"""

GROUPS = """
import torch
from torch import nn
from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.fused import fuse_, unfuse_
from framequant.kernels import launches
from tests.kernels.test_cpu import make_layer
torch.manual_seed(0)
launches.FEW_TOKENS = 4
launches.panel_tile = lambda _: launches.PanelTile(32, 16, 32, 4)
kinds = {"query": (2.25, True, 40), "key": (3, False, 24), "value": (2.25, False, 24), "gate": (3, True, 36)}
model = nn.Module()
for number, (name, (bits, factors, size)) in enumerate(kinds.items()):
    code = TrellisSpec(12, rate_pattern(bits), row_factors=factors)
    setattr(model, name, make_layer(code, (64, size), (1.0, 1.0), seed=4, codes=number))
model.half().eval()
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
inputs = [torch.randn(tokens, 64).half() for tokens in (1, 6)]
def outputs():
    return [getattr(model, name)(x) for x in inputs for name in kinds]
for name in kinds:
    getattr(model, name).backend = "triton"
before = outputs()
assert fuse_(model) == [("query", "value"), ("key", "gate")]
for found, expected in zip(outputs(), before):  # a group's panels are scaled by all of its scales
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)
after = unfuse_(model).state_dict()
assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
assert all(after[name].dtype == state[name].dtype for name in state)
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.codes.trellis_codebook import codebook
from framequant.kernels import launches
from framequant.kernels.product_triton import product
types = {"words_ptr": "*i32", "z_ptr": "*fp16", "sum_ptr": "*fp32", "scale_ptr": "*fp32", "shift_ptr": "*i32",
         "u_ptr": "*fp32", "rows": "i32", "words": "i32", "stride": "i32", "span": "i32", "tokens": "i32",
         "factor": "fp32"}
book, tile = codebook(12), launches.half_tile(True, 4096, 1, True)
for pattern in (0x2, 0x3222, 0x21, 0x3):
    constants = {"PARTS": 64, "PADDED_PARTS": 64, "TRELLIS": True, "BITS": 12, "MULTIPLIER": book.multiplier,
                 "ADDEND": book.addend, "PATTERN": pattern, "LEVELS": 0, "CENTRED": False, "ROW_SCALES": True,
                 "PREFETCH": 0, "BR": tile.rows, "BK": tile.step, "BN": tile.columns, "STAGES": tile.stages,
                 "PDL": True}
    constants |= {p.name: p.default for p in product.params if p.has_default}
    names = list(types)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name[-4:] in ("_ptr", "span")}
    source = ASTSource(product, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": tile.warps, "launch_pdl": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    loads = made.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield")[0]
    assert "ttg.async_copy_global_to_local" in loads and "tt.load" not in loads
    assert "ttg.local_store" not in made.asm["ttgir"], pattern  # levels stay in the threads that made them
"""


@pytest.mark.parametrize("program", [LINEARS, GROUPS], ids=["linears", "groups"])
def test_through_the_interpreter(program: str, tmp_path: Path) -> None:
    run(program, tmp_path, TRITON_INTERPRET="1")


def test_no_level_goes_through_shared_memory(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, "-W", "error", TRITON_INTERPRET="0")
