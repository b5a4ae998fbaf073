"""Linears whose output frame is local to blocks of rows, on Triton, interpreted in a subprocess; their launches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from framequant.kernels import launches
from tests.kernels.test_prompts import run

pytest.importorskip("triton")

FEW = """
import torch
from framequant.kernels import triton_linear
from framequant.kernels.block_plan import BlockPlan
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
for code, features, redundancy, tokens, dtype, block, bias in (
    (CODES[0], (192, 96), (1.125, 1.0), 1, torch.bfloat16, 32, True),
    (CODES[0], (192, 192), (1.0, 1.0), 2, torch.float16, 64, True),
    (CODES[0], (192, 112), (1.0, 1.0), 4, torch.float16, 16, False),
    (CODES[0], (192, 128), (1.0, 1.0), 17, torch.bfloat16, 32, True),
    (CODES[5], (64, 160), (1.0, 1.0), 1, torch.float16, 32, True),
    (CODES[5], (192, 96), (1.125, 1.0), 3, torch.float16, 32, False),
    (CODES[5], (192, 128), (1.0, 1.0), 64, torch.float16, 128, True),
):
    layer = make_layer(code, features, redundancy, block=block, bias=bias)
    x = torch.randn(tokens, features[0]).to(dtype)
    layer.backend = "reference"
    exact = layer(x.double())
    torchs = float((layer(x).double() - exact).norm() / exact.norm())
    layer.backend = "triton"
    mine = float((layer(x).double() - exact).norm() / exact.norm())
    plan = layer._prepared[2]
    assert isinstance(plan, triton_linear.TritonPlan) and isinstance(plan.out, BlockPlan)
    assert list(triton_linear._verdicts.values())[-1]
    assert mine <= 2 * torchs, (code, features, tokens, block, mine, torchs)
    if tokens == 2:
        assert torch.equal(layer(x.view(tokens, 1, -1))[:, 0], layer(x))
    words, out = plan.codes(tokens), plan.out
    shape = (plan.interleave(words), plan.count(words))
    z = torch.zeros(2, 4, *shape, dtype=torch.int8) if words.dtype == torch.int8 else torch.zeros(2, *shape).half()
    torch.library.opcheck(
        torch.ops.framequant.block_product.default,
        (words, z, torch.zeros(2, plan.into.sizes[0]), torch.ones(2), plan.scales, plan.shifts, plan.top, out.places,
         out.signs, out.matrix, plan.bias, plan.numbers(words), plan.layout.factor, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )
layer = make_layer(CODES[0], (64, 96), block=32, bias=False)
layer.backend = "triton"
x = torch.randn(2, 64).bfloat16()
expected = layer(x).float()
layer.scales.mul_(2.0**-60)  # far below what halves hold
assert torch.equal(layer(x).float() * 2.0**60, expected)
layer.scales.zero_()
assert not layer(x).any()
triton_linear._verdicts.clear()
layer = make_layer(CODES[0], (64, 96), block=32, bias=False)
layer.backend = "triton"
layer.scales.mul_(2.0**-20)  # outputs would be subnormal halves, of any kernel
layer(x.half())
assert list(triton_linear._verdicts.values()) == [True]
"""

PROMPTS = """
import os
import torch
from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.frames import block_hadamard
from framequant.kernels import launches, triton_linear
from framequant.kernels.block_plan import BlockPlan
from tests.kernels.test_cpu import make_layer
torch.manual_seed(0)
block_hadamard.LARGEST_CHUNK = 64  # several chunks, and panels of them
launches.PANEL_BYTES = 2 * 64 * 224
launches.FEW_TOKENS = 4
cases = (
    (GridSpec("sigma_clip", 4, "symmetric"), (192, 192), (1.125, 1.0), torch.bfloat16, 32),
    (GridSpec("sigma_clip", 4, "symmetric"), (256, 128), (1.125, 1.0), torch.float16, 32),  # the frame in the panels
    (GridSpec("sigma_clip", 4, "symmetric", per_tensor=True), (640, 96), (1.125, 1.0), torch.bfloat16, 32),
    (GridSpec("uniform", 16, "symmetric", per_tensor=True), (100, 64), (1.0, 1.0), torch.float16, 16),
    (GridSpec("sigma_clip", 4, "symmetric"), (1001, 64), (1.0, 1.0), torch.float16, 32),  # three factors
    (TrellisSpec(12, (2,)), (192, 96), (1.125, 1.0), torch.float16, 32),
    (TrellisSpec(16, (2,)), (64, 128), (1.0, 1.0), torch.bfloat16, 64),
    (TrellisSpec(16, (4,), codebook="bytepair-1"), (64, 64), (1.0, 1.0), torch.float16, 32),
)
tile = launches.FOLD_TILE._replace(warps=4)  # the interpreter takes as long for a program of one
assert {type(case[0]).__name__ for case in cases} == {"GridSpec", "TrellisSpec"}
for code, features, redundancy, dtype, block in cases:
    if type(code).__name__ != os.environ["KIND"]:  # the others have a process of their own
        continue
    launches.FOLD_TILE = tile._replace(units=1) if features[0] == 640 else tile  # two programs a row, and one
    layer = make_layer(code, features, redundancy, block=block, bias=features[1] != 96)
    x = torch.randn(6, features[0]).to(dtype)
    x[1] *= 1e-3
    x[2, 5] = 1e4 * x[2].abs().max()  # an outlier
    x[3] = 0
    x[4] *= 1e-5 if dtype == torch.bfloat16 else 1e4
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    mine = layer(x)
    plan = layer._prepared[2]
    assert mine.dtype == dtype and mine.isfinite().all()
    assert isinstance(plan.out, BlockPlan) and list(triton_linear._verdicts.values())[-1]
    for rows in (slice(1, 2), slice(2, 3), slice(3, None)):
        size = exact[rows].norm()
        error, allowed = ((y[rows].double() - exact[rows]).norm() / size for y in (mine, torchs))
        times = 4 if dtype == torch.bfloat16 else 2  # the interpreter cuts bfloat16 off, which doubles its error
        assert error <= times * allowed, (code, features, rows, float(error), float(allowed))
    fold = plan.fold
    assert (fold is not None) == (features[0] % 128 == 0 and redundancy[0] > 1 and isinstance(code, GridSpec)), features
    assert torch.equal(layer(x.view(2, -1, features[0])), mine.view(2, -1, features[1]))
    assert torch.equal(layer(torch.stack([x, x], 1)[:, 1]), mine)  # rows apart
    ops, into, out = torch.ops.framequant, fold.into if fold else plan.into, plan.out
    columns = features[0] if fold else plan.spec.coefficient_shape[1]
    arguments = (x[:2], into.flips, into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                 columns, plan.words, plan.scales, plan.top, out.places, out.signs, out.matrix, plan.bias,
                 fold and fold.lanes, list(out.ends), plan.code, plan.layout.factor)
    torch.library.opcheck(ops.block_prompt.default, arguments, test_utils=("test_schema", "test_faketensor"))
    if layer.bias is None:  # weights that halves do not hold
        x, scales = x[:1].half(), layer.scales.clone()
        before = layer(x.expand(6, -1)).float()
        for by, times in ((2.0**-20, 2.0**10), (2.0**11, 2.0**-10)):
            layer.scales.copy_(scales * by)
            after = layer((x * times).expand(6, -1)).float() / (by * times)
            assert (after - before).norm() <= 2e-3 * before.norm(), by
"""

PANELS = """
import torch
from framequant.codes.trellis import TrellisSpec
from framequant.kernels import block_prompt_ops, launches, prompt_ops, triton_linear
from tests.kernels.test_cpu import make_layer
for code, columns, dtype, units, by in (
    (TrellisSpec(12, (2,)), 144, torch.float16, 1, 2.0**-20),  # of 128 columns and 16
    (TrellisSpec(12, (2, 2, 2, 3)), 32, torch.bfloat16, 1, 2.0**11),  # rows that are no whole words
    (TrellisSpec(12, (4,)), 32, torch.float16, 1, 1.0),  # rows of two words
    (TrellisSpec(12, (1,)), 32, torch.float16, 1, 2.0**11),
    (TrellisSpec(16, (4,), codebook="bytepair-1"), 272, torch.float16, 2, 1.0),
    (TrellisSpec(12, (3, 2, 5, 1), codebook="bytepair-1"), 32, torch.float16, 1, 1.0),
):
    layer = make_layer(code, (columns, 32), (1.0, 1.0), block=32)
    layer.scales.mul_(by)
    launches.TURN_TILE = launches.TURN_TILE._replace(units=units)
    tensors = {name: getattr(layer, name) for name in ("packed_codes", "scales")}
    plan = triton_linear.triton_plan(layer.spec, tensors, tuple(layer.frames), None)
    out, panels = plan.out, [torch.full((32, columns), float("nan"), dtype=dtype) for _ in range(2)]
    gain = prompt_ops.gain(True, plan.layout.factor) * 32**-0.5
    common = plan.words, plan.scales, plan.top
    block_prompt_ops._turn(*common, panels[0], out.places, out.signs, gain, 0, plan.code, False)
    prompt_ops.decode(
        plan.words, 0, plan.scales, plan.top, panels[1], plan.code, launches.block_panel_tile(32),
        places_ptr=out.places, signs_ptr=out.signs, matrix_ptr=out.matrix, gain=gain, BLOCK=32)
    mine, other = (panel.double() for panel in panels)
    assert other.std() > 1e-4 and mine.isfinite().all()
    assert (mine - other).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-3) * other.norm(), code
"""

TRACED = """
import torch
from framequant.kernels import launches
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
launches.FEW_TOKENS = 4
graphs = []
def traced(graph, examples):
    graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
    return torch._dynamo.lookup_backend("aot_eager")(graph, examples)
for code, tokens in ((CODES[0], 1), (CODES[5], 6)):
    layer, x = make_layer(code, (192, 64), block=32), torch.randn(tokens, 192).half()
    layer.backend = "triton"
    first = torch.compile(layer, fullgraph=True, backend=traced)(x)  # not run before
    assert torch.equal(first, layer(x))
    found = [name for name in graphs.pop() if "block" in name or "lane" in name]
    assert not graphs and len(found) == 1, found
    torch._dynamo.reset()
"""

COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from framequant.codes.trellis_codebook import codebook
from framequant.kernels import (
    block_triton, launches, panel_fold_triton, panel_triton, panel_turn_triton, product_bytes_triton, product_triton)
POINTERS = {"unit_ptr": "*fp32", "top_ptr": "*fp32", "places_ptr": "*i32", "signs_ptr": "*i8", "matrix_ptr": "*fp16",
            "bias_ptr": "*bf16", "shift_ptr": "*i32",
            "sum_ptr": "*fp32", "z_ptr": "*i8", "u_ptr": "*bf16", "panel_ptr": "*bf16", "y_ptr": "*fp16"}
def ptx(kernel, words, scales, constants, warps):
    types = POINTERS | {"words_ptr": words, "bytes_ptr": words, "scale_ptr": scales}
    types |= dict.fromkeys(("shrink", "norm", "factor", "zero", "gain", "fraction", "power"), "fp32")
    if words != "*i8":
        types["z_ptr"] = "*fp16"
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] in "*i" and i != 9}
    source = ASTSource(kernel, types, {n: constants[n] for n, t in types.items() if t == "constexpr"}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
book = codebook(12)
shared = {"PARTS": 64, "PADDED_PARTS": 64, "MULTIPLIER": book.multiplier, "ADDEND": book.addend, "BLOCK": 32,
          "PDL": True, "BIAS": True, "PREFETCH": 0, "PATTERN": 0x3222, "LEVELS": 0}
tile = launches.block_byte_tile(4096, 1, 32)
how = launches.block_launch(tile, 1152)
sizes = {"BR": tile.rows, "BK": tile.step, "BN": tile.columns, "STAGES": tile.stages, "GROUPS": tile.groups}
text = ptx(product_bytes_triton.byte_product, "*i8", "*bf16", shared | sizes | {
    "BITS": 2, "ROW_SCALES": True, "HELD": how.held, "LOOP": how.loop}, tile.warps)
assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in text and "griddepcontrol.wait" in text
tile = launches.block_half_tile(True, 28672, 1, 32, True)
sizes = {"BR": tile.rows, "BK": tile.step, "BN": tile.columns, "STAGES": tile.stages, "GROUPS": tile.groups}
text = ptx(product_triton.product, "*i32", "*fp32", shared | sizes | {
    "TRELLIS": True, "BITS": 12, "CENTRED": False, "ROW_SCALES": False}, tile.warps)
assert "mma.sync.aligned.m16n8k16" in text and "griddepcontrol.wait" in text
tile = launches.block_panel_tile(32)
text = ptx(panel_triton.decode_panel, "*i32", "*fp32", shared | {
    "TRELLIS": True, "BITS": 12, "ROW_SCALES": False, "BR": tile.step, "BK": tile.words,
    "STEPS": tile.rows // tile.step}, tile.warps)
assert "st.global.v4.b32" in text and "mma" in text
tile = launches.FOLD_TILE
for panel, behind in (("*fp16", False), ("*bf16", True)):
    POINTERS |= {"panel_ptr": panel, "lanes_ptr": "*i32"}
    text = ptx(panel_fold_triton.fold_panel, "*i16", "*fp16", {
        "memory_ptr": None, "ROW_SCALES": True, "UNITS": tile.units, "WARPS": tile.warps, "PDL": True,
        "BEHIND": behind}, tile.warps)
    for part in ("stmatrix", "mma.sync.aligned.m16n8k8", "mma.sync.aligned.m16n8k16", "st.global.v4.b32"):
        assert part in text, part
    assert text.count("griddepcontrol.wait") == 1
    assert (text.rindex("st.global.v4.b32") < text.index("griddepcontrol.wait")) == behind
tile = launches.TURN_TILE
for panel, pattern, behind in (("*fp16", 2, True), ("*bf16", 0x3222, False)):
    POINTERS["panel_ptr"] = panel
    text = ptx(panel_turn_triton.turn_panel, "*i32", "*fp32", shared | {
        "memory_ptr": None, "BITS": 12, "PATTERN": pattern, "ROW_SCALES": True, "UNITS": tile.units,
        "WARPS": tile.warps, "BEHIND": behind}, tile.warps)
    counts = {part: text.count(part) for part in ("dp4a.u32.u32", "shf.r.wrap", "mma.sync.aligned.m16n8k16")}
    assert counts == {"dp4a.u32.u32": 64, "shf.r.wrap": 64, "mma.sync.aligned.m16n8k16": 40}, counts  # of 64 weights
    assert text.count("griddepcontrol.wait") == 1 and "stmatrix" in text
    assert (text.rindex("st.global.v4.b32") < text.index("griddepcontrol.wait")) == behind
text = ptx(block_triton.finish_tokens, "*i16", "*fp16", {
    "HALF": True, "BIAS": False, "TOKENS": 16, "STEP": 1024, "PDL": True}, 4)
assert text.index("griddepcontrol.wait") < text.index("ld.global")
"""


def test_few_tokens_through_the_interpreter(tmp_path: Path) -> None:
    run(FEW, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("kind", ["GridSpec", "TrellisSpec"])
def test_prompts_through_the_interpreter(kind: str, tmp_path: Path) -> None:
    run(PROMPTS, tmp_path, TRITON_INTERPRET="1", KIND=kind)


def test_panels_of_trellises_are_those_that_plain_triton_makes(tmp_path: Path) -> None:
    run(PANELS, tmp_path, TRITON_INTERPRET="1")


def test_compiled_layers_take_the_operators(tmp_path: Path) -> None:
    run(TRACED, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, "-W", "error", TRITON_INTERPRET="0")


@pytest.mark.parametrize("chunks", [[2048] * 14, [1376] * 8, [2048, 2048, 1024, 1024], [576, 192, 192], [64]])
@pytest.mark.parametrize("width", [16, 4608, 32768])
@pytest.mark.parametrize("tokens", [65, 2048])
def test_panels_hold_whole_chunks(chunks: list[int], width: int, tokens: int) -> None:
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    found = launches.panel_ends(ends, width, tokens)
    assert found == sorted(set(found) & set(ends))
    assert found[-1] == ends[-1]
    most = launches.panel_rows(ends[-1], width, tokens)
    assert all(end - start <= max(most, max(chunks)) for start, end in pairwise([0, *found]))


@pytest.mark.parametrize("rows", [64, 4096, 11008, 28672])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_programs_have_whole_blocks_and_all_columns(rows: int, tokens: int, block: int) -> None:
    tiles = [launches.block_half_tile(trellis, rows, tokens, block, True) for trellis in (False, True)]
    tiles += [launches.block_byte_tile(rows, tokens, block)] if tokens <= launches.BYTE_TOKENS else []
    for tile in tiles:
        assert tile.rows % block == 0
        assert tile.groups in (1, tile.warps)  # each warp has columns of its own, or none has
        for count in (1, 256, 1152, 2304):
            how = launches.block_launch(tile, count)
            assert how.splits == 1
            assert how.span == -(-count // (tile.step * tile.groups)) * tile.step * tile.groups
            assert how.held * tile.step * tile.groups <= how.span
            assert how.loop or how.held * tile.step * tile.groups == how.span
