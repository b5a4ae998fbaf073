"""Scalar codes of 3, 5, 8 and more levels on Triton: their planes, and the linears through the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.codes.grid import GridSpec
from framequant.codes.packing import bytes_per_row, pack_codes
from framequant.frames import FrameKind, FrameSpec
from framequant.kernels.packed_words import source_bits
from framequant.kernels.words import stored_bytes, to_words, word_layout
from framequant.spec import LinearSpec
from tests.kernels.test_prompts import run

pytest.importorskip("triton")

LEVELS = [3, 5, 8, 32, 64, 128, 256]


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 8])
def test_planes_hold_every_bit_of_a_unit_once(bits: int) -> None:
    found = source_bits(bits)
    assert sorted(found) == [(word, bit) for word in range(16) for bit in range(bits)]
    whole = [word for word in range(16) if word < bits * (16 // bits)]
    for word in whole:  # side by side in one plane
        places = [found.index((word, bit)) for bit in range(bits)]
        assert places == list(range(places[0], places[0] + bits))
        assert places[0] // 16 == places[-1] // 16


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LEVELS), st.integers(1, 40), st.integers(1, 900), st.randoms())
def test_planes_give_the_stored_bytes_back(levels, rows, cols, random) -> None:
    frames = (FrameSpec(FrameKind.IDENTITY, dim) for dim in (cols, rows))
    spec = LinearSpec(cols, rows, *frames, GridSpec("uniform", levels, "symmetric"))
    codes = torch.randint(
        0, levels, (rows, cols), generator=torch.Generator().manual_seed(random.randrange(9**9))
    )
    packed, found = pack_codes(codes.to(torch.uint8), levels), word_layout(spec)
    words = to_words(packed, spec, found)
    assert torch.equal(stored_bytes(words, spec, found), packed)
    assert found.words <= found.stride < found.words + 8
    assert words.shape == (rows, found.planes * found.stride)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("cols", [4096, 4608, 8192, 11008])
def test_planes_take_little_more_than_the_stored_bytes(levels: int, cols: int) -> None:
    frames = (FrameSpec(FrameKind.IDENTITY, dim) for dim in (cols, 1))
    found = word_layout(LinearSpec(cols, 1, *frames, GridSpec("uniform", levels, "symmetric")))
    most = 1.12 if levels == 3 else 1.04  # of planes that begin at multiples of 16 bytes
    assert 2 * found.planes * found.stride <= most * bytes_per_row(cols, levels)


LINEARS = """
import torch
from framequant.codes.grid import GridSpec
from framequant.kernels import launches, triton_linear
from tests.kernels.test_cpu import make_layer
torch.manual_seed(0)
launches.panel_tile = lambda _: launches.PanelTile(32, 16, 32, 4)  # the interpreter is slow
launches.PACKED_PANEL_TILE = launches.PanelTile(16, 16, 128, 4)
launches.PANEL_BYTES = 16384  # several panels
half, short = torch.float16, torch.bfloat16
cases = (
    (8, (192, 70), (1.125, 1.0), 1, half),
    (8, (192, 70), (1.125, 1.0), 5, short),
    (8, (192, 36), (1.0, 1.0), 70, half),
    (5, (192, 70), (1.125, 1.0), 1, half),
    (5, (1001, 20), (1.0, 1.0), 2, half),
    (5, (192, 64), (1.0, 1.125), 17, half),
    (5, (192, 70), (1.125, 1.0), 70, half),
    (3, (192, 36), (1.125, 1.0), 1, half),
    (3, (192, 36), (1.0, 1.0), 70, half),
    (64, (192, 36), (1.0, 1.0), 3, half),
    (256, (192, 36), (1.0, 1.0), 70, half),
)
for levels, features, redundancy, tokens, dtype in cases:
    code = GridSpec("uniform", levels, "symmetric", per_tensor=tokens == 17)
    layer = make_layer(code, features, redundancy)
    x = torch.randn(tokens, features[0]).to(dtype)
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    mine, plan = layer(x), layer._prepared[2]
    assert isinstance(plan, triton_linear.TritonPlan) and list(triton_linear._verdicts.values())[-1]
    assert plan.layout.planes > 1
    error, allowed = (float((y.double() - exact).norm() / exact.norm()) for y in (mine, torchs))
    times = 4 if dtype == short else 2  # the interpreter cuts bfloat16 off, which doubles its error
    assert error <= times * allowed, (levels, features, tokens, error, allowed)
    torch.library.opcheck(
        torch.ops.framequant.product.default,
        (plan.words, torch.zeros(1, plan.layout.codes_per_word, plan.layout.length).half(),
         torch.zeros(1, plan.into.sizes[0]), plan.scales, None, plan.spec.coefficient_shape[0],
         plan.numbers(plan.words), plan.layout.factor),
        test_utils=("test_schema", "test_faketensor"),
    )
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.kernels import launches
from framequant.kernels.packed_triton import unit_codes
from framequant.kernels.panel_packed_triton import decode_packed_panel
from framequant.kernels.panel_triton import decode_panel
from framequant.kernels.product_triton import product
def made(kernel, types, constants, warps):
    constants |= {p.name: p.default for p in kernel.params if p.has_default}
    names = list(types)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name[-4:] in ("_ptr", "span")}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
for levels, bits in ((8, 3), (5, 7), (3, 8)):
    tile = launches.packed_tile(unit_codes(levels, bits), 1, True)
    types = dict.fromkeys("words_ptr z_ptr sum_ptr scale_ptr shift_ptr u_ptr".split(), "*fp32")
    types |= {"words_ptr": "*i16", "z_ptr": "*fp16", "scale_ptr": "*bf16", "shift_ptr": "*bf16"}
    types |= dict.fromkeys("rows words stride span tokens".split(), "i32") | {"factor": "fp32"}
    constants = {"PARTS": 64, "PADDED_PARTS": 64, "TRELLIS": False, "BITS": bits, "MULTIPLIER": 0, "ADDEND": 0,
                 "PATTERN": 0, "LEVELS": levels, "CENTRED": True, "ROW_SCALES": True, "PREFETCH": 0, "BR": tile.rows,
                 "BK": tile.step, "BN": tile.columns, "STAGES": tile.stages, "PDL": False}
    kernel = made(product, types, constants, tile.warps)
    loads = kernel.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield")[0]
    assert "ttg.async_copy_global_to_local" in loads and "tt.load" not in loads
    assert "ttg.local_store" not in kernel.asm["ttgir"]  # levels stay in the threads that made them
    assert kernel.metadata.shared <= 227 << 10
    types = {"words_ptr": "*i16", "scale_ptr": "*bf16", "top_ptr": "*fp32", "panel_ptr": "*fp16", "rows": "i32",
             "stride": "i32", "width": "i32"}
    if levels == 8:
        tile = launches.panel_tile(False)
        constants = {"TRELLIS": False, "BITS": bits, "MULTIPLIER": 0, "ADDEND": 0, "PATTERN": 0, "ROW_SCALES": True,
                     "BR": tile.step, "BK": tile.words, "STEPS": tile.rows // tile.step}
        made(decode_panel, types, constants, tile.warps)
    else:
        tile = launches.PACKED_PANEL_TILE
        constants = {"BITS": bits, "LEVELS": levels, "ROW_SCALES": True, "BR": tile.rows, "BK": tile.words}
        made(decode_packed_panel, types, constants, tile.warps)
"""


def test_linears_through_the_interpreter(tmp_path: Path) -> None:
    run(LINEARS, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, "-W", "error", TRITON_INTERPRET="0")
