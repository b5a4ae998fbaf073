"""Descriptions of tensors say what torch would do, and read no more than they name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framequant.streaming import pieces
from framequant.streaming.pieces import PiecesError


def stored_pair(draw, held, shape):
    tensor = torch.arange(len(held) * 1000, len(held) * 1000 + torch.Size(shape).numel()).reshape(shape)
    key = f"tensor.{len(held)}"
    held[key] = tensor
    return pieces.stored(key, shape), tensor


def step(draw, held, piece, tensor):
    """One more operation on a description, and the same on the tensor."""
    axis = draw(st.integers(0, tensor.ndim - 1))
    kinds = ["stack", "cat", "transpose", "narrow"] + (["select"] if tensor.ndim > 1 else [])
    kind = draw(st.sampled_from(kinds))
    if kind in ("stack", "cat"):
        shape = list(tensor.shape)
        if kind == "cat":
            shape[axis] = draw(st.integers(1, 3))
        other, more = stored_pair(draw, held, shape)
        pair = ([piece, other], [tensor, more]) if draw(st.booleans()) else ([other, piece], [more, tensor])
        return getattr(pieces, kind)(pair[0], axis), getattr(torch, kind)(pair[1], dim=axis)
    if kind == "transpose":
        other = draw(st.integers(0, tensor.ndim - 1))
        return pieces.transpose(piece, axis, other), tensor.transpose(axis, other)
    start = draw(st.integers(0, tensor.shape[axis] - 1))
    if kind == "select":
        return pieces.select(piece, axis, start), tensor.select(axis, start)
    stop = draw(st.integers(start + 1, tensor.shape[axis]))
    return pieces.narrow(piece, axis, start, stop), tensor.narrow(axis, start, stop - start)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_sequence_of_operations_is_torchs(data):
    held: dict[str, torch.Tensor] = {}
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    piece, tensor = stored_pair(data.draw, held, shape)
    for _ in range(data.draw(st.integers(0, 6))):
        piece, tensor = step(data.draw, held, piece, tensor)
    assert piece.shape == tuple(tensor.shape)
    found = pieces.read(piece, lambda part: held[part.key][part.index])
    assert torch.equal(found, tensor)
    assert found.is_contiguous()


def test_one_expert_of_a_stack_is_all_that_is_read():
    whole = pieces.transpose(pieces.stored("experts.down_proj", (8, 5, 3)), 1, 2)
    one = pieces.select(whole, 0, 6)
    assert one.shape == (3, 5)
    (part,) = pieces.leaves(one)
    assert part.index == (6, slice(0, 5), slice(0, 3))
    assert not part.is_whole
    gate = pieces.stack([pieces.stored(f"experts.{e}.w1", (5, 3)) for e in range(8)])
    up = pieces.stack([pieces.stored(f"experts.{e}.w3", (5, 3)) for e in range(8)])
    one = pieces.select(pieces.cat([gate, up], 1), 0, 6)
    assert list(pieces.keys(one)) == ["experts.6.w1", "experts.6.w3"]
    assert all(part.is_whole for part in pieces.leaves(one))
    lower = pieces.narrow(one, 0, 5, 10)
    assert list(pieces.keys(lower)) == ["experts.6.w3"]


def test_what_does_not_fit_is_named():
    with pytest.raises(PiecesError, match=r"b is \(2, 4\), and a is \(2, 3\)"):
        pieces.stack([pieces.stored("a", (2, 3)), pieces.stored("b", (2, 4))])
    with pytest.raises(PiecesError, match="no tensors"):
        pieces.cat([])
