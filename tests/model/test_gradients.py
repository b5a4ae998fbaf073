"""Output gradients against autograd and the Fisher information, on every architecture."""

import pytest
import torch
from torch import nn

import framequant as fq
from framequant.model import gradients
from framequant.model.discovery import find_blocks, select_linears
from framequant.model.gradients import gradients_or_inputs, output_gradients
from framequant.model.sampled_loss import sampled_loss
from tests.model.architectures import ARCHITECTURES, make


def names_of(model: nn.Module) -> list[str]:
    blocks = [name for names in find_blocks(model).values() for name in names]
    return select_linears(model, blocks, fq.FrameQuantConfig())


def as_list(data):
    return data if isinstance(data, list) else [data]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_gradients_and_keeps_its_parameters(name):
    model, data = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    found = output_gradients(model, as_list(data), names_of(model), inputs=True)
    assert set(found) == set(names_of(model))
    assert all(float(one.gram().trace()) > 0 and float(one.hessian().trace()) > 0 for one in found.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


class Classifier(nn.Module):
    """Two linears and a softmax: its Fisher information is known in closed form."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_the_mean_of_sampled_gradients_is_the_fisher_information():
    model = Classifier()
    x = torch.randn(1, 5).expand(60_000, 5)
    found = output_gradients(model, [x], ["first", "last"], inputs=True)
    p = torch.softmax(model(x[:1])[0].double(), 0)
    fisher = p.diag() - p[:, None] * p
    torch.testing.assert_close(found["last"].gram(), fisher, atol=0.01, rtol=0)
    hidden = model.first(x[:1])[0].double()
    slope = model.last.weight.double() * (1 - torch.tanh(hidden) ** 2)
    torch.testing.assert_close(found["first"].gram(), slope.T @ fisher @ slope, atol=0.01, rtol=0)
    torch.testing.assert_close(
        found["first"].hessian(), x[0, :, None].double() @ x[:1].double(), atol=1e-4, rtol=0
    )


def test_a_long_calibration_is_thinned_out_on_a_cpu_but_every_token_is_weighed(monkeypatch):
    model, data = make("llama")
    monkeypatch.setattr(gradients, "TOKENS_PER_PIECE", data.shape[1])
    monkeypatch.setattr(gradients, "TOKENS_IN_FULL", 2 * data.shape[1])
    found = output_gradients(model, [data], names_of(model), inputs=True)
    expected = 2 * data.shape[1] + (len(data) - 2) * -(-data.shape[1] // 8)
    assert {one.count for one in found.values()} == {one.inputs for one in found.values()} == {expected}
    assert {one.squares[0].numel() for one in found.values()} == {data.numel()}


def test_padding_takes_no_part():
    model, data = make("bert")
    batch = data if isinstance(data, dict) else {"input_ids": data}
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -5:] = 0
    found = output_gradients(model, [{**batch, "attention_mask": mask}], names_of(model), inputs=True)
    assert {one.count for one in found.values()} == {int(mask.sum())}
    assert {one.inputs for one in found.values()} == {int(mask.sum())}


def test_an_encoders_padding_has_no_cotangent():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    loss = sampled_loss(nn.Identity(), hidden, mask.reshape(-1), torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)


def test_pieces_of_a_batch_add_up_to_the_batch(monkeypatch):
    model, data = make("llama")
    whole = output_gradients(model, [data], names_of(model), inputs=True)
    monkeypatch.setattr(gradients, "TOKENS_PER_PIECE", data.shape[1])
    pieces = output_gradients(model, [data], names_of(model), inputs=True)
    for name, one in whole.items():
        torch.testing.assert_close(pieces[name].hessian(), one.hessian(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pieces[name].squares[0], one.squares[0], rtol=1e-3, atol=1e-6)


def test_a_model_that_cannot_be_differentiated_still_shows_its_inputs():
    class Detached(Classifier):
        def forward(self, x):
            return super().forward(x).detach()

    found, note = gradients_or_inputs(Detached(), [torch.randn(9, 5)], ["first", "last"], 0, inputs=True)
    assert "no backward pass" in note
    assert found["last"].gram_sum is None
    assert found["last"].hessian().shape == (4, 4)


def test_matrices_that_fit_nowhere_are_done_without(monkeypatch):
    model, data = make("llama")
    monkeypatch.setattr(gradients, "free_bytes", lambda device: 0)
    found, note = gradients_or_inputs(model, [data], names_of(model), 0, inputs=True)
    assert "do not fit into memory" in note
    assert all(one.gram_sum is None and one.input_sum is None for one in found.values())
    assert all(one.mean_square > 0 and one.input_square > 0 for one in found.values())
    settings = {"allocation": "sensitivity", "output_feedback": True, "token_weights": 0.5}
    config = fq.FrameQuantConfig(code="trellis", redundancy=1.0, state_bits=8, bits=4, **settings)
    report = fq.quantize_(model, data, config)
    assert any("do not fit" in warning for warning in report.warnings)
    assert 0.99 * 4 < report.bits_per_weight <= 4
