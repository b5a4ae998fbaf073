"""Prompts and ``torch.compile`` on Triton: interpreted in a subprocess, and compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from framequant.kernels import launches

pytest.importorskip("triton")

PROMPTS = """
import torch
from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.kernels import launches, triton_linear
from tests.kernels.test_cpu import make_layer
torch.manual_seed(0)
launches.PANEL_BYTES = 4096  # several panels, the last of them smaller
launches.FEW_TOKENS = 4
launches.panel_tile = lambda _: launches.PanelTile(32, 16, 32, 4)  # the interpreter is slow
cases = (
    (GridSpec("sigma_clip", 4, "symmetric"), (192, 70), (1.125, 1.0), torch.bfloat16),
    (GridSpec("uniform", 16, "symmetric", per_tensor=True), (100, 64), (1.0, 1.125), torch.float16),
    (GridSpec("sigma_clip", 2, "symmetric"), (192, 36), (1.125, 1.0), torch.float16),
    (GridSpec("sigma_clip", 4, "symmetric"), (1001, 20), (1.0, 1.0), torch.float16),  # three factors
    (GridSpec("sigma_clip", 4, "symmetric"), (20, 1001), (1.0, 1.0), torch.float16),
    (TrellisSpec(12, (2,)), (192, 48), (1.125, 1.0), torch.float16),
    (TrellisSpec(16, (2,)), (64, 40), (1.0, 1.0), torch.bfloat16),
    (TrellisSpec(16, (4,), codebook="bytepair-1"), (96, 40), (1.0, 1.0), torch.float16),
)
for code, features, redundancy, dtype in cases:
    layer = make_layer(code, features, redundancy)
    x = torch.randn(6, features[0]).to(dtype)
    x[1] *= 1e-3
    x[2, 5] = 1e4 * x[2].abs().max()  # an outlier
    x[3] = 0
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    mine = layer(x)
    plan = layer._prepared[2]
    assert mine.dtype == dtype and mine.isfinite().all()
    assert isinstance(plan, triton_linear.TritonPlan) and list(triton_linear._verdicts.values())[-1]
    for rows in (slice(1, 2), slice(2, 3), slice(3, None)):
        size = exact[rows].norm()
        error, allowed = ((y[rows].double() - exact[rows]).norm() / size for y in (mine, torchs))
        times = 4 if dtype == torch.bfloat16 else 2  # the interpreter cuts bfloat16 off, which doubles its error
        assert error <= times * allowed, (code, features, rows, float(error), float(allowed))
    assert torch.equal(layer(x.view(2, -1, features[0])), mine.view(2, -1, features[1]))
    assert torch.equal(layer(torch.stack([x, x], 1)[:, 1]), mine)  # rows apart
    ops, into, out = torch.ops.framequant, plan.into, plan.out
    z, unit = torch.zeros(2, -(-plan.spec.coefficient_shape[1] // 16) * 16).half(), torch.ones(2)
    u = torch.zeros(2, plan.spec.coefficient_shape[0]).half()
    for op, arguments in (
        (ops.prompt_analysis, (x[:2], into.signs, list(into.matrices), [*into.sizes, *into.padded], into.norm,
                               plan.spec.coefficient_shape[1])),
        (ops.prompt_product, (plan.words, z, plan.scales, plan.top, u.shape[1], plan.code)),
        (ops.prompt_synthesis, (u, unit, plan.top, out.signs, list(out.matrices), [*out.sizes, *out.padded],
                                out.norm, features[1], plan.bias, dtype)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
"""

LOOPED = """
import torch
from framequant.kernels import launches
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
launches.FEW_TOKENS, launches.LOOPED = 8, {False: (0,), True: (0,)}
for code in (CODES[0], CODES[5]):
    layer = make_layer(code, (192, 48))
    x = torch.randn(15, 192).half()
    layer.backend = "reference"
    expected = layer(x.double())
    layer.backend = "triton"
    y = layer(x)
    assert torch.equal(y, torch.cat([layer(x[:8]), layer(x[8:])]))
    assert (y - expected).norm() < 2e-3 * expected.norm()
    assert layer(x[None]).shape == (1, 15, 48)
"""

TRACED = """
import warnings
import torch
from framequant.codes.grid import GridSpec
from framequant.kernels import lane_ops, launches, prompt_ops, triton_linear
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
launches.FEW_TOKENS, launches.panel_tile = 4, lambda _: launches.PanelTile(32, 16, 32, 4)
inputs = [torch.randn(tokens, 192).half() for tokens in (1, 6)]
graphs = []
def traced(graph, examples):
    graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
    return torch._dynamo.lookup_backend("aot_eager")(graph, examples)
for code, x in ((CODES[0], inputs[0]), (CODES[0], inputs[1]), (CODES[5], inputs[1])):
    layer = make_layer(code, (192, 48))
    layer.backend = "triton"
    compiled = torch.compile(layer, fullgraph=True, backend=traced)
    first = compiled(x)  # not run before
    assert torch.equal(first, layer(x))
    assert len(graphs) == 1 and any("product" in name or "lane" in name for name in graphs.pop()), graphs
    layer.load_state_dict({name: t * 2 if name == "scales" else t for name, t in layer.state_dict().items()})
    torch.testing.assert_close(compiled(x) - layer.bias, 2 * (first - layer.bias), rtol=0.02, atol=0.02)
    graphs.clear()
    torch._dynamo.reset()
triton_linear._verdicts.clear()
layer = make_layer(CODES[0], (192, 48))
layer.backend, prompt_ops.decode_panel, lane_ops.kernel = "triton", None, None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [torch.compile(layer, backend="aot_eager")(x) for x in inputs]  # decoding in torch breaks the graph
assert sum("plain torch is used" in str(w.message) for w in caught) == 2, [str(w.message) for w in caught]
layer.backend = "reference"
assert all(torch.equal(y, layer(x)) for x, y in zip(inputs, found))
"""

WALSH = """
import torch
from framequant.frames import FrameKind, FrameSpec, build_frame
from framequant.kernels import block_prompt_ops, launches
from framequant.kernels.transform_plan import transform_plan
launches.WALSH_WARPS = 8  # the interpreter is as fast with many threads; the last program has five tokens
frame = build_frame(FrameSpec(FrameKind.HADAMARD, 4096))
plan = transform_plan(frame, True, "cpu")
arguments = plan.signs, list(plan.matrices), [*plan.sizes, *plan.padded], plan.norm, 4096
calls, kernel = [], block_prompt_ops.walsh_tokens
class Counted:
    def __getitem__(self, grid):
        calls.append(grid)
        return kernel[grid]
block_prompt_ops.walsh_tokens = Counted()
torch.manual_seed(0)
for dtype, tiny, large in ((torch.float16, 1e-7, 6e4), (torch.bfloat16, 1e-30, 1e36)):
    x = torch.randn(13, 4096)
    x[1] *= tiny * 10  # halves have two digits of these, exactly
    x[2, 5] = large  # an outlier
    x[3] = 0
    x[4] = large
    x[5] = 0
    x[5, 4095] = tiny
    x[6] *= 200 * large / 6e4
    x[7], x[8] = large * torch.randn(4096).sign(), torch.where(torch.rand(4096) < 0.01, 1.0, 0.0)
    x[9, 5], x[10, 100], x[11, 7], x[11, 8] = (float(name) for name in ("nan", "inf", "inf", "-inf"))
    apart = torch.zeros(13, 4096 + 24, dtype=dtype)[:, 8 : 8 + 4096]
    apart.copy_(x)
    exact = frame.analysis(apart.double())
    results = []
    for flips in (plan.flips, None):  # without them the kernel of all transforms
        z, unit = block_prompt_ops.analysis(apart, flips, *arguments)
        assert z.dtype == dtype and z.shape == (13, 4096) and unit.shape == (13,)
        results.append((z.double() * unit[:, None].double() - exact, z, unit))
    (mine, z, unit), (usual, _, usual_unit) = results
    assert calls == [(2,)] and unit.isfinite().all()
    calls.clear()
    some = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 12])
    size = exact[some].norm(dim=1).clamp(min=1e-300)
    errors, allowed = (error[some].norm(dim=1) / size for error in (mine, usual))
    assert (errors <= 1.05 * allowed + 1e-6).all(), (dtype, errors, allowed)
    assert errors.max() < (4e-4 if dtype == torch.float16 else 5e-3)
    assert not z[9:12].isfinite().any()
    norms = exact[some].norm(dim=1)
    if dtype == torch.float16:
        assert ((unit[some] == 1) == ((norms >= 0.25) & (norms <= 32768))).all()
        assert not (z.norm(dim=1)[some] > 32768).any()
    else:
        assert (unit == 1).all()
    # another alignment takes the other kernel
    moved = torch.zeros(13 * 4096 + 1, dtype=dtype)[1:].view(13, 4096).copy_(apart)
    assert torch.equal(block_prompt_ops.analysis(moved, plan.flips, *arguments)[0][some], results[1][1][some])
    assert not calls
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from framequant.codes.trellis_codebook import codebook
from framequant.kernels import launches, panel_triton, prompt_transform_triton, prompt_walsh_triton
def ptx(kernel, types, constants, **options):
    constants = constants | {p.name: p.default for p in kernel.params if p.has_default}
    names = list(types)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t != "fp32" and n != "rows"}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
for trellis in (False, True):
    tile, book = launches.panel_tile(trellis), codebook(12)
    types = {"words_ptr": "*i32" if trellis else "*i16", "scale_ptr": "*bf16", "top_ptr": "*fp32",
             "panel_ptr": "*fp16", "rows": "i32", "stride": "i32", "width": "i32"}
    constants = {"TRELLIS": trellis, "BITS": 12 if trellis else 2, "MULTIPLIER": book.multiplier,
                 "ADDEND": book.addend, "PATTERN": 0x3222 if trellis else 0, "ROW_SCALES": True,
                 "BR": tile.step, "BK": tile.words, "STEPS": tile.rows // tile.step}
    text = ptx(panel_triton.decode_panel, types, constants, num_warps=tile.warps)
    assert "st.global.v4.b32" in text and "st.global.b16" not in text
types = dict.fromkeys("x_ptr signs_ptr m0_ptr m1_ptr m2_ptr bias_ptr top_ptr out_ptr unit_ptr".split(), "*fp16")
types |= {"signs_ptr": "*i8", "top_ptr": "*fp32", "unit_ptr": "*fp32", "x_stride": "i32", "out_stride": "i32",
          "norm": "fp32"}
for sizes in ([64, 1, 64, 72, 64, 1, 64, 128], [43, 16, 16, 16, 64, 16, 16, 16]):
    constants = dict(zip("F0 F1 F2_IN F2_OUT P0 P1 P2_IN P2_OUT".split(), sizes))
    for analysis in (True, False):
        constants |= {"ANALYSIS": analysis, "BIAS": not analysis, "PLAIN": False}
        text = ptx(prompt_transform_triton.prompt_transform, types, constants,
                   num_warps=launches.prompt_warps(sizes), maxnreg=launches.prompt_registers(sizes))
        assert "st.global.v4.b32" in text or "st.global.v2.b32" in text
for dtype in ("*fp16", "*bf16"):
    types = {"x_ptr": dtype, "words_ptr": "*i32", "out_ptr": dtype, "unit_ptr": "*fp32", "tokens": "i32",
             "x_stride": "i32", "norm": "fp32"}
    text = ptx(prompt_walsh_triton.walsh_tokens, types, {"WARPS": launches.WALSH_WARPS, "PDL": True},
               num_warps=launches.WALSH_WARPS)
    assert text.count("mma.sync.aligned.m16n8k16") == 64 and "shared" not in text.replace("shared_", "")
    assert text.count("ld.global.L1::no_allocate.v4.b32") == text.count("st.global.v4.b32") == 16
    assert "griddepcontrol.wait" in text and "griddepcontrol.launch_dependents" in text
"""


def run(code: str, tmp_path: Path, *options: str, **environment: str) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    if environment.get("TRITON_INTERPRET") == "1":
        code = f"import tests.kernels.interpreter\n{code}"
    done = subprocess.run([sys.executable, *options, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_prompts_through_the_interpreter(tmp_path: Path) -> None:
    run(PROMPTS, tmp_path, TRITON_INTERPRET="1")


def test_one_warp_transforms_a_token_of_4096(tmp_path: Path) -> None:
    run(WALSH, tmp_path, TRITON_INTERPRET="1")


def test_more_tokens_than_a_launch_takes_are_several_of_one_kind(tmp_path: Path) -> None:
    run(LOOPED, tmp_path, TRITON_INTERPRET="1")


def test_compiled_layers_take_the_operators(tmp_path: Path) -> None:
    run(TRACED, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, "-W", "error", TRITON_INTERPRET="0")


@pytest.mark.parametrize("rows", [1, 300, 4096, 11008, 28672, 152064])
@pytest.mark.parametrize("width", [16, 4608, 9216, 32768])
@pytest.mark.parametrize("tokens", [65, 512, 2048, 8192])
def test_panels_are_bounded_and_start_at_tiles(rows: int, width: int, tokens: int) -> None:
    found = launches.panel_rows(rows, width, tokens)
    assert 1 <= found <= rows
    assert 2 * found * width <= launches.PANEL_BYTES
    assert found == rows or found % 256 == 0


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_a_number_of_tokens_is_checked_as_its_kind(loops) -> None:
    kinds = [launches.tokens_to_check(tokens, loops) for tokens in range(1, 300)]
    assert kinds == [launches.tokens_to_check(kind, loops) for kind in kinds]
    assert len(set(kinds)) == 7


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_launches_of_many_tokens_are_even(loops) -> None:
    for tokens in range(1, 300):
        few = launches.loop_tokens(tokens, loops)
        assert bool(few) == (launches.FEW_TOKENS < tokens <= loops * launches.FEW_TOKENS)
        if few:
            sizes = [min(few, tokens - start) for start in range(0, tokens, few)]
            kinds = {launches.tokens_to_check(size, loops) for size in sizes}
            assert kinds == {launches.tokens_to_check(tokens, loops)}


@pytest.mark.parametrize(("trellis", "sizes"), [(False, (1, 3, 4)), (True, (1, 1, 2))])
def test_larger_matrices_take_more_launches(trellis, sizes) -> None:
    for (rows, columns), most in zip(((4096, 4608), (11008, 4608), (28672, 9216)), sizes, strict=True):
        assert launches.most_loops(trellis, rows * columns) == most
