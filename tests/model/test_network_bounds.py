"""Bounds that follow a traced network: feed-forward and residual ones in many random cases, others refused."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import framequant as fq


class Residual(nn.Module):
    """Two residual blocks with functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 8), (8, 5), (5, 8), (8, 8), (8, 3)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first, down, up, other, last = self.linears
        hidden = torch.flatten(first(inputs), 1)
        hidden = hidden + up(functional.relu(down(hidden)))
        hidden = other(hidden).tanh() + hidden
        return last(functional.gelu(hidden))


class Normed(nn.Module):
    """A network with a norm, which has no global Lipschitz constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(inputs))


class Product(nn.Module):
    """A network that multiplies activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) * inputs


class Branching(nn.Module):
    """A network that looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) if inputs.sum() > 0 else inputs


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 4))


@pytest.mark.parametrize("make", [feed_forward, Residual], ids=["feed-forward", "residual"])
def test_bounds_hold_in_ten_thousand_random_cases(make):
    cases = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model = make().eval()
        x = torch.rand(500, 6) * 2 - 1
        with torch.no_grad():
            exact = model(x)
            settings = {"frame_size_ratio": 2 + seed % 7, "levels": 2 + 2 * (seed % 3)}
            bounds = fq.quantize_(model, config=fq.preset("sigma-delta", **settings)).bounds
            errors = (model(x) - exact).norm(dim=1)
        assert int((errors > bounds["a_posteriori"]["value"]).sum()) == 0
        assert int((errors > bounds["a_priori"]["value"]).sum()) == 0
        assert int((exact.norm(dim=1) > bounds["a_posteriori"]["reference"]).sum()) == 0
        assert errors.max() > 0.002 * bounds["a_posteriori"]["value"]
        cases += len(x)
    assert cases >= 10_000


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Normed(), r"norm \(LayerNorm\) has no global Lipschitz constant"),
        (Product(), "mul.*has no global Lipschitz constant"),
        (Branching(), "cannot be traced"),
    ],
)
def test_models_without_a_bound_say_why(model, reason):
    report = fq.quantize_(model, config=fq.preset("sigma-delta"))
    assert set(report.bounds) == {"reason"}
    assert re.search(reason, report.bounds["reason"])


def test_no_prior_bound_where_a_given_step_overloads():
    report = fq.quantize_(feed_forward(), config=fq.preset("sigma-delta", step=0.01))
    assert "a_priori" not in report.bounds
    assert "overloads" in report.bounds["reason"]
    assert report.bounds["a_posteriori"]["value"] > 0


def test_a_float_linear_inside_the_network_has_no_error():
    report = fq.quantize_(feed_forward(), config=fq.preset("sigma-delta", ignore=("^2$",)))
    assert "no global Lipschitz constant" in report.bounds["reason"]
