"""Linears of one token through registers alone: interpreted in a subprocess, compiled for a GPU, and their launches."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from framequant.kernels import launches
from tests.kernels.test_prompts import run

pytest.importorskip("triton")
lane_analysis = importlib.import_module("framequant.kernels.lane_analysis_triton")

ONE_TOKEN = """
import torch
from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.kernels import lane_ops, launches, triton_linear
from framequant.kernels.transform_plan import in_one
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
asked = []
linear = torch.ops.framequant.lane_linear
uniform = [GridSpec("uniform", levels, "symmetric") for levels in (2, 16)]
for code, features, r, dtype, block, bias, analysed in (
    (CODES[0], (4096, 96), 1.125, torch.float16, 32, True, "in one"),
    (CODES[0], (4096, 48), 1.25, torch.bfloat16, None, True, "in one"),
    (TrellisSpec(12, (2,)), (4096, 64), 1.0, torch.float16, 16, False, "in one"),
    (TrellisSpec(16, (2,)), (8192, 40), 1.125, torch.bfloat16, None, False, "in one"),
    (TrellisSpec(16, (4,), codebook="bytepair-1"), (4096, 64), 1.0, torch.float16, 32, True, "in one"),
    (TrellisSpec(16, (4,), codebook="bytepair-1"), (192, 40), 1.125, torch.bfloat16, None, False, "elsewhere"),
    (CODES[0], (5888, 32), 1.125, torch.float16, 32, False, "by rows"),
    (TrellisSpec(12, (2,)), (5120, 32), 1.0, torch.bfloat16, 32, True, "by rows"),
    (uniform[0], (512, 32), 1.0, torch.float16, 32, False, "by rows"),
    (uniform[1], (576, 100), 1.125, torch.float16, None, True, "elsewhere"),
    (TrellisSpec(12, (2,)), (192, 64), 1.125, torch.float16, 32, True, "elsewhere"),
):
    # every program analyses the token for itself, and the interpreter is slow
    lane_ops.multiprocessors = lambda _: 2 if features[0] < 4096 or features[1] == 96 else 1
    layer = make_layer(code, features, (r, 1.0), block=block, bias=bias)
    x = torch.randn(1, features[0]).to(dtype)
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    y = layer(x)
    plan = layer._prepared[2]
    assert plan.takes_lanes(1) and not plan.takes_lanes(2) and list(triton_linear._verdicts.values())[-1]
    into = plan.into
    one = in_one([*into.sizes, *into.padded], list(into.block), 32 * launches.LANE_WARPS)
    assert analysed == ("in one" if one else "by rows" if into.columns else "elsewhere"), (features, analysed)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= 2 * float((torchs - exact).norm() / exact.norm()), (code, features, error)
    if features[0] >= 4096 and features[1] not in (96, 48):  # the rest is the same for all codes
        continue
    if analysed == "in one" and block == 32:  # brought in pieces of 16 bytes, wherever it begins
        torch.testing.assert_close(layer(torch.cat((x[:, :1], x), 1)[:, 1:]), y)
    nothing = layer(torch.zeros_like(x)).float()
    expected = torch.zeros_like(nothing) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(nothing, expected, rtol=0.02, atol=0)
    assert layer(torch.full_like(x, float("nan"))).isnan().all(), (code, features, analysed)
    if analysed == "in one":
        assert layer(torch.where(torch.arange(features[0]) == 77, float("inf"), x)).isnan().all(), (code, features)
    if layer.bias is None:
        small = layer(x * 2.0**-6).double() * 64
        assert float((small - exact).norm() / exact.norm()) < 0.01
    ends = (plan.out.places, plan.out.signs, plan.bias, plan.rows, block) if block else (None, None, None, plan.rows, 0)
    torch.library.opcheck(
        linear.default,
        (plan.words, x, into.lane_signs, list(into.matrices), list(into.columns), [*into.sizes, *into.padded],
         list(into.block), into.norm, plan.scales, *ends, plan.lane_code,
         plan.layout.factor, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )
"""

TOGETHER = """
import torch
from torch.nn import functional
from framequant.codes.trellis import TrellisSpec
from framequant.kernels import lane_ops, triton_linear
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
lane_ops.multiprocessors, triton_linear.is_right = (lambda _: 1), (lambda *_: True)  # the interpreter is slow
for code, features, block, bias, dtype, normed, gated in (
    (CODES[0], 4096, 32, True, torch.float16, True, False),
    (TrellisSpec(12, (2,)), 4096, None, False, torch.bfloat16, True, False),
    (CODES[0], 192, 32, False, torch.float16, True, False),
    (CODES[0], 512, 32, False, torch.float16, False, True),
    (TrellisSpec(12, (2,)), 192, 32, True, torch.bfloat16, False, True),
    (CODES[0], 4096, 32, False, torch.float16, False, True),
):
    layer = make_layer(code, (features, 64), (1.125, 1.0), block=block, bias=bias)
    x, gate = (8 * torch.randn(1, features).to(dtype) for _ in range(2))
    weight = (torch.randn(features) / 16).to(dtype) if normed else None
    added = torch.randn(1, 64).to(dtype) if block else None
    def token(to):
        y = functional.silu(gate.to(to)) * x.to(to) if gated else x.to(to)
        return functional.rms_norm(y, (features,), weight.to(to), 1.5) if normed else y
    layer.backend = "reference"
    exact, torchs = layer(token(torch.float64)), layer(token(dtype))
    if block:
        exact, torchs = exact + added, torchs + added
    layer.backend = "triton"
    layer(x)
    plan = layer._prepared[2]
    into = plan.into
    ends = (plan.out.places, plan.out.signs, plan.bias, plan.rows, block) if block else (None, None, None, plan.rows, 0)
    y, unit = torch.ops.framequant.lane_linear(
        plan.words, x, into.lane_signs, list(into.matrices), list(into.columns), [*into.sizes, *into.padded],
        list(into.block), into.norm, plan.scales, *ends, plan.lane_code, plan.layout.factor,
        dtype, weight, 1.5, gate if gated else None, added)
    if not block:
        y = triton_linear._synthesise(plan, plan, y, unit, dtype)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= 2 * float((torchs.double() - exact).norm() / exact.norm()), (code, features, normed, gated, error)
"""

SEVERAL = """
import torch
from framequant.codes.grid import GridSpec
from framequant.kernels import lane_ops, launches, triton_linear
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
launches.lane_tokens_pay = lambda *_: True  # of small matrices, and without blocks, too
asked, token_launch = [], launches.token_launch
launches.token_launch = lambda *arguments: asked.append(token_launch(*arguments)) or asked[-1]
for code, features, r, tokens, dtype, block, bias in (
    (CODES[0], (512, 96), 1.125, 16, torch.float16, 32, True),
    (CODES[0], (640, 80), 1.0, 7, torch.bfloat16, None, True),
    (GridSpec("uniform", 16, "symmetric"), (128, 96), 1.125, 9, torch.float16, 16, False),
    (GridSpec("uniform", 2, "symmetric"), (1024, 64), 1.0, 8, torch.float16, 32, False),
    (CODES[0], (512, 600), 1.0, 16, torch.float16, None, False),  # several turns
):
    layer = make_layer(code, features, (r, 1.0), block=block, bias=bias)
    x = torch.randn(tokens, features[0]).to(dtype)
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    y = layer(x)
    plan = layer._prepared[2]
    assert plan.takes_lane_tokens(tokens) and not plan.takes_lane_tokens(launches.BYTE_TOKENS)
    assert plan.takes_lane_tokens(16) == (plan.layout.bits > 1)  # sixteen of one bit do not fit into shared memory
    assert not plan.takes_lane_tokens(launches.MOST_LANE_TOKENS + 1) and list(triton_linear._verdicts.values())[-1]
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= 2 * float((torchs - exact).norm() / exact.norm()), (code, features, error)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    if tokens == 7:
        torch.testing.assert_close(compiled(x), y)
    x[1] = float("nan")
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()  # tokens keep to themselves
triton_linear.is_right = lambda *_: True  # asked above; the interpreter is slow
for processors, left, code, features, r, tokens, dtype, block, bias in (  # three warps share rows, and spare ones
    (7, 2, CODES[0], (1024, 1184), 1.125, 16, torch.float16, 32, True),
    (3, 1, CODES[0], (640, 500), 1.0, 7, torch.bfloat16, None, True),
    (4, 0, GridSpec("uniform", 16, "symmetric"), (256, 576), 1.125, 9, torch.float16, 16, False),
    (4, 0, CODES[0], (512, 1000), 1.0, 16, torch.float16, None, False),  # two share, one turn
):
    lane_ops.multiprocessors = lambda _: processors
    layer = make_layer(code, features, (r, 1.0), block=block, bias=bias)
    x = torch.randn(tokens, features[0]).to(dtype)
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    asked.clear()
    y = layer(x)
    assert asked[-1] == launches.TokenLaunch(2 if features[1] == 1000 else 3, True, left)
    error = float((y.double() - exact).norm() / exact.norm())
    assert error <= 2 * float((torchs - exact).norm() / exact.norm()), (code, features, error)
    plan = layer._prepared[2]
    words, z, unit, sums, _ = triton_linear._few_coefficients(plan, x)
    ends = (plan.out.places, plan.out.signs, plan.bias, plan.rows, block) if block else (None, None, None, plan.rows, 0)
    arguments = (words, z, sums, unit, plan.scales, *ends, plan.layout.bits, dtype)
    some, others = (torch.ops.framequant.lane_tokens(*arguments) for _ in range(2))
    assert torch.equal(some, others) and not sums[tokens:].any()  # counters are as they were
    if block:
        assert torch.equal(some, y)
z = torch.zeros(9, 8, 64).half()
sums, unit = torch.zeros(9, 3), torch.ones(9)
words = torch.zeros(40, 64, dtype=torch.int16)
places, signs = torch.arange(40, dtype=torch.int32), torch.ones(40, dtype=torch.int8)
for ends, block in (((None, None, None), 0), ((places, signs, None), 32)):
    torch.library.opcheck(
        torch.ops.framequant.lane_tokens.default,
        (words, z, sums, unit, torch.ones(40, 1), *ends, 40, block, 2, torch.float16),
        test_utils=("test_schema", "test_faketensor"))
"""

TOKENS = """
import torch
from framequant.codes.grid import GridSpec
from framequant.kernels import lane_ops, launches, triton_linear, triton_ops
from framequant.kernels.transform_triton import first_factor
from tests.kernels.test_cpu import CODES, make_layer
torch.manual_seed(0)
launches.lane_tokens_pay, lane_ops.multiprocessors = (lambda *_: True), (lambda _: 1)
triton_linear.is_right = lambda *_: True  # the interpreter is slow
kernel = torch.ops.framequant.lane_token_analysis
def plain(z, bits):  # rows one by one, and not over powers of two
    tokens, rows, words = z.shape
    runs = 10 // bits // 2 * 2
    factor = first_factor(bits) * 2.0 ** -(torch.arange(rows) % runs * bits)
    z = z.double().view(tokens, rows // 2, words // 2, 2, 2).transpose(2, 3)
    return z.reshape(tokens, rows, words) / factor[:, None]
def relative(x, exact):
    return (x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp(min=1e-30)
for code, features, r, dtype, padding, whole in (
    (CODES[0], 4096, 1.125, torch.float16, 8, True),
    (CODES[0], 4096, 1.0, torch.bfloat16, 3, True),
    (GridSpec("uniform", 16, "symmetric"), 4096, 1.25, torch.bfloat16, 0, False),
    (CODES[0], 8192, 1.125, torch.float16, 0, False),
    (CODES[0], 4096, 1.125, torch.float32, 0, False),
):
    layer = make_layer(code, (features, 32), (r, 1.0), block=32, bias=False)
    x = torch.randn(6, features + padding).to(dtype)[:, :features]  # rows apart, not always by whole pieces
    x[2] *= 1e-3
    x[3] = 0
    x[4, 5] = 100 * x[4].abs().max()  # an outlier
    plan = triton_linear.triton_plan(layer.spec, layer.tensors, layer.frames, layer.bias)
    into, words, bits = plan.into, plan.codes(6), plan.layout.bits
    assert plan.takes_lane_tokens(6)
    sizes, rows, count = [*into.sizes, *into.padded], plan.interleave(words), plan.count(words)
    arguments = into.lane_signs, sizes, list(into.block), into.norm, rows
    z, unit, sums = lane_ops.token_coefficients(into, x, rows, count, bits)
    z = plain(z, bits)
    coefficients = torch.zeros(6, rows * count, dtype=torch.float64)
    exact = layer.frames[0].analysis(x.double())
    coefficients[:, : exact.shape[1]] = exact
    coefficients = coefficients.view(6, count, rows).mT
    assert (relative(z * unit.double()[:, None, None], coefficients) < 2.0**-11).all()
    assert ((z.sum((1, 2)) - sums[:6, 0]).abs() <= 1e-6 * z.flatten(1).norm(dim=1)).all()
    assert sums.shape == (6 + launches.MOST_SPARE, 1) and not sums[6:].any()
    old, units, totals = triton_ops.analysis(
        x, into.signs, list(into.matrices), sizes, into.norm, rows, count, False, bits)
    assert (relative(plain(old, bits) * units.double()[:, None, None], coefficients) < 2.0**-10).all()
    if padding == 8:
        wide = torch.zeros(6, rows, 2 * count, dtype=z.dtype)  # more words than meet coefficients
        wide[..., :count] = z
        more = kernel(x, *arguments, 2 * count)
        assert torch.equal(plain(more[0], bits), wide) and torch.equal(more[2], sums)
        torch.library.opcheck(
            kernel.default, (x, *arguments, count), test_utils=("test_schema", "test_faketensor"))
    bad = x.clone()
    bad[1, 77], bad[5, 7] = float("nan"), float("inf")
    other, units, _ = kernel(bad, *arguments, count)
    assert torch.equal(plain(other, bits)[[0, 2, 3, 4]], z[[0, 2, 3, 4]]) and units[[1, 5]].isnan().all()
    assert torch.equal(units[[0, 2, 3, 4]], unit[[0, 2, 3, 4]])
    if not whole:
        continue
    layer.backend = "reference"
    exact, torchs = layer(x.double()), layer(x).double()
    layer.backend = "triton"
    y = layer(bad)
    assert y[[1, 5]].isnan().all() and not y[3].any()
    for row in (0, 2, 4):
        error, allowed = ((some[row] - exact[row]).norm() for some in (y.double(), torchs))
        assert error <= 2 * allowed, (features, r, row, error, allowed)
"""

COMPILED = """
from framequant.codes.trellis_codebook import codebook
from framequant.kernels import launches
from framequant.kernels.column_triton import column_analysis
from framequant.kernels.lane_product_triton import lane_product
from framequant.kernels.lane_token_analysis_triton import token_analysis
from framequant.kernels.lane_tokens_triton import lane_tokens
from tests.kernels.compiled import ptx
TYPES = {"codes_ptr": "*u8", "z_ptr": "*i8", "signs_ptr": "*i8", "x_signs_ptr": "*i32", "places_ptr": "*i32",
         "x_ptr": "*fp16", "y_ptr": "*fp16", "bias_ptr": "*fp16", "weight_ptr": "*fp16", "added_ptr": "*fp16",
         "gate_ptr": "*fp16", "scale_ptr": "*bf16"}
TYPES |= dict.fromkeys(("factor", "zero", "norm", "x_norm", "epsilon"), "fp32")
for trellis in (0, 1, 2):
    book = codebook(16, "bytepair-1") if trellis == 2 else codebook(12)
    how = launches.lane_launch(22016, 1152, 132)
    constants = {"ANALYSED": 4096, "OUTPUTS": 1 if trellis else 18, "WIDTH": 1 if trellis else 16,
                 "NORMED": not trellis, "ADDED": not trellis,
                 "COUNT": 4160 if trellis else 1168, "PARTS": 1, "BITS": (2, 12, 16)[trellis],
                 "MULTIPLIER": book.multiplier, "ADDEND": book.addend, "TRELLIS": trellis, "ROW_SCALES": True,
                 "BLOCK": 32, "BIAS": False, "CHUNKS": how.chunks, "ROUNDS": how.rounds, "WARPS": how.warps,
                 "WARPS_K": how.warps_k, "AHEAD": 0 if trellis == 1 else how.ahead, "PDL": True}
    text = ptx(lane_product, TYPES, constants, how.warps)
    order = ["ld.global.L1::no_allocate", "griddepcontrol.wait", "mma.sync.aligned.m16n8k32"]
    if trellis:  # the other one has a norm
        order[2:2] = ["ldmatrix.sync.aligned.m8n8.x4.trans", "mma.sync.aligned.m16n8k16"]
    if trellis != 1:
        order.insert(1, "prefetch.global.L2")
    places = [text.index(what) for what in order]
    assert places == sorted(places) and ".local" not in text
    before, after = text.split("griddepcontrol.wait")  # the token is loaded after it
    assert "ld.global.v4.b32" not in before
    assert after.index("ld.global.v4.b32") < after.index("st.shared.v4.b32") < after.index("mma.sync")
for share, once in ((2, False), (2, True), (3, True)):
    text = ptx(lane_tokens, TYPES | {"z_ptr": "*fp16"}, {
        "TILES": 2, "BITS": 2, "PARTS": 4, "ROW_SCALES": True, "BLOCK": 32, "BIAS": False, "SLICES": 18 // share,
        "SHARE": share, "ONCE": once, "WARPS": 16, "PDL": True}, 16)
    before, after = text.split("griddepcontrol.wait")
    assert before.count("ld.global.L1::no_allocate") == 8 and "cp.async.cg" not in before and ".local" not in text
    assert after.count("mma.sync.aligned.m16n8k16") in ((128, 192) if once else (64,))  # two steps, and one after them
    assert after.count("atom.acq_rel.gpu.global.inc") == (share == 3)
for size, outputs, dtype in ((4096, 18, "*fp16"), (4096, 20, "*bf16"), (8192, 18, "*fp32")):
    text = ptx(token_analysis, TYPES | {"x_ptr": dtype, "z_ptr": "*fp16"}, {
        "SIZE": size, "OUTPUTS": outputs, "WIDTH": 16, "COUNT": size * outputs // 128, "BITS": 2, "WARPS": 8,
        "PLACES": launches.TOKEN_PLACES, "PDL": True}, 8)
    early, without, after = text.split("griddepcontrol.wait")  # programs without a token have a wait of their own
    assert "griddepcontrol.launch_dependents" in early and "ld.global" not in early
    assert "ld.global.b32" in without and "ld.global.v4.b32" not in without and ".local" not in text
    assert after.index("ld.global.v4.b32") < after.index("st.shared.v4.b32") < after.index("st.global.v2")
text = ptx(column_analysis, TYPES, {"F0": 43, "GATED": True, "EACH": 18, "COUNT": 3112, "CODES": 4, "PDL": True}, 8)
assert ".local" not in text
"""


PLACES = """
import torch
import triton
import triton.language as tl
from framequant.kernels.lane_analysis_triton import cube_place, matrix_place, second_place, sixteen_of, sum_place
@triton.jit
def kernel(out_ptr, numbers_ptr, SPREAD: tl.constexpr):
    thread = tl.arange(0, 256)
    tl.store(out_ptr + thread, matrix_place(thread))
    tl.store(out_ptr + 256 + thread, sum_place(thread))
    for i in tl.static_range(4):
        tl.store(out_ptr + (2 + i) * 256 + thread, second_place(thread, SPREAD) ^ cube_place(i * 128))
        tl.store(out_ptr + (6 + i) * 256 + thread, cube_place(sixteen_of(thread, SPREAD) * 16) ^ (i * 16))
    for i in tl.static_range(16):
        tl.store(numbers_ptr + i * 256 + thread, cube_place(thread + i * 256))
for spread in (1, 2, 4, 8):
    out, numbers = torch.zeros(10, 256, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)
    kernel[(1,)](out, numbers, spread)
    assert torch.equal(numbers.sort().values, torch.arange(4096, dtype=torch.int32) * 4)
    def to_different_banks(places, together, size):  # threads that are served together
        groups = places.view(-1, together) // size % (128 // size)
        assert all(len(set(group.tolist())) == together for group in groups), (spread, together, size)
    to_different_banks(out[0], 8, 16)
    to_different_banks(out[1], 16, 8)
    for i in range(8):
        to_different_banks(out[2 + i], 8, 16)
    second, third = (places.view(4, 8, 32).transpose(0, 1).reshape(8, 128) for places in (out[2:6], out[6:]))
    for warp in range(8):  # keeps to itself
        assert set(second[warp].tolist()) == set(third[warp].tolist()) and len(set(second[warp].tolist())) == 128
    to_different_banks(numbers[:256], 32, 4)  # float32: the first pass, and for each number of a column the second
    columns = torch.arange(256) // 16 * 256 + torch.arange(256) % 16
    for i in range(16):
        to_different_banks(numbers[columns + 16 * i], 32, 4)
"""

MATRICES = """
import torch
import triton
import triton.language as tl
from framequant.kernels.lanes_triton import first_mma_halves, load_shared_transposed
@triton.jit
def kernel(x_ptr, rows_ptr, out_ptr, sum_ptr):
    lane = tl.arange(0, 32)
    at = x_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + tl.load(rows_ptr + lane)
    words = load_shared_transposed(at, 16)
    for i in tl.static_range(4):
        tl.store(out_ptr + lane * 4 + i, words[i])
    found = first_mma_halves(words[0], words[1], words[2], words[3], words[0], words[2], x_ptr.dtype.element_ty)
    for i in tl.static_range(4):
        tl.store(sum_ptr + lane * 4 + i, found[i])
for dtype in (torch.float16, torch.bfloat16):
    x = torch.randn(41, 8).to(dtype)  # the first row is what OFFSET leaves out
    rows = torch.randperm(40)[:32]
    out, sums = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 4)
    kernel[(1,)](x, (rows * 16).int(), out, sums)
    matrices = x[1:][rows].view(4, 8, 8)
    words = out.view(dtype).view(32, 4, 2)
    for lane in range(32):  # of the transposed matrices the row lane // 4, and two neighbours of it
        row, quarter = lane // 4, lane % 4
        assert torch.equal(words[lane], matrices[:, 2 * quarter : 2 * quarter + 2, row])
    t = matrices.mT.double()
    a = torch.cat((torch.cat((t[0], t[2]), 1), torch.cat((t[1], t[3]), 1)), 0)
    product = a @ torch.cat((t[0], t[2]), 1).mT
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        expected = [product[row + 8 * i, column + j] for i in range(2) for j in range(2)]
        torch.testing.assert_close(sums[lane].double(), torch.stack(expected), rtol=0, atol=1e-4)
"""

NINTHS = """
import torch
import triton
import triton.language as tl
from framequant.frames.fusion_frame import shared_block
from framequant.kernels.lane_analysis_triton import ninths
@triton.jit
def kernel(x_ptr, y_ptr):
    lane, x = tl.arange(0, 32), ()
    for i in tl.static_range(16):
        x += (tl.load(x_ptr + lane * 16 + i),)
    y = ninths(x)
    for i in tl.static_range(18):
        tl.store(y_ptr + lane * 18 + i, y[i])
x, y = torch.randn(32, 16), torch.zeros(32, 18)
kernel[(1,)](x, y)
torch.testing.assert_close(y.double() / 3, x.double() @ shared_block(9, 8).T, rtol=0, atol=2e-6)
"""


def test_places_in_shared_memory(tmp_path: Path) -> None:
    run(PLACES, tmp_path, TRITON_INTERPRET="1")


def test_matrices_of_halves_are_read_transposed_and_multiplied(tmp_path: Path) -> None:
    run(MATRICES, tmp_path, TRITON_INTERPRET="1")


def test_a_block_of_nine_is_a_fourier_transform(tmp_path: Path) -> None:
    run(NINTHS, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize(("each", "codes"), [(16, 4), (18, 4), (20, 4), (24, 4), (18, 2), (20, 2)])
def test_lanes_write_coefficients_to_different_banks(each: int, codes: int) -> None:
    apart = lane_analysis.spread(each, codes)
    for first in range(each):  # a byte for each coefficient, those of one code of a byte side by side
        numbers = [lane * apart * each + first for lane in range(32)]
        assert len({number % codes for number in numbers}) == 1
        assert len({number // codes // 4 % 32 for number in numbers}) == 32


def test_one_token_through_the_interpreter(tmp_path: Path) -> None:
    run(ONE_TOKEN, tmp_path, TRITON_INTERPRET="1")


def test_what_stands_around_a_linear_through_the_interpreter(tmp_path: Path) -> None:
    run(TOGETHER, tmp_path, TRITON_INTERPRET="1")


def test_several_tokens_through_the_interpreter(tmp_path: Path) -> None:
    run(SEVERAL, tmp_path, TRITON_INTERPRET="1")


def test_coefficients_of_several_tokens_through_the_interpreter(tmp_path: Path) -> None:
    run(TOKENS, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, TRITON_INTERPRET="0")


@pytest.mark.parametrize("rows", [16, 576, 4096, 11008, 28672])
@pytest.mark.parametrize("row_bytes", [32, 160, 1152, 2304, 3104, 8064])
@pytest.mark.parametrize("processors", [1, 78, 132])
def test_programs_have_all_rows_and_bytes(rows: int, row_bytes: int, processors: int) -> None:
    how = launches.lane_launch(rows, row_bytes, processors)
    assert how.warps_k * how.chunks * how.rounds * launches.LANE_CHUNK >= row_bytes
    assert how.warps_k * how.chunks * (how.rounds - 1) * launches.LANE_CHUNK < row_bytes
    groups = how.warps // how.warps_k
    assert 1 <= how.programs <= processors
    assert how.programs == processors or how.programs * groups * launches.LANE_ROWS >= rows
    assert (how.programs - 1) * groups * launches.LANE_ROWS < rows


@pytest.mark.parametrize(
    ("rows", "columns", "processors", "expected"),
    [
        (22016, 4608, 132, (3, True, 28)),
        (28672, 9216, 132, (2, True, 0)),
        (16896, 4608, 132, (3, True, 0)),
        (22528, 4608, 132, (3, True, 44)),
        (22560, 4608, 132, (2, True, 0)),
        (57344, 9216, 132, (2, False, 0)),
    ],
)
def test_three_warps_share_rows_where_one_turn_has_all(
    rows: int, columns: int, processors: int, expected: tuple[int, bool, int]
) -> None:
    assert launches.token_launch(rows, columns // 4, processors) == expected
    assert launches.token_launch(rows, columns // 4, processors, 0).share == 2
