"""Attention of one query: interpreted in a subprocess, compiled for a GPU, and its launches."""

from __future__ import annotations

from pathlib import Path

import pytest

from framequant.kernels import launches
from tests.kernels.test_prompts import run

pytest.importorskip("triton")

INTERPRETED = """
import torch
from framequant.kernels import launches
from framequant.kernels.one_query_ops import attention, reference
torch.manual_seed(0)
def angles(dim, dtype):
    half = torch.randn(1, 1, 1, dim // 2)
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)
for dtype, batch, heads, shared, dim, longest, length, turned in (
    (torch.float16, 1, 4, 4, 64, 16, 5, True),
    (torch.float16, 2, 4, 2, 32, 300, 299, True),
    (torch.float16, 1, 8, 2, 128, 700, 0, True),
    (torch.bfloat16, 1, 2, 1, 128, 700, 650, False),
    (torch.bfloat16, 2, 2, 2, 256, 600, 333, True),
):
    q = torch.randn(batch, 1, heads, dim).to(dtype).transpose(1, 2)
    rows = torch.randn(batch, 2, shared, 1, dim).to(dtype)  # of one product: sequences are further apart
    k, v = rows[:, 0], rows[:, 1]
    keys, values = (torch.zeros(batch, shared, longest, dim, dtype=dtype) for _ in range(2))
    keys[:, :, :length], values[:, :, :length] = (torch.randn(batch, shared, length, dim).to(dtype) for _ in range(2))
    exact, plain, mine = ([x.clone().to(t) for x in (keys, values)] for t in (torch.float64, dtype, dtype))
    place, scale = torch.tensor(length), 2 * dim**-0.5
    cos, sin = angles(dim, dtype) if turned else (None, None)
    expected = reference(q.double(), k.double(), v.double(), *exact, place, scale,
                         *((cos.double(), sin.double()) if turned else ()))
    torchs = reference(q, k, v, *plain, place, scale, cos, sin)
    found = attention(q, k, v, *mine, place, scale, cos, sin)
    def error(y):
        return float((y.double() - expected).norm() / expected.norm())
    room = 2.0 if dtype == torch.float16 else 4.0  # the interpreter cuts bfloat16 off, it does not round
    assert error(found) <= room * max(error(torchs), torch.finfo(dtype).eps / 8), (error(found), error(torchs))
    for tensor, other, start in zip(mine, plain, (keys, values)):
        torch.testing.assert_close(tensor, other, rtol=torch.finfo(dtype).eps * room, atol=torch.finfo(dtype).eps * 4)
        tensor[:, :, length] = 0
        assert torch.equal(tensor, start)  # nothing else is written
    full = torch.tensor(longest)
    attention(q, k, v, *mine, full, scale, cos, sin)
    assert torch.equal(mine[0], keys)  # no place is left
    torch.library.opcheck(torch.ops.framequant.one_query.default, (q, k, v, *mine, place, scale, cos, sin),
                          test_utils=("test_schema", "test_faketensor"))
"""

COMPILED = """
from framequant.kernels import launches
from framequant.kernels.one_query_triton import join, one_query
from tests.kernels.compiled import ptx
TYPES = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "keys_ptr", "values_ptr", "out_ptr"), "*fp16")
TYPES |= {"length_ptr": "*i64", "scale": "fp32"}
for shared, splits in ((1, 1), (4, 4)):
    text = ptx(one_query, TYPES, {"HEADS": 32, "SHARED": shared, "DIM": 128, "TILE": launches.query_tile(128),
                           "SPLITS": splits, "ROTATED": True, "PDL": True}, 8)
    before, after = text.split("griddepcontrol.wait")
    assert before.count("ld.global.v4") >= 16 and ".local" not in text  # the cache's first tile is on its way
    assert "st.global" not in before
assert "griddepcontrol.wait" in ptx(join, TYPES, {"SPLITS": 4, "PADDED": 4, "DIM": 128, "PDL": True}, 4)
"""


def test_attention_through_the_interpreter(tmp_path: Path) -> None:
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    run(COMPILED, tmp_path, TRITON_INTERPRET="0")


@pytest.mark.parametrize("programs", [1, 32, 40, 512])
@pytest.mark.parametrize("longest", [1, 256, 257, 4096, 131072])
def test_positions_are_shared_out(programs: int, longest: int) -> None:
    splits = launches.query_splits(programs, longest)
    assert 1 <= splits <= 264
    assert splits == 1 or (longest > launches.QUERY_POSITIONS and splits * programs <= 264)
