"""The compiled CPU product against plain torch and float64, for every code, frame and dtype that it covers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from framequant import storage
from framequant.codes.grid import GridKind, GridSpec, ZeroPoint
from framequant.codes.packing import pack_codes
from framequant.codes.trellis import TrellisSpec, rate_pattern
from framequant.errors import FrameQuantError
from framequant.frames import FrameKind, FrameSpec, block_frame, choose_frame
from framequant.kernels import cpu
from framequant.layers import FrameLinear
from framequant.spec import LinearSpec

pytest.importorskip("numba")

CODES = [
    GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.SYMMETRIC),
    GridSpec(GridKind.MIN_MAX, 2, ZeroPoint.FLOAT),
    GridSpec(GridKind.MIN_MAX, 8, ZeroPoint.INTEGER),
    GridSpec(GridKind.UNIFORM, 16, ZeroPoint.FLOAT, per_tensor=True),
    GridSpec(GridKind.UNIFORM, 5, ZeroPoint.SYMMETRIC),
    TrellisSpec(12, (2,)),
    TrellisSpec(10, rate_pattern(1.125)),
    TrellisSpec(12, rate_pattern(2.25)),
    TrellisSpec(16, (4,)),
    TrellisSpec(12, (2,), row_factors=True),
    TrellisSpec(16, (4,), codebook="bytepair-1"),
    TrellisSpec(12, (4, 5), codebook="bytepair-1"),
]


def make_layer(
    code, features=(100, 36), redundancy=(1.125, 1.0), kind=None, bias=True, seed=0, codes=None, block=None
):
    """A layer with frames of ``seed`` and random codes, of ``codes`` if given; ``block``: of a local output frame."""
    generator = torch.Generator().manual_seed(seed if codes is None else codes)
    frames = [
        choose_frame(dim, r, seed + i) for i, (dim, r) in enumerate(zip(features, redundancy, strict=True))
    ]
    if kind is not None:
        frames = [FrameSpec(kind, dim) for dim in features]
    if block is not None:
        frames[1] = block_frame(features[1], block, seed + 1)
    spec = LinearSpec(*features, *frames, code)
    tensors = {}
    for name, (shape, dtype) in storage.layout(spec).items():
        if name == "scales":
            tensors[name] = (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)
        elif name == "zero_points":
            tensors[name] = (2 * torch.randn(shape, generator=generator)).to(dtype)
        elif name == "row_factors":
            tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(dtype)
        elif isinstance(code, GridSpec):
            codes = torch.randint(0, code.num_levels, spec.coefficient_shape, generator=generator)
            tensors[name] = pack_codes(codes.to(torch.uint8), code.num_levels)
        else:
            tensors[name] = torch.randint(0, 256, shape, generator=generator).to(dtype)
    return FrameLinear.from_tensors(
        spec, tensors, torch.randn(features[1], generator=generator) if bias else None
    )


DRAWS = 3


def errors(layer, x):
    """Relative errors of the kernel and of plain torch in the dtype of ``x``, against float64."""
    exact_layer = copy.deepcopy(layer)
    exact_layer.backend = layer.backend
    outputs = {}
    for backend, inputs in (("auto", x), ("reference", x), ("exact", x.double())):
        exact_layer.backend = "reference" if backend == "exact" else backend
        outputs[backend] = exact_layer(inputs).double()
    assert outputs["auto"].shape == outputs["exact"].shape
    size = outputs["exact"].norm()
    return tuple(float((outputs[name] - outputs["exact"]).norm() / size) for name in ("auto", "reference"))


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(code, tokens, dtype):
    layer = make_layer(code)
    assert layer._plan() is not None
    generator = torch.Generator().manual_seed(tokens)
    # several inputs: how far torch is off with one token is luck, and another's on another machine
    found = [errors(layer, torch.randn(tokens, 100, generator=generator).to(dtype)) for _ in range(DRAWS)]
    mine, torchs = torch.tensor(found).square().mean(0).sqrt().tolist()
    assert mine <= 2 * torchs


@pytest.mark.parametrize("tokens", [2, 37])
@pytest.mark.parametrize("features", [(192, 576), (33, 17), (22, 344), (2752, 16)], ids=str)
@pytest.mark.parametrize("code", [CODES[0], CODES[2], CODES[7]], ids=["2bit", "3bit", "trellis"])
def test_shapes_and_frames(features, code, tokens):
    for kind, redundancy in (
        (None, (1.125, 1.0)),
        (None, (1.0, 1.25)),
        (FrameKind.HADAMARD, None),
        (FrameKind.IDENTITY, None),
    ):
        layer = make_layer(code, features, redundancy or (1.0, 1.0), kind, bias=False)
        mine, torchs = errors(layer, torch.randn(tokens, features[0]).bfloat16())
        assert mine <= 2 * torchs


@pytest.mark.parametrize("tokens", [1, 8, 37])
@pytest.mark.parametrize("code", [CODES[0], CODES[2], CODES[7]], ids=["2bit", "3bit", "trellis"])
def test_output_frames_in_blocks(code, tokens):
    torch.manual_seed(tokens)
    for features, block in (((192, 576), 64), ((40, 160), 32), ((100, 56), 8)):
        layer = make_layer(code, features, block=block)
        assert layer._plan() is not None
        mine, torchs = errors(layer, torch.randn(tokens, features[0]).bfloat16())
        assert mine <= 2 * torchs
        frame_in = replace(block_frame(features[1], block), seed=5)  # no preset has it on this side
        other = make_layer(code, (features[1], features[1]), (1.0, 1.0), bias=False, block=block)
        other = FrameLinear.from_tensors(replace(other.spec, frame_in=frame_in), other.tensors)
        mine, torchs = errors(other, torch.randn(tokens, features[1]).bfloat16())
        assert other._plan() is not None
        assert mine <= 2 * torchs


def test_outliers_without_a_transform_do_not_drown_the_rest():
    layer = make_layer(CODES[0], kind=FrameKind.IDENTITY, bias=False)
    x = torch.randn(1, 100)
    x[0, 3] = 3000
    mine, torchs = errors(layer, x.bfloat16())
    assert mine <= 2 * torchs


def test_inputs_of_every_form():
    layer = make_layer(CODES[0])
    x = torch.randn(3, 100)
    expected = layer(x)
    assert torch.equal(layer(x.T.contiguous().T), expected)
    assert torch.equal(layer(torch.cat([x, x], 1)[:, :100]), expected)
    assert torch.equal(layer(x.view(3, 1, 100)), expected.view(3, 1, 36))
    assert torch.equal(torch.stack([layer(row) for row in x]), expected), (
        "tokens do not depend on their batch"
    )
    assert layer(torch.empty(0, 100)).shape == (0, 36)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with pytest.raises(FrameQuantError):
        layer(torch.randn(3, 99))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so_and_zero_gives_the_bias(tokens, dtype):
    layer = make_layer(CODES[5])
    x = torch.ones(tokens, 100, dtype=dtype)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    x[-1] = 0
    y = layer(x)
    assert not y[:2].isfinite().any()
    assert y[2:].isfinite().all()
    assert torch.equal(y[-1], layer.bias.to(dtype))


def test_many_tokens_do_not_depend_on_their_batch():
    layer, x = make_layer(CODES[7], (100, 70)), torch.randn(50, 100)
    layer.hold_decoded(True)
    together = layer(x)
    apart = torch.cat([layer(x[:17]), layer(x[17:])])
    assert torch.allclose(together, apart, atol=1e-5)  # the dense product sums in an order of its own
    strided = torch.cat([x, x], 1)[:, :100].view(2, 25, 100)
    assert torch.equal(layer(strided), together.view(2, 25, 70))


@pytest.mark.parametrize("tokens", [2, 70])
def test_threads_give_the_same_bits(monkeypatch, tokens):
    layer, x = make_layer(CODES[7], (100, 70)), torch.randn(tokens, 100)
    alone = layer(x)
    monkeypatch.setattr(cpu, "SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("tokens", [2, 20])
def test_gradients_reach_the_inputs(tokens):
    layer = make_layer(CODES[5], bias=False)
    x = torch.randn(tokens, 100, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(tokens, 100)
    assert torch.allclose(x.grad, expected, atol=1e-4)


def test_constants_follow_the_tensors():
    layer, x = make_layer(CODES[0]), torch.randn(1, 100)
    before = layer(x) - layer.bias
    layer.scales.mul_(2)
    assert torch.allclose(layer(x) - layer.bias, 2 * before, atol=1e-5)
    layer.load_state_dict(make_layer(CODES[0], seed=1).state_dict(), assign=True)
    assert torch.equal(layer(x), make_layer(CODES[0]).requires_grad_(False)(x)) is False
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_held_tiles_give_the_same_bits():
    layer, x = make_layer(CODES[7]), torch.randn(20, 100)
    before = layer(x)
    layer.hold_decoded(True)
    assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)


def test_parameters_that_learn_keep_their_gradients():
    layer = make_layer(CODES[0])
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 100)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((36,), 2.0))


def test_the_reference_can_be_forced(monkeypatch):
    layer, x = make_layer(CODES[0]), torch.randn(1, 100)
    monkeypatch.setattr(cpu, "linear", lambda *_: pytest.fail("the kernel ran"))
    layer.backend = "reference"
    layer(x)
    monkeypatch.setenv("FRAMEQUANT_BACKEND", "reference")
    make_layer(CODES[0])(x)


def test_layers_out_of_reach_take_the_reference():
    code = GridSpec(GridKind.LLOYD_MAX, 4, ZeroPoint.SYMMETRIC)
    layer = make_layer(code)
    assert layer._plan() is None
    assert layer(torch.randn(2, 100)).isfinite().all()
