from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import framequant as fq
from framequant.errors import ConfigError, NumericalError
from framequant.model import train_ahead
from framequant.model.rows import count_rows, form_of, pick
from framequant.model.tune_loss import distance
from tests.model.architectures import make, make_family
from tests.model.test_tune import data_for

COARSE = fq.FrameQuantConfig(code="trellis", bits=1, redundancy=1, frame="hadamard", state_bits=8)


def float_model(name: str):
    model, _ = make(name)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # as they are initialised, blocks hardly change what they are given
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def logits(model, data) -> torch.Tensor:
    with torch.no_grad():
        result = model(data)
    return getattr(result, "logits", result)


def divergence(model, teacher, data) -> float:
    target, output = (logits(each, data).log_softmax(-1) for each in (teacher, model))
    return float((target.exp() * (target - output)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("timm_vit", "float32")]
)
def test_blocks_to_come_learn_what_the_rounded_ones_did(name, dtype):
    teacher, data = float_model(name).to(getattr(torch, dtype)), data_for(name)
    plain, trained = copy.deepcopy(teacher), copy.deepcopy(teacher)
    config = replace(COARSE, include=[r"(layers|blocks)\.0\."])
    fq.quantize_(plain, data, config)
    report = fq.quantize_(trained, data, replace(config, train_ahead=30, train_rate=3e-3))
    seen = data.float() if data.is_floating_point() else data
    before, after = (divergence(each.float(), teacher.float(), seen) for each in (plain, trained))
    assert after < 0.8 * before
    assert report.trained_ahead["steps"] == 30
    losses = report.trained_ahead["losses"]
    assert len(losses) == report.model["blocks"] - 1  # nothing is left to train after the last
    assert all(loss > 0 for loss in losses)
    asks = [[parameter.requires_grad for parameter in each.parameters()] for each in (plain, trained)]
    assert asks[0] == asks[1]
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_embeddings_and_what_was_rounded_stay_and_runs_are_the_same(tmp_path):
    teacher, data = float_model("llama"), data_for("llama")
    config = replace(COARSE, train_ahead=3)
    models = [copy.deepcopy(teacher) for _ in range(2)]
    reports = [fq.quantize_(model, data, config) for model in models]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert reports[0].trained_ahead["losses"] == reports[1].trained_ahead["losses"]
    before = teacher.state_dict()
    changed = {name for name in first if name in before and not torch.equal(first[name], before[name])}
    assert not any("embed" in name or "lm_head" in name for name in changed)
    assert not any(
        name.startswith("model.layers.0.") for name in changed
    )  # its norms are read by rounded linears
    assert "model.norm.weight" in changed
    fq.save_pretrained(models[0], tmp_path / "out")
    assert torch.equal(logits(fq.load(tmp_path / "out"), data), logits(models[0], data))
    json.dumps(reports[0].to_dict())


def test_batches_with_padding_count_real_positions_only():
    teacher, ids = float_model("llama"), data_for("llama")
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] // 2 :] = 0
    torch.manual_seed(3)
    other = torch.where(mask.bool(), ids, torch.randint_like(ids, 64))
    found = []
    for tokens in (ids, other):
        model = copy.deepcopy(teacher)
        data = [{"input_ids": tokens, "attention_mask": mask}]
        report = fq.quantize_(
            model, data, replace(COARSE, train_ahead=2, float_targets=0, residual_targets=0)
        )
        found.append(report.trained_ahead["losses"][0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_cannot_be_trained_is_refused(monkeypatch):
    model, data = float_model("llama"), data_for("llama")
    monkeypatch.setattr(train_ahead, "distance", lambda output, *_: (output.sum() * float("nan"), 1))
    with pytest.raises(NumericalError, match="smaller train_rate"):
        fq.quantize_(model, data, replace(COARSE, train_ahead=1))
    with pytest.raises(ConfigError, match="quantize in memory"):
        fq.quantize_streaming("nowhere", "out", data, replace(COARSE, train_ahead=1))
    for setting in ("train_ahead", "rate_tilt", "rate_spread"):
        with pytest.raises(ConfigError, match="whole run"):
            replace(COARSE, overrides={"mlp": {setting: 1}})
    with pytest.raises(ConfigError, match="expected an integer"):
        replace(COARSE, train_ahead=1.5)


def test_samples_beyond_the_rounding_ones_train_only():
    data, found = data_for("llama"), []
    torch.manual_seed(5)
    others = torch.randint_like(data, 64)
    config = replace(COARSE, train_ahead=2, output_feedback=True, token_weights=0.5)
    for batches, rounding in (([data], None), ([data, others], None), ([data, others], len(data) - 1)):
        model = float_model("llama")
        report = fq.quantize_(model, batches, replace(config, rounding_samples=rounding))
        told = report.trained_ahead
        assert told["samples"] == sum(map(len, batches))
        assert told["rounding_samples"] == (len(data) if rounding else sum(map(len, batches)))
        found.append({name: value for name, value in model.state_dict().items() if "codes" in name})
    alone, all_of_them, parted = found
    first = [name for name in alone if ".layers.0." in name]
    later = [name for name in alone if ".layers.1." in name]
    assert all(torch.equal(alone[name], parted[name]) for name in first)
    assert not all(torch.equal(alone[name], all_of_them[name]) for name in first)
    assert not all(torch.equal(alone[name], parted[name]) for name in later)
    with pytest.raises(ConfigError, match="give train_ahead, or fewer samples"):
        replace(COARSE, rounding_samples=4)


def test_a_head_is_quantized_after_all_was_trained():
    model, data = float_model("llama"), data_for("llama")
    report = fq.quantize_(model, data, replace(COARSE, train_ahead=1, include=["layers", "lm_head"]))
    assert len(report.trained_ahead["losses"]) == report.model["blocks"] - 1
    assert "lm_head" in {entry.name for entry in report.linears}


def test_a_step_runs_samples_of_several_batches_together(monkeypatch):
    """Only how many runs it takes depends on how the samples are cut into batches."""
    data, found = data_for("llama"), []
    assert len(data) >= 6
    for batches in (data, list(data.split(2)), [data[:3], data[3:]]):
        model, runs = float_model("llama"), []
        monkeypatch.setattr(
            train_ahead, "distance", lambda *args, runs=runs: runs.append(len(args[0])) or distance(*args)
        )
        draw = iter(number for _ in range(9) for number in (0, 5, 1, 3, 4, 2, 5, 0))
        counts = [count_rows(batch) for batch in (data.split(len(data)) if batches is data else batches)]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        places = [
            (max(i for i, s in enumerate(starts) if s <= n), n - max(s for s in starts if s <= n))
            for n in draw
        ]
        monkeypatch.setattr(train_ahead, "_order", lambda *_, places=places: iter(places))
        report = fq.quantize_(
            model, batches, replace(COARSE, train_ahead=1, float_targets=0, residual_targets=0)
        )
        assert set(runs) == {8}
        found.append(report.trained_ahead["losses"][0])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-3)


def test_two_towers_are_trained_on_their_embeddings():
    model, data = make_family("clip")
    report = fq.quantize_(model, data, replace(COARSE, train_ahead=2))
    assert all(loss > 0 for loss in report.trained_ahead["losses"])


def test_samples_of_other_forms_run_by_themselves():
    model, ids = float_model("llama"), data_for("llama")
    data = [ids[:2], ids[2:4, :-3], {"input_ids": ids[4:], "attention_mask": torch.ones_like(ids[4:])}]
    report = fq.quantize_(model, data, replace(COARSE, train_ahead=2))
    assert all(loss > 0 for loss in report.trained_ahead["losses"])


def test_rows_are_picked_from_everything_that_has_them():
    batch = {
        "ids": torch.arange(12).view(4, 3),
        "mask": torch.ones(4, 3),
        "flag": True,
        "bias": torch.ones(7),
    }
    assert count_rows(batch) == 4
    other = {**batch, "ids": 100 + torch.arange(6).view(2, 3), "mask": torch.zeros(2, 3)}
    assert form_of(batch, 4) == form_of(other, 2)
    assert form_of(batch, 4) != form_of({**other, "flag": False}, 2)
    assert form_of(batch, 4) != form_of({**other, "ids": torch.zeros(2, 5)}, 2)
    found = pick([batch, other], [4, 2], [[2, 0], [1]])
    assert found["ids"].tolist() == [[6, 7, 8], [0, 1, 2], [103, 104, 105]]
    assert found["mask"].sum() == 6
    assert found["flag"] is True
    assert found["bias"].shape == (7,)
    taken = pick([(torch.zeros(4, 2), None, [torch.zeros(4), torch.zeros(())])], [4], [[1]])
    assert taken[0].shape == (1, 2)
    assert taken[1] is None
    assert [part.ndim for part in taken[2]] == [1, 0]
