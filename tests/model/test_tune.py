from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import framequant as fq
from framequant.codes.trellis_storage import decode_factors, encode_factors
from framequant.errors import CalibrationError, CheckpointError, ConfigError, NumericalError
from framequant.layers import FrameLinear
from framequant.model import discovery
from framequant.model.calibration import as_batches, as_samples, collate
from framequant.model.tunable import Tunable
from framequant.model.tune_config import MOST_HELD_OUT, rows_of_step, split_samples, without_judges
from framequant.model.tune_loss import distance
from framequant.model.walk import quantized_linears
from tests.model.architectures import make, output

TRELLIS = fq.FrameQuantConfig(code="trellis", bits=2, redundancy=1, frame="hadamard", state_bits=8)
SCALAR = fq.FrameQuantConfig(bits=2, redundancy=1.125)
#: A rate that shows in a few steps.
QUICK = fq.TuneConfig(steps=12, learning_rate=1e-2, batch=4, evaluations=3)


def data_for(name: str) -> torch.Tensor:
    _, few = make(name)
    samples = 96 if name == "own" else 24  # its samples are single tokens
    draw = torch.Generator().manual_seed(5)
    if few.is_floating_point():
        return torch.randn(samples, *few.shape[1:], generator=draw)
    return torch.randint(0, 64, (samples, few.shape[1]), generator=draw)


def quantized(name: str, config: fq.FrameQuantConfig):
    """A quantized model, the float model, and calibration data."""
    model, _ = make(name)
    if name == "bert":  # as it is initialised its blocks hardly change what they are given
        for linear in discovery.linears(model.encoder).values():
            linear.weight.data *= 8
    teacher, data = copy.deepcopy(model), data_for(name)
    fq.quantize_(model, data, config)
    return model, teacher, data


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("name", "config", "loss"),
    [
        ("llama", TRELLIS, "kl"),
        ("gpt2", SCALAR, "kl"),
        ("bert", TRELLIS, "mse"),
        ("timm_vit", SCALAR, "kl"),
        ("hf_vit", TRELLIS, "kl"),
        ("llama", fq.preset("gptq", group_size=8), "kl"),
        ("llama", fq.preset("quip"), "kl"),
    ],
)
def test_tuning_improves_what_it_does_not_see_and_leaves_the_codes(name, config, loss):
    model, teacher, data = quantized(name, config)
    codes = {key: layer.tensors["packed_codes"].clone() for key, layer in quantized_linears(model).items()}
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if p.ndim > 1}
    float_before = state_of(teacher)
    report = fq.tune_(model, teacher, data, QUICK)
    assert report.loss == loss
    assert report.chosen_step > 0
    assert report.loss_after < report.loss_before
    assert report.loss_after == min(value for _, value in report.history)
    assert (report.samples, report.held_out) == (21, 3)
    for key, layer in quantized_linears(model).items():
        assert torch.equal(layer.tensors["packed_codes"], codes[key])
    for key, value in frozen.items():
        assert torch.equal(model.get_parameter(key), value)
    assert same(state_of(teacher), float_before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "config"), [("llama", TRELLIS), ("timm_vit", SCALAR), ("own", TRELLIS)])
def test_the_report_is_the_stored_model(name, config, tmp_path):
    """Loss, bits and outputs are those of what is reloaded from disk, bit for bit."""
    model, teacher, data = quantized(name, config)
    bits = model.framequant_report.bits_per_weight
    report = fq.tune_(model, teacher, data, QUICK)
    assert report.chosen_step > 0
    skeleton = make(name)[0] if name == "own" else None
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
    fq.save_pretrained(model, tmp_path / "out", model_args=args if name == "timm_vit" else None)
    loaded = fq.load(tmp_path / "out", model=skeleton)
    assert torch.equal(output(loaded, data), output(model, data))
    _, held = split_samples(len(data), QUICK)
    batch = data[torch.from_numpy(held)]
    total, count = distance(output(loaded, batch), output(teacher, batch), None, report.loss)
    assert float(total) / count == pytest.approx(report.loss_after, rel=1e-5)
    saved = loaded.framequant_report
    assert saved.tuning["loss_after"] == report.loss_after
    assert "tuned" in (tmp_path / "out" / "README.md").read_text()
    stored = sum(sum(t.numel() * t.element_size() for t in layer.tensors.values())
                 for layer in quantized_linears(loaded).values())  # fmt: skip
    counted = sum(n for entry in saved.linears for part, n in entry.bytes.items() if part != "frame")
    assert stored == counted
    rows = sum(layer.spec.coefficient_shape[0] for layer in quantized_linears(loaded).values())
    weights = sum(entry.num_weights for entry in saved.linears)
    expected = bits + (8 * rows / weights if config is TRELLIS else 0)
    assert saved.bits_per_weight == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_trained_where_asked_and_stored(tied, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    teacher, data = copy.deepcopy(model), data_for("llama")
    fq.quantize_(model, data, TRELLIS)
    bits = model.framequant_report.bits_per_weight
    rows = {key: layer.spec.coefficient_shape[0] for key, layer in quantized_linears(model).items()}
    report = fq.tune_(model, teacher, data, replace(QUICK, embedding_rate=0.01))
    assert report.chosen_step > 0
    assert report.settings["embedding_rate"] == 0.01
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert all(not torch.equal(table, teacher.lm_head.weight) for table in tables)
    assert (tables[0] is tables[1]) == tied
    weights = sum(entry.num_weights for entry in model.framequant_report.linears)
    expected = bits + 8 * sum(rows.values()) / weights
    assert model.framequant_report.bits_per_weight == pytest.approx(expected, rel=1e-9)
    fq.save_pretrained(model, tmp_path / "out")
    loaded = fq.load(tmp_path / "out")
    assert torch.equal(output(loaded, data), output(model, data))


def test_a_model_without_embeddings_has_none_to_train():
    model, teacher, data = quantized("timm_vit", SCALAR)
    before = state_of(model)
    with pytest.raises(ConfigError, match="no token embeddings"):
        fq.tune_(model, teacher, data, replace(QUICK, embedding_rate=0.01))
    assert same(before, state_of(model))


def test_a_tuning_that_does_not_help_leaves_the_model_as_it_was(monkeypatch):
    from framequant.model.tune import _Run

    model, teacher, data = quantized("llama", TRELLIS)
    before, bits = state_of(model), model.framequant_report.bits_per_weight
    losses = iter(range(100))
    judge = _Run._judge

    def worse(self, tunable, at, best):
        judge(self, tunable, at, best)
        step, _ = at.history[-1]
        at.history[-1] = (step, float(next(losses)))
        at.best_loss, at.best_step = at.history[0][1], 0
        return best

    monkeypatch.setattr(_Run, "_judge", worse)
    report = fq.tune_(model, teacher, data, QUICK)
    assert (report.chosen_step, report.loss_after) == (0, report.loss_before)
    assert same(state_of(model), before)
    assert model.framequant_report.bits_per_weight == bits
    assert not any(layer.spec.code.row_factors for layer in quantized_linears(model).values())


class StopError(Exception):
    pass


def stop_at(step):
    def progress(at):
        if at.done == step:
            raise StopError

    return progress


@pytest.mark.parametrize("stop", [2, 5, 9])
@pytest.mark.parametrize(("name", "config"), [("llama", TRELLIS), ("timm_vit", SCALAR)])
def test_an_interrupted_tuning_goes_on_to_the_same_end(name, config, stop, tmp_path, monkeypatch):
    monkeypatch.setattr("framequant.model.tune.SECONDS_BETWEEN_SAVES", 0.0)
    model, teacher, data = quantized(name, config)
    untuned = state_of(model)
    with pytest.raises(StopError):
        fq.tune_(model, teacher, data, QUICK, state=tmp_path / "state", progress=stop_at(stop))
    assert same(state_of(model), untuned), "an interrupted tuning leaves the model untuned"
    steps = []
    resumed = fq.tune_(
        model, teacher, data, QUICK, state=tmp_path / "state", progress=lambda at: steps.append(at.done)
    )
    assert steps[0] == stop + 1
    whole, _, _ = quantized(name, config)
    report = fq.tune_(whole, teacher, data, QUICK)
    assert report.history == resumed.history
    assert same(state_of(model), state_of(whole))


def test_a_state_of_another_tuning_is_refused_with_the_difference(tmp_path):
    model, teacher, data = quantized("llama", SCALAR)
    file = tmp_path / "state"
    with pytest.raises(StopError):
        fq.tune_(model, teacher, data, QUICK, state=file, progress=stop_at(5))
    assert file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    other = fq.TuneConfig(steps=12, learning_rate=2e-2, batch=4, evaluations=3)
    with pytest.raises(ConfigError, match=r"learning_rate: 0.01 there, 0.02 now\. Repeat the command"):
        fq.tune_(model, teacher, data, other, state=file)
    with pytest.raises(ConfigError, match=r"settings: calibration: '\w+' there, '\w+' now"):
        fq.tune_(model, teacher, data.flip(0), QUICK, state=file)
    changed, _, _ = quantized("llama", TRELLIS)
    with pytest.raises(ConfigError, match=r"settings: model: "):
        fq.tune_(changed, teacher, data, QUICK, state=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        fq.tune_(model, teacher, data, QUICK, state=file)


def test_too_short_calibration_says_how_much_is_needed():
    for count, config in ((24, fq.TuneConfig(1000, batch=4)), (8, fq.TuneConfig(5, batch=8))):
        with pytest.raises(CalibrationError, match="too short for this tuning") as caught:
            split_samples(count, config)
        needed = int(str(caught.value).split(" samples need ")[1].split()[0])
        assert needed > count
        train, held = split_samples(needed, config)
        assert sorted([*train, *held]) == list(range(needed))
        with pytest.raises(CalibrationError):
            split_samples(needed - 1, config)
    train, held = split_samples(100_000, fq.TuneConfig(4))
    assert (len(train), len(held)) == (100_000 - MOST_HELD_OUT, MOST_HELD_OUT)
    model, teacher, data = quantized("own", SCALAR)
    with pytest.raises(CalibrationError, match="too short"):
        fq.tune_(model, teacher, data[:6], fq.TuneConfig(4))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"held_out": 1.0},
        {"warmup": 1.0},
        {"loss": "cosine"},
    ],
)
def test_bad_settings_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        fq.TuneConfig(**{"steps": 4, **values})


def test_float_models_and_foreign_states_are_refused():
    model, data = make("llama")
    with pytest.raises(ConfigError, match="no quantized linear"):
        fq.tune_(model, model, data, 4)


def test_a_loss_that_is_not_finite_ends_the_tuning_and_restores_the_model():
    model, teacher, data = quantized("llama", SCALAR)
    before = state_of(model)
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="held-out loss is nan"):
        fq.tune_(model, teacher, data, QUICK)
    assert same(state_of(model), before)


def test_rate_rises_and_falls():
    config = fq.TuneConfig(steps=100, learning_rate=0.5, warmup=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[9] == 0.5 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_every_training_sample_is_seen_once_a_turn():
    config = fq.TuneConfig(steps=6, batch=4)
    train, _ = split_samples(14, config)
    assert len(train) == 12
    seen = [row for step in range(6) for row in rows_of_step(train, step, config)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(train)
    assert seen[:12] != seen[12:]


def test_samples_of_any_batch_are_joined_again():
    pairs = [{"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3)},
             {"input_ids": torch.arange(5).view(1, 5), "attention_mask": torch.ones(1, 5)}]  # fmt: skip
    samples = as_samples(as_batches(pairs))
    assert len(samples) == 3
    joined = collate(samples)
    assert joined["attention_mask"].sum(1).tolist() == [3, 3, 5]
    assert joined["input_ids"][1].tolist() == [3, 4, 5, 0, 0]
    tuples = as_samples([(torch.zeros(2, 3), torch.ones(2, 4))])
    assert [t.shape for t in collate(tuples)] == [(2, 3), (2, 4)]
    with pytest.raises(CalibrationError, match="attention mask"):
        collate([torch.zeros(1, 3), torch.zeros(1, 4)])
    with pytest.raises(CalibrationError, match="rows"):
        as_samples([{"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}])


def test_padding_does_not_count():
    """Padded together or one by one, sentences have the same loss."""
    model, teacher, _ = quantized("bert", SCALAR)
    rows = [torch.randint(2, 64, (1, length)) for length in (4, 7, 9, 5)]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    losses = []
    for parts in ([[b] for b in batches], [batches]):
        total = count = 0.0
        for part in parts:
            batch = collate(part)
            with torch.no_grad():
                outputs = [m(**batch).last_hidden_state for m in (model, teacher)]
            one, positions = distance(*outputs, batch["attention_mask"].reshape(-1).bool(), "mse")
            total, count = total + float(one), count + positions
        losses.append(total / count)
        assert count == 25
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("config", [TRELLIS, SCALAR, fq.preset("gptq", group_size=8), fq.preset("quip")])
def test_untuned_numbers_change_nothing_and_gradients_are_those_of_the_dense_weight(config):
    model, _, data = quantized("llama", config)
    expected = output(model, data[:4])
    tunable = Tunable(model, torch.float32)
    tunable.install(tunable.snapshot())
    assert torch.equal(output(model, data[:4]), expected)
    name = next(name for name in tunable.values if name.endswith("down_proj.factors"))
    with tunable.training(), torch.enable_grad():
        found = model(data[:4]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found.square().sum().backward()
    gradient, step = tunable.values[name].grad, 1e-3
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            tunable.values[name][0, 0] += sign * step
        with tunable.training(), torch.enable_grad():
            values.append(float(model(data[:4]).logits.detach().double().square().sum()))
        with torch.no_grad():
            tunable.values[name][0, 0] -= sign * step
    numeric = (values[0] - values[1]) / (2 * step)
    assert float(gradient[0, 0]) == pytest.approx(numeric, rel=2e-2, abs=1e-2)


def test_row_factors_are_stored_in_bytes_and_old_layouts_stay():
    factors = torch.tensor([[1.0], [1.1], [0.3], [2.0], [0.75]])
    stored = encode_factors(factors)
    assert stored.dtype == torch.int8
    back = decode_factors(stored, torch.float32)
    assert (back[[0, 1, 4]] - factors[[0, 1, 4]]).abs().max() <= 1 / 512
    assert back[2, 0] == 1 - 127 / 256
    assert back[3, 0] == 1 + 127 / 256
    spec = TRELLIS.code_spec()
    assert "row_factors" not in json.dumps(spec.to_dict())
    assert type(spec).from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="row_factors"):
        type(spec).from_dict({**spec.to_dict(), "row_factors": 1})


def test_a_tuned_model_can_be_tuned_again():
    model, teacher, data = quantized("llama", TRELLIS)
    first = fq.tune_(model, teacher, data, QUICK)
    assert all(
        isinstance(m, FrameLinear) and m.spec.code.row_factors for m in quantized_linears(model).values()
    )
    second = fq.tune_(model, teacher, data, fq.TuneConfig(4, learning_rate=1e-3, batch=4, evaluations=2))
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-5)
    assert second.loss_after <= second.loss_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    model, teacher, data = quantized("llama", TRELLIS)
    model, teacher = model.to(dtype), teacher.to(dtype)
    report = fq.tune_(model, teacher, data, QUICK)
    assert report.chosen_step > 0
    assert {p.dtype for p in model.parameters()} == {dtype}
    fq.save_pretrained(model, tmp_path / "out")
    assert same(state_of(fq.load(tmp_path / "out")), state_of(model))


@pytest.mark.parametrize(("name", "config"), [("llama", TRELLIS), ("timm_vit", SCALAR), ("bert", TRELLIS)])
def test_training_in_bfloat16_is_judged_in_float32(name, config, monkeypatch):
    monkeypatch.setattr("framequant.model.tune.HALF_DEVICES", ("cpu",))
    model, teacher, data = quantized(name, config)
    report = fq.tune_(model, teacher, data, QUICK)
    assert report.chosen_step > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.undo()
    whole, _, _ = quantized(name, config)
    exact = fq.tune_(whole, teacher, data, QUICK)
    assert report.loss_before == exact.loss_before
    assert report.loss_after == pytest.approx(exact.loss_after, rel=0.1)
    assert report.loss_after != exact.loss_after


def test_what_judges_a_tuning_does_not_calibrate():
    data = torch.arange(24 * 3).view(24, 3)
    config = fq.TuneConfig(steps=4, batch=2)
    _, held = split_samples(len(data), config)
    batches = without_judges(data, config)
    seen = torch.cat(batches)
    assert {int(row[0]) for row in seen} == {int(row[0]) for row in data} - {
        int(row) for row in data[held][:, 0]
    }
    pairs = [
        {"input_ids": data[:16], "attention_mask": data[:16]},
        {"input_ids": data[16:], "attention_mask": data[16:]},
    ]
    assert [len(batch["input_ids"]) for batch in without_judges(pairs, config)] == [12, 9]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in without_judges(pairs, config)]), seen)
    with pytest.raises(CalibrationError, match="too short"):
        without_judges(data[:2], config)
