"""The linear on Triton, through its interpreter, in a process of its own: the switch is read when triton loads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import warnings
import torch
from framequant.kernels import lane_ops, triton_linear
from tests.kernels.test_cpu import CODES, errors, make_layer
torch.manual_seed(0)
def small_inputs(plan, words):
    shape = (plan.interleave(words), plan.count(words))
    if words.dtype == torch.int8:
        return torch.zeros(2, 4, *shape, dtype=torch.int8), torch.zeros(2, plan.into.sizes[0])
    return torch.zeros(2, *shape).half(), torch.zeros(2, plan.into.sizes[0])
for code, features, redundancy, tokens, dtype in (
    (CODES[0], (192, 70), (1.125, 1.0), 1, torch.bfloat16),
    (CODES[0], (192, 70), (1.0, 1.0), 2, torch.float16),
    (CODES[0], (192, 70), (1.0, 1.0), 3, torch.float16),
    (CODES[0], (192, 70), (1.0, 1.0), 17, torch.bfloat16),
    (CODES[5], (64, 48), (1.0, 1.0), 1, torch.float16),
    (CODES[5], (192, 48), (1.125, 1.0), 3, torch.float16),
):
    layer = make_layer(code, features, redundancy)
    layer.backend = "reference"
    x = torch.randn(tokens, features[0]).to(dtype)
    exact = layer(x.double())
    torchs = float((layer(x).double() - exact).norm() / exact.norm())
    layer.backend = "triton"
    mine = float((layer(x).double() - exact).norm() / exact.norm())
    plan = layer._prepared[2]
    assert isinstance(plan, triton_linear.TritonPlan), plan
    assert list(triton_linear._verdicts.values())[-1]
    assert mine <= 2 * torchs, (mine, torchs)
    if tokens == 2:
        assert torch.equal(layer(x.view(tokens, 1, -1))[:, 0], layer(x))
    words = plan.codes(tokens)
    torch.library.opcheck(
        torch.ops.framequant.product.default,
        (words, *small_inputs(plan, words), plan.scales, plan.shifts, plan.spec.coefficient_shape[0],
         plan.numbers(words), plan.layout.factor),
        test_utils=("test_schema", "test_faketensor"),
    )
layer = make_layer(CODES[0], (192, 70))
layer.backend = "triton"
triton_linear._verdicts.clear()
lane_ops.kernel = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = layer(torch.ones(1, 192).half()), layer(torch.ones(1, 192).half())
assert sum("plain torch is used" in str(w.message) for w in caught) == 1
layer.backend = "reference"
assert torch.allclose(layer(torch.ones(1, 192).half()), first, atol=1e-2) and torch.equal(first, second)
layer = make_layer(CODES[2])
layer.backend = "triton"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer(torch.ones(1, 100).half()), layer(torch.ones(1, 100).half())
assert sum("No Triton kernel covers" in str(w.message) for w in caught) == 1
print("all right")
"""


def test_linears_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("all right")
