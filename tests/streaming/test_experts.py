"""Mixtures of experts are streamed: taken apart as their blocks come, with the bits of a run in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import framequant as fq
from framequant.errors import ModelSourceError
from framequant.model import experts, mixture
from framequant.streaming.skeleton import build_skeleton
from tests.model.architectures import make_family
from tests.model.test_experts import MIXTURES
from tests.streaming.models import IDS, in_memory, same_tensors, save_llama, save_mixture

TRELLIS = fq.preset("framequant", state_bits=8)
SCALAR = fq.preset("framequant-scalar")


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_are_those_that_transformers_loads(tmp_path, name):
    source = save_mixture(tmp_path / "model", name)
    skeleton = build_skeleton(source, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = dict(model.state_dict())
    assert experts.unfuse_(model)
    expected |= model.state_dict()
    found = dict(skeleton.read(skeleton.pieces))
    assert found.keys() == expected.keys()
    assert not [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]


CASES = {
    "mixtral": ("mixtral", TRELLIS, {}),
    "scalar": ("mixtral", SCALAR, {}),
    "shared expert": ("qwen2_moe", TRELLIS, {}),
    "stacked in the file, biases": ("gpt_oss", SCALAR, {}),
    "one dense block": ("deepseek_v3", SCALAR, {}),
    "more experts than tokens": ("mixtral", TRELLIS, {"num_local_experts": 32, "num_experts_per_tok": 1}),
    "experts left float": ("mixtral", fq.preset("gptq", ignore=["experts"]), {}),
    "some experts left float": ("mixtral", fq.preset("gptq", ignore=[r"experts\.[12]\."]), {}),
}


#: Run every time; the others by ``make test-all``.
QUICK = ("mixtral", "stacked in the file, biases", "more experts than tokens")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_codes_are_those_of_a_run_in_memory(tmp_path, case):
    name, config, settings = CASES[case]
    source = save_mixture(tmp_path / "model", name, **settings)
    data = IDS[:2, :12] if "num_local_experts" in settings else IDS
    model = in_memory(source, tmp_path / "memory", data, config)
    run = fq.quantize_streaming(source, tmp_path / "stream", data, config)
    same_tensors(tmp_path / "memory", tmp_path / "stream")
    for file in ("config.json", "README.md"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "stream" / file).read_bytes()
    expected = model.framequant_report
    assert run.report.warnings == expected.warnings
    assert run.report.skipped == expected.skipped
    assert run.report.coverage == expected.coverage
    assert [(e.name, e.tokens, e.details) for e in run.report.linears] == [
        (e.name, e.tokens, e.details) for e in expected.linears
    ]
    with torch.no_grad():
        logits = model.eval()(IDS).logits
        assert torch.equal(fq.load(tmp_path / "stream")(IDS).logits, logits)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stream")(IDS).logits, logits)


def test_the_starved_case_has_experts_without_tokens(tmp_path):
    name, config, settings = CASES["more experts than tokens"]
    source = save_mixture(tmp_path / "model", name, **settings)
    report = fq.quantize_streaming(source, tmp_path / "out", IDS[:2, :12], config).report
    tokens = [entry.tokens for entry in report.linears if ".experts." in entry.name]
    assert 0 in tokens
    assert max(tokens) > 0


def test_half_precision(tmp_path):
    source = save_mixture(tmp_path / "model")
    in_memory(source, tmp_path / "memory", IDS, TRELLIS, dtype=torch.bfloat16)
    fq.quantize_streaming(source, tmp_path / "stream", IDS, TRELLIS, dtype=torch.bfloat16)
    same_tensors(tmp_path / "memory", tmp_path / "stream")


def test_no_more_than_a_block_is_there(tmp_path):
    skeleton = build_skeleton(save_mixture(tmp_path / "model", "mixtral", layers=3), torch.float32)
    most = 0

    def watch(_):
        nonlocal most
        blocks = skeleton.model.model.layers
        most = max(most, sum(any(not p.is_meta for p in block.parameters()) for block in blocks))

    fq.quantize_streaming(skeleton, tmp_path / "out", IDS, SCALAR, progress=watch)
    assert most == 1
    assert all(t.is_meta for block in skeleton.model.model.layers for t in block.state_dict().values())


def test_gradients_of_experts_that_do_not_fit_share_the_bits_out_by_size_alone(tmp_path):
    source = save_mixture(tmp_path / "model")
    run = fq.quantize_streaming(source, tmp_path / "out", IDS, TRELLIS, max_memory="1MB")
    assert any("second moments of all output gradients do not fit" in text for text in run.report.warnings)
    assert len({choice["bits"] for choice in run.report.allocation["choices"].values()}) > 1
    dense = fq.quantize_streaming(
        save_llama(tmp_path / "llama"), tmp_path / "dense", IDS, TRELLIS, max_memory="1MB"
    )
    assert not any("do not fit" in text for text in dense.report.warnings)


def test_second_moments_of_experts_are_planned_for():
    model, _ = make_family("mixtral")
    experts.unfuse_(model)
    block = model.model.layers[0]
    found = {
        name.removeprefix("model.layers.0."): f
        for name, f in experts.families(model, ["model.layers.0"]).items()
    }
    assert (
        mixture.moment_bytes(block, found, torch.device("cpu")) == 5 * 4 * 80**2
    )  # four experts and their pool
    assert mixture.moment_bytes(block, {}, torch.device("cpu")) == 0


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(EXPERT), rf"hold no {EXPERT}, of which model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        (lambda held: held.update({EXPERT: held[EXPERT][:-1].clone()}), rf"{EXPERT} is \(79, 48\)"),
        (
            lambda held: [held.pop(key) for key in list(held) if "layers.1" in key and ".w3." in key],
            r"hold no model\.layers\.1\.block_sparse_moe\.experts\.0\.w3\.weight",
        ),
        (
            lambda held: [held.pop(key) for key in list(held) if ".experts.3." in key],
            r"hold no model\.layers\.\d\.block_sparse_moe\.experts\.3\.w",
        ),
        (
            lambda held: [held.pop(key) for key in list(held) if "layers.0" in key and ".w2." in key],
            r"holds no tensors for model\.layers\.0\.mlp\.experts\.down_proj",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_misshapen_is_named(tmp_path, change, message):
    source = save_mixture(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    change(held)
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelSourceError, match=message):
        fq.quantize_streaming(source, tmp_path / "out", IDS, SCALAR)
    assert not (tmp_path / "out.partial").exists()


def test_stacked_tensors_of_another_shape_are_named(tmp_path):
    source, key = save_mixture(tmp_path / "model", "gpt_oss"), "model.layers.1.mlp.experts.down_proj"
    held = load_file(source / "model.safetensors")
    held[key] = held[key][:3].clone()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelSourceError, match=rf"{key} is there for a .* of shape \(3, .*has \(4, "):
        fq.quantize_streaming(source, tmp_path / "out", IDS, SCALAR)


def test_conversions_that_are_more_than_moves_are_refused_by_name(tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    source = save_llama(tmp_path / "model")
    rotary = PermuteForRope(permute_layer_names=["q_proj"])
    permuted = WeightConverter("q_proj.weight", "q_proj.weight", [rotary])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [permuted])
    with pytest.raises(ModelSourceError, match=r"q_proj.*made on loading by PermuteForRope.*--no-stream"):
        build_skeleton(source, torch.float32)


def test_a_tensor_that_is_split_on_loading_is_streamed(tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    source = save_llama(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    expected = dict(held)
    for key in [key for key in held if "gate_proj" in key]:
        parts = held.pop(key), held.pop(key.replace("gate_proj", "up_proj"))
        held[key.replace("gate_proj", "both")] = torch.cat(parts)
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    split = WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [split])
    skeleton = build_skeleton(source, torch.float32)
    found = dict(skeleton.read(skeleton.pieces))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
