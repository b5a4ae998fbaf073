"""Speed of a model: what is counted is what is read, and the figures fit together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framequant.evaluation.speed import bytes_read, copy_bandwidth, measure_speed, tensor_bytes
from tests.conftest import make_llama


def test_embeddings_count_only_where_a_head_reads_them():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    assert bytes_read(model) == 160
    model["head"].weight = model["table"].weight
    assert bytes_read(model) == 160
    assert tensor_bytes([model["head"].weight, model["table"].weight, torch.ones(2)]) == 168


def test_figures_fit_together():
    model = make_llama().eval()
    speed = measure_speed(model, 6, 4, repeats=1)
    config = model.config
    cache = 2 * 4 * 10 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert speed.bytes_per_token == pytest.approx(
        bytes_read(model) + cache, abs=64 * config.num_hidden_layers
    )
    assert speed.memory_bytes >= speed.model_bytes == tensor_bytes([*model.parameters(), *model.buffers()])
    assert speed.prompt_tokens_per_second == pytest.approx(6 / speed.first_token_seconds)
    limit = speed.bandwidth / speed.bytes_per_token
    assert speed.bandwidth_fraction == pytest.approx(speed.tokens_per_second / limit)
    assert not speed.graph


def test_bandwidth_is_of_this_machine():
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13
