"""Small checkpoints of every kind of loading, and what a good load of each gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import framequant as fq
from tests.model.architectures import OwnModel, make, make_family, output


class TiedModel(OwnModel):
    """A model of nobody's library with two linears that share a weight, so that its checkpoint has an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(36, 4)
        self.twin.weight = self.head.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + self.twin.bias


@dataclass
class Good:
    """An undamaged checkpoint."""

    directory: Path
    data: torch.Tensor
    expected: torch.Tensor
    state: dict[str, torch.Tensor]
    own: bool

    def load(self, directory: Path) -> nn.Module:
        """Load a copy of it as a user would."""
        return fq.load(directory, model=TiedModel() if self.own else None)

    def is_same(self, model: nn.Module) -> bool:
        """Whether a loaded model is the good one, bit for bit."""
        state = model.state_dict()
        if state.keys() != self.state.keys():
            return False
        if not all(_bits_equal(state[key], value) for key, value in self.state.items()):
            return False
        return torch.equal(output(model, self.data), self.expected)


def _bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return not left.numel() or torch.equal(
        left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8)
    )


def _own() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return TiedModel(), torch.randn(40, 20)


CONFIGS = {
    "own": fq.FrameQuantConfig(overrides={r"blocks\.1": {"code": "trellis", "state_bits": 8, "bits": 2.25}}),
    "timm": fq.FrameQuantConfig(levels=5, redundancy=1.0),
    "llama": fq.FrameQuantConfig(code="trellis", bits=2.25, redundancy=1.0, state_bits=8, row_factors=True),
    "shards": fq.preset("framequant-paper"),
    "mixtral": fq.FrameQuantConfig(bits=4, redundancy=1.0),
    "sigma_delta": fq.preset("sigma-delta"),
}


def make_checkpoint(kind: str, directory: Path) -> Good:
    """Quantize and save the checkpoint of one kind."""
    if kind in ("own", "sigma_delta"):
        model, data = _own()
    elif kind == "mixtral":
        model, data = make_family("mixtral")
    else:
        model, data = make("timm_vit" if kind == "timm" else "llama")
    fq.quantize_(model, data, CONFIGS[kind])
    limit = {"max_shard_bytes": 20_000} if kind == "shards" else {}
    fq.save_pretrained(model, directory, **limit)
    own = kind in ("own", "sigma_delta")
    loaded = fq.load(directory, model=TiedModel() if own else None)
    expected = output(loaded, data)
    assert torch.equal(expected, output(model, data))
    return Good(directory, data, expected, dict(loaded.state_dict()), own)
