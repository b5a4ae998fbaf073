"""The Sigma-Delta code: its alphabet, levels, layout, settings that do not exist."""

import pytest
import torch

from framequant.codes.packing import pack_codes
from framequant.codes.sigma_delta import (
    Dual,
    SigmaDeltaSpec,
    Step,
    Vectors,
    check_levels,
    code_values,
    decode_bias,
    decode_rows,
    layout,
    parse_dual,
    parse_step,
)
from framequant.errors import ConfigError


def test_the_alphabet_is_midrise() -> None:
    assert code_values(torch.arange(2), 2, torch.float64).tolist() == [-0.5, 0.5]
    assert code_values(torch.arange(6), 6, torch.float64).tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]


@pytest.mark.parametrize("levels", [2, 6, 22, 100, 256])
@pytest.mark.parametrize("vectors", list(Vectors))
def test_what_is_laid_out_is_what_is_decoded(levels: int, vectors: Vectors) -> None:
    spec = SigmaDeltaSpec(levels, 1, vectors, bias_size=9)
    generator = torch.Generator().manual_seed(levels)
    codes = torch.randint(levels, (5, 13), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = levels - 1, levels - 1
    bias = torch.randint(levels, (1, 9), generator=generator, dtype=torch.uint8)
    shapes = layout(spec, 5, 13)
    scales = torch.rand(shapes["scales"][0], generator=generator).to(torch.bfloat16)
    tensors = {
        "packed_codes": pack_codes(codes, levels),
        "scales": scales,
        "packed_bias": pack_codes(bias, levels),
        "bias_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
    }
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == shapes
    expected = (codes.double() - (levels - 1) / 2) * scales.double()
    assert torch.equal(decode_rows(spec, tensors, 13, 0, 5, torch.float64), expected)
    assert torch.equal(decode_rows(spec, tensors, 13, 2, 4, torch.float64), expected[2:4])
    assert torch.equal(decode_bias(spec, tensors, torch.float64), (bias[0].double() - (levels - 1) / 2) / 2)


def test_any_even_number_of_levels_is_packed_near_its_entropy() -> None:
    for levels in range(2, 257, 2):
        stored = 8 * layout(SigmaDeltaSpec(levels), 1, 100_000)["packed_codes"][0][1] / 100_000
        entropy = torch.tensor(float(levels)).log2().item()
        assert entropy <= stored * (1 + 1e-6)
        assert stored <= 1.07 * entropy


def test_specs_survive_json_and_refuse_what_they_do_not_know() -> None:
    spec = SigmaDeltaSpec(6, 2, Vectors.COLUMNS, 12)
    assert SigmaDeltaSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="Did you mean 'order'"):
        SigmaDeltaSpec.from_dict({**spec.to_dict(), "ordre": 1})
    with pytest.raises(ConfigError, match="needs the key 'order'"):
        SigmaDeltaSpec.from_dict({"num_levels": 2})


@pytest.mark.parametrize(
    ("levels", "order", "message"),
    [
        (3, 1, "even number of levels.*nearest is 4"),
        (0, 1, "nearest is 2"),
        (-5, 1, "nearest is 2"),
        (300, 1, "nearest is 256"),
        (257, 1, "nearest is 256"),
        (2.0, 1, "even integer"),
        (2, 4, "use 1, 2 or 3"),
        (2, -1, "use 1, 2 or 3"),
        (2, 2, "order 2 is unstable with 2 levels.*levels = 4, or order = 1"),
        (4, 3, "order 3 is unstable with 4 levels.*levels = 8, or order = 2"),
        (6, 3, "at least 8.*order = 2 with 6 levels"),
    ],
)
def test_impossible_levels(levels: int, order: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_levels(levels, order)


def test_settings() -> None:
    assert parse_step("mse") is Step.MSE
    assert parse_step(2) == 2.0
    assert parse_dual("sobolev", 2) is Dual.SOBOLEV
    for step, message in (
        ("mean", "expected a positive number or a name"),
        (-1.0, "positive"),
        (True, "step"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_step(step)
    with pytest.raises(ConfigError, match="sobolev"):
        parse_dual("sobolef", 1)
    with pytest.raises(ConfigError, match="memoryless"):
        parse_dual("sobolev", 0)
    with pytest.raises(ConfigError, match="vectors"):
        SigmaDeltaSpec(2, 1, "diagonals")
    with pytest.raises(ConfigError, match="bias_size"):
        SigmaDeltaSpec(2, 1, "rows", -1)
