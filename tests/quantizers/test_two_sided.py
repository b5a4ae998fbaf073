"""Feedback on both sides against its definition: what a tile is rounded to is the best answer to the tiles before."""

import pytest
import torch

from framequant.codes.trellis import TrellisSpec
from framequant.codes.trellis_storage import decode_rows
from framequant.errors import NumericalError
from framequant.quantizers.hessian import feedback_factor
from framequant.quantizers.rounding import round_ldlq
from framequant.quantizers.trellis_coder import TrellisCoder
from framequant.quantizers.two_sided import diagonal_blocks, feedback_loss, round_two_sided, unit_factor
from tests.quantizers.test_rounding import correlated, matrix

SPEC = TrellisSpec(8, (2,), 16, 16)


def upper_of(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A damped matrix and its factor."""
    raw = correlated(size, seed)
    factor = feedback_factor(raw, 0.01)
    damped = raw + 0.01 * raw.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    return damped, factor.upper


def loss(error: torch.Tensor, gram: torch.Tensor, hessian: torch.Tensor) -> float:
    return float((gram @ error @ hessian * error).sum())


class Recorder:
    """A coder that rounds to a coarse grid and keeps what it was asked to round."""

    def __init__(self, panel: int) -> None:
        self.panel, self.targets = panel, {}

    def open_blocks(self, heights):
        self.heights = heights

    def quantize_cells(self, waves, values):
        for wave, value in zip(waves, values, strict=True):
            for row, cell in zip(range(wave.first, wave.last + 1), value, strict=True):
                self.targets[wave.linear, row, wave.tick - row] = cell.clone()
        return [value.round() for value in values]


@pytest.mark.parametrize("height", [8, 16, 48])
def test_every_tile_is_the_exact_minimiser_given_the_tiles_above_and_left_of_it(height):
    """The loss, minimised freely over all tiles that are not rounded yet, is what a tile's target must attain."""
    rows, cols, panel = 40, 24, 8
    weights = matrix(rows, cols, 0)
    gram, row_upper = upper_of(rows, 1)
    hessian, upper = upper_of(cols, 2)
    coder = Recorder(panel)
    rounded = round_two_sided([weights], upper, [row_upper], coder, height)
    kronecker = torch.kron(gram, hessian)
    error = rounded - weights
    blocks = -(-rows // height)
    for row in range(blocks):
        for column in range(cols // panel):
            known = torch.zeros(rows, cols, dtype=torch.bool)
            known[: row * height] = True
            known[row * height : (row + 1) * height, : column * panel] = True
            known[: row * height, (column + 1) * panel :] = True
            free = ~known.flatten()
            # Rows above are wholly known here; their later panels cannot matter, which the algorithm relies on.
            best = torch.linalg.solve(
                kronecker[free][:, free], -kronecker[free][:, ~free] @ error.flatten()[~free]
            )
            full = torch.zeros(rows * cols, dtype=torch.float64)
            full[free] = best
            here = (
                slice(row * height, min((row + 1) * height, rows)),
                slice(column * panel, (column + 1) * panel),
            )
            target = coder.targets[0, row, column][: here[0].stop - here[0].start]
            torch.testing.assert_close(target, (weights + full.view(rows, cols))[here], rtol=1e-8, atol=1e-8)


def test_without_output_gradients_it_is_ldlq():
    matrices = [matrix(48, 40, 3), matrix(20, 40, 4)]
    upper = upper_of(40, 5)[1]
    plain = TrellisCoder(matrices, SPEC)
    expected = round_ldlq(torch.cat(matrices), upper, plain)
    for rows in ([None, None], [torch.eye(48, dtype=torch.float64), None]):
        coder = TrellisCoder(matrices, SPEC)
        found = round_two_sided(matrices, upper, rows, coder, 16)
        # Sums are taken in another order, so a tie may fall the other way.
        assert float((found - expected).abs().gt(1e-9).double().mean()) < 0.02
        hessian = torch.linalg.inv(upper.T @ upper)
        eye = torch.eye(68, dtype=torch.float64)
        before, after = (loss(one - torch.cat(matrices), eye, hessian) for one in (expected, found))
        assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("height", [16, 32])
def test_it_lowers_the_loss_and_stores_what_it_rounded(height):
    matrices = [matrix(80, 64, 6), matrix(48, 64, 7)]
    hessian, upper = upper_of(64, 8)
    grams, uppers = zip(*(upper_of(len(one), 9 + i) for i, one in enumerate(matrices)), strict=True)
    one_sided = round_ldlq(torch.cat(matrices), upper, TrellisCoder(matrices, SPEC)).split([80, 48])
    coder = TrellisCoder(matrices, SPEC)
    both = round_two_sided(matrices, upper, list(uppers), coder, height).split([80, 48])
    for target, before, after, gram, tensors in zip(
        matrices, one_sided, both, grams, coder.tensors(), strict=True
    ):
        assert loss(after - target, gram, hessian) < 0.85 * loss(before - target, gram, hessian)
        stored = decode_rows(SPEC, tensors, *target.shape, 0, len(target), torch.float64)
        torch.testing.assert_close(stored, after, rtol=0, atol=1e-12)


def test_unit_factors_are_unit_on_their_blocks_and_give_the_matrix_back():
    matrix_, upper = upper_of(20, 11)
    factor = unit_factor(upper, 8)
    blocks = diagonal_blocks(factor, 8)
    torch.testing.assert_close(
        blocks, torch.eye(8, dtype=torch.float64).expand_as(blocks), atol=1e-10, rtol=0
    )
    assert float(factor.tril(-8).abs().max()) < 1e-12
    inverse = torch.linalg.inv(diagonal_blocks(upper, 8))
    middle = torch.block_diag(*(inverse @ inverse.transpose(1, 2)))[:20, :20]
    torch.testing.assert_close(factor @ middle @ factor.T, matrix_, rtol=1e-9, atol=1e-12)


def test_the_feedback_loss_is_the_trace_without_feedback_and_less_with_it():
    matrix_, upper = upper_of(24, 12)
    assert feedback_loss(upper, 24) == pytest.approx(float(matrix_.trace()))
    assert feedback_loss(upper, 1) == pytest.approx(float((1 / upper.diagonal().square()).sum()))
    assert feedback_loss(upper, 1) < feedback_loss(upper, 7) < feedback_loss(upper, 24)


def test_infinite_weights_are_refused():
    weights = matrix(16, 16, 0)
    weights[3, 4] = torch.inf
    with pytest.raises(NumericalError, match="NaN or infinity"):
        round_two_sided([weights], torch.eye(16, dtype=torch.float64), [None], Recorder(16), 16)


def test_a_scalar_code_is_fed_from_row_to_row_too():
    from framequant.codes.grid import GridKind, GridSpec, ZeroPoint, encode
    from framequant.codes.packing import unpack_codes
    from framequant.config import FrameQuantConfig
    from framequant.quantizers.coders import ScalarCoder
    from framequant.quantizers.group_rounding import round_group

    matrices = [matrix(40, 32, 20), matrix(24, 32, 21)]
    hessian, _ = upper_of(32, 22)
    grams = [upper_of(len(one), 23 + i)[0] for i, one in enumerate(matrices)]
    config = FrameQuantConfig(output_block=8, output_damping=0.01)
    spec = GridSpec(GridKind.SIGMA_CLIP, 4, ZeroPoint.FLOAT)
    found = {}
    for name, known in (("plain", [None, None]), ("fed", grams)):
        coder = ScalarCoder(matrices, spec)
        rounded, _ = round_group(matrices, hessian, known, coder, config, "x")
        pairs = zip(rounded.split([40, 24]), matrices, grams, strict=True)
        found[name] = [loss(one - target, gram, hessian) for one, target, gram in pairs]
        stored = torch.cat([unpack_codes(t["packed_codes"], 4, 32) for t in coder.tensors()])
        assert torch.equal(stored, encode(rounded, coder._grid))
    assert all(fed < 0.8 * plain for fed, plain in zip(found["fed"], found["plain"], strict=True))
