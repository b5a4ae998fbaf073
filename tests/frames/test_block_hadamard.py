"""Hadamard transforms in blocks: local, orthogonal, in a random order that stays within chunks."""

import numpy as np
import pytest
import torch

from framequant.errors import FrameError
from framequant.frames import BlockHadamard, FrameKind, FrameSpec, block_frame
from framequant.frames.block_hadamard import LARGEST_CHUNK, chunk_size, random_order
from framequant.frames.hadamard import sylvester
from framequant.frames.signs import random_signs, splitmix64


@pytest.mark.parametrize(("dim", "block"), [(2, 2), (12, 4), (96, 32), (576, 64), (11008, 32), (4096, 128)])
def test_it_is_what_its_definition_says(dim: int, block: int) -> None:
    transform = BlockHadamard(dim, block, seed=9)
    x = torch.randn(3, dim, dtype=torch.float64)
    words = splitmix64(dim, 9) & np.uint64((1 << 63) - 1)
    size, places = chunk_size(dim, block), []
    for start in range(0, dim, size):
        for j in range(size // block):
            for i in range(block):
                part = range(start + i * size // block, start + (i + 1) * size // block)
                places.append(sorted(part, key=words.__getitem__)[j])
    ordered = (x * random_signs(dim, 9))[:, places]
    expected = ordered.view(3, -1, block) @ torch.from_numpy(sylvester(block))
    torch.testing.assert_close(transform.analysis(x), expected.flatten(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.synthesis(transform.analysis(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "block", "size"),
    [
        (4096, 32, 2048),
        (11008, 32, 1376),
        (576, 64, 576),
        (28672, 128, 2048),
        (64, 64, 64),
        (67 * 64, 64, 64),
    ],
)
def test_golden_chunks(dim: int, block: int, size: int) -> None:
    """Files depend on this rule."""
    assert chunk_size(dim, block) == size <= LARGEST_CHUNK


def test_golden_order() -> None:
    """Files depend on this order."""
    assert random_order(8, 2, seed=0).tolist() == [2, 4, 0, 6, 1, 7, 3, 5]


def test_outputs_of_a_chunk_come_from_its_own_rows() -> None:
    matrix = BlockHadamard(6144, 32, seed=1).as_matrix()
    for first in range(0, 6144, 2048):
        inside = matrix[first : first + 2048, first : first + 2048]
        assert inside.count_nonzero() == matrix[first : first + 2048].count_nonzero() == 2048 * 32


def test_the_order_evens_out_energies_of_neighbours() -> None:
    """As in attention: the outputs of one head are larger than those of another."""
    weight = torch.randn(1024, 64, dtype=torch.float64) * (1 + torch.arange(1024) // 128)[:, None]
    energies = BlockHadamard(1024, 32, seed=3).analysis(weight.T).T.square().sum(1)
    unordered = weight.square().sum(1)
    for rows, low, high in ((unordered, 0.75, 1.0), (energies, 0.0, 0.1)):
        assert low <= rows.view(-1, 32).mean(1).std() / rows.mean() <= high


def test_a_block_that_does_not_divide_leaves_one_transform() -> None:
    assert block_frame(100, 64, seed=3) == FrameSpec(FrameKind.HADAMARD, 100, seed=3)
    assert block_frame(192, 64, seed=3) == FrameSpec(FrameKind.BLOCK_HADAMARD, 192, 3, 64, seed=3)


@pytest.mark.parametrize("block", [0, 1, 3, 48, 2048, -2])
def test_refusals(block: int) -> None:
    with pytest.raises(FrameError, match="power of two"):
        block_frame(4096, block)
    with pytest.raises(FrameError, match="power of two"):
        BlockHadamard(4096, block)


@pytest.mark.parametrize(
    "change",
    [{"num_subspaces": 3}, {"subspace_dim": 24, "num_subspaces": 4}, {"subspace_dim": 0}, {"dual_order": 1}],
)
def test_bad_descriptions_are_refused(change: dict[str, int]) -> None:
    good = {"kind": "block_hadamard", "dim": 96, "num_subspaces": 6, "subspace_dim": 16, "seed": 1}
    assert FrameSpec.from_dict(good).num_coefficients == 96
    with pytest.raises(FrameError, match=r"blocks|dual_order"):
        FrameSpec.from_dict({**good, **change})
